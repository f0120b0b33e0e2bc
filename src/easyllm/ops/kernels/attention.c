// FlashAttention over packed sequences: exact attention by tiles with an online softmax, and its
// backward pass (Dao et al. 2022, arXiv 2205.14135, algorithms 1 and 4). Inputs are fp32 or bf16,
// products are fp32; supports grouped-query attention. bf16 runs in attention_tiles.c if there is
// AMX.
//
// Terms
//   tile       QUERY_BLOCK queries x KEY_BLOCK keys of one sequence and head
//   groups     query heads per KV head
//   top, sum   running maximum of a row's scores, and running sum of its exponentials
//   lse        top + log(sum), saved for the backward pass
//   delta      sum over the head dimension of grad x out
//   GEMM       matmul_add of cpu.h, which computes tiles in registers
//
// Data layout: tensors as in attention.h; keys are transposed to [dim][padded length], where the
// length is padded to a multiple of LANES. No intrinsics are used; loops are vectorized by the
// compiler.
#include "attention.h"

#include "matrix.h"

#define QUERY_BLOCK 48
#define KEY_BLOCK 128

static inline i64 round_up(i64 n, i64 to) { return (n + to - 1) / to * to; }

// Loads tokens [start, start + count) of one head to out[count][dim] in fp32.
static void load_head(const void *x, i64 stride, i64 head, i64 start, i64 count, const Shape *s,
                      float *out) {
    for (i64 t = 0; t < count; t++)
        load_row((const char *)x + ((start + t) * stride + head * s->dim) * element_size(s->dtype),
                 s->dtype, s->dim, out + t * s->dim);
}

// Transposes [count][dim] to [dim][padded].
static void transpose(const float *x, i64 count, i64 dim, float *out, i64 padded) {
    for (i64 t = 0; t < count; t++)
        for (i64 i = 0; i < dim; i++) out[i * padded + t] = x[t * dim + i];
}

// Range of keys [from, to) that any of the queries [q0, q0 + nq) sees.
static void key_range(const Shape *s, i64 q0, i64 nq, i64 length, i64 *from, i64 *to) {
    *from = s->window ? max_(0, q0 - s->window + 1) / KEY_BLOCK * KEY_BLOCK : 0;
    *to = s->causal ? min_(length, q0 + nq) : length;
}

// Sets the scores of invisible and padding keys to -inf.
static inline void mask_row(const Shape *s, float *row, i64 query, i64 k0, i64 nk, i64 padded) {
    i64 last = s->causal ? query : k0 + nk - 1, first = s->window ? query - s->window + 1 : k0;
    for (i64 j = max_(0, last + 1 - k0); j < nk; j++) row[j] = -INFINITY;
    for (i64 j = 0; j < min_(nk, first - k0); j++) row[j] = -INFINITY;
    for (i64 j = nk; j < padded; j++) row[j] = -INFINITY;
}

void attention_forward(const void *q, const void *k, const void *v, void *out, float *lse,
                       const i64 *starts, i64 num_sequences, const Shape *s) {
    if (s->dtype == BF16 && tiles_ready()) {
        tiled_attention_forward(q, k, v, out, lse, starts, num_sequences, s);
        return;
    }
    i64 groups = s->heads / s->kv_heads, dim = s->dim, esize = element_size(s->dtype);
#pragma omp parallel for schedule(dynamic, 1) collapse(2)
    for (i64 n = 0; n < num_sequences; n++)
        for (i64 kv = 0; kv < s->kv_heads; kv++) {
            i64 start = starts[n], length = starts[n + 1] - start, padded = round_up(length, LANES);
            float *values = floats(padded * dim), *keys_t = floats(dim * padded);
            float *queries = floats(QUERY_BLOCK * dim), *acc = floats(QUERY_BLOCK * dim);
            float *scores = floats(QUERY_BLOCK * KEY_BLOCK);
            float top[QUERY_BLOCK], sum[QUERY_BLOCK];
            load_head(k, s->k_stride, kv, start, length, s, values);
            transpose(values, length, dim, keys_t, padded);
            load_head(v, s->v_stride, kv, start, length, s, values);
            for (i64 h = kv * groups; h < (kv + 1) * groups; h++)
                for (i64 q0 = 0; q0 < length; q0 += QUERY_BLOCK) {
                    i64 nq = min_(QUERY_BLOCK, length - q0), from, to;
                    load_head(q, s->q_stride, h, start + q0, nq, s, queries);
                    for (i64 i = 0; i < nq * dim; i++) queries[i] *= s->scale;
                    memset(acc, 0, nq * dim * sizeof(float));
                    for (i64 i = 0; i < nq; i++) top[i] = -INFINITY, sum[i] = 0;
                    key_range(s, q0, nq, length, &from, &to);
                    for (i64 k0 = from; k0 < to; k0 += KEY_BLOCK) {
                        i64 nk = min_(KEY_BLOCK, to - k0), cols = round_up(nk, LANES);
                        memset(scores, 0, nq * KEY_BLOCK * sizeof(float));
                        matmul_add(nq, cols, dim, (Left){queries, dim, 1}, keys_t + k0, padded,
                                   scores, KEY_BLOCK);
                        for (i64 i = 0; i < nq; i++) {
                            float *row = scores + i * KEY_BLOCK, best = top[i], total = 0;
                            mask_row(s, row, q0 + i, k0, nk, cols);
#pragma omp simd reduction(max : best)
                            for (i64 j = 0; j < cols; j++) best = row[j] > best ? row[j] : best;
                            if (best == -INFINITY) {  // no visible key in this block
                                memset(row, 0, cols * sizeof(float));
                                continue;
                            }
                            float rescale = top[i] == -INFINITY ? 0.0f : exp_(top[i] - best);
#pragma omp simd reduction(+ : total)
                            for (i64 j = 0; j < cols; j++) {
                                float e = row[j] == -INFINITY ? 0.0f : exp_(row[j] - best);
                                row[j] = e;
                                total += e;
                            }
                            sum[i] = sum[i] * rescale + total;
                            top[i] = best;
                            if (rescale != 1.0f)
                                for (i64 c = 0; c < dim; c++) acc[i * dim + c] *= rescale;
                        }
                        matmul_add(nq, dim, nk, (Left){scores, KEY_BLOCK, 1}, values + k0 * dim,
                                   dim, acc, dim);
                    }
                    for (i64 i = 0; i < nq; i++) {
                        i64 t = start + q0 + i;
                        float inv = sum[i] > 0 ? 1.0f / sum[i] : 0.0f;
                        for (i64 c = 0; c < dim; c++) acc[i * dim + c] *= inv;
                        store_row((char *)out + (t * s->heads + h) * dim * esize, s->dtype, dim,
                                  acc + i * dim);
                        lse[t * s->heads + h] = top[i] + logf(sum[i]);
                    }
                }
            free(values), free(keys_t), free(queries), free(acc), free(scores);
        }
}

void attention_backward(const AttentionBackward *args, const Shape *s) {
    if (s->dtype == BF16 && tiles_ready()) {
        tiled_attention_backward(args, s);
        return;
    }
    i64 groups = s->heads / s->kv_heads, dim = s->dim, esize = element_size(s->dtype);
    i64 width = s->heads * dim, kv_width = s->kv_heads * dim, num_sequences = args->num_sequences;
    const i64 *starts = args->starts;
#pragma omp parallel for schedule(dynamic, 1) collapse(2)
    for (i64 n = 0; n < num_sequences; n++)
        for (i64 kv = 0; kv < s->kv_heads; kv++) {
            i64 start = starts[n], length = starts[n + 1] - start, padded = round_up(length, LANES);
            float *keys = floats(padded * dim), *keys_t = floats(dim * padded);
            float *values_t = floats(dim * padded);
            float *dk = floats(padded * dim), *dv = floats(padded * dim);
            float *queries = floats(QUERY_BLOCK * dim), *dout = floats(QUERY_BLOCK * dim);
            float *o = floats(QUERY_BLOCK * dim), *dq = floats(QUERY_BLOCK * dim);
            float *p = floats(QUERY_BLOCK * KEY_BLOCK), *ds = floats(QUERY_BLOCK * KEY_BLOCK);
            load_head(args->v, s->v_stride, kv, start, length, s, keys);
            transpose(keys, length, dim, values_t, padded);
            load_head(args->k, s->k_stride, kv, start, length, s, keys);
            transpose(keys, length, dim, keys_t, padded);
            for (i64 h = kv * groups; h < (kv + 1) * groups; h++)
                for (i64 q0 = 0; q0 < length; q0 += QUERY_BLOCK) {
                    i64 nq = min_(QUERY_BLOCK, length - q0), from, to;
                    load_head(args->q, s->q_stride, h, start + q0, nq, s, queries);
                    load_head(args->grad, width, h, start + q0, nq, s, dout);
                    load_head(args->out, width, h, start + q0, nq, s, o);
                    memset(dq, 0, nq * dim * sizeof(float));
                    key_range(s, q0, nq, length, &from, &to);
                    for (i64 k0 = from; k0 < to; k0 += KEY_BLOCK) {
                        i64 nk = min_(KEY_BLOCK, to - k0), cols = round_up(nk, LANES);
                        memset(p, 0, nq * KEY_BLOCK * sizeof(float));
                        memset(ds, 0, nq * KEY_BLOCK * sizeof(float));
                        matmul_add(nq, cols, dim, (Left){queries, dim, 1}, keys_t + k0, padded, p,
                                   KEY_BLOCK);
                        matmul_add(nq, cols, dim, (Left){dout, dim, 1}, values_t + k0, padded, ds,
                                   KEY_BLOCK);
                        for (i64 i = 0; i < nq; i++) {
                            float *pi = p + i * KEY_BLOCK, *di = ds + i * KEY_BLOCK, delta = 0;
                            float z = args->lse[(start + q0 + i) * s->heads + h];
#pragma omp simd reduction(+ : delta)
                            for (i64 c = 0; c < dim; c++)
                                delta += dout[i * dim + c] * o[i * dim + c];
                            mask_row(s, pi, q0 + i, k0, nk, cols);
#pragma omp simd
                            for (i64 j = 0; j < cols; j++) {
                                float e = pi[j] == -INFINITY ? 0.0f : exp_(pi[j] * s->scale - z);
                                pi[j] = e;
                                di[j] = e * (di[j] - delta) * s->scale;
                            }
                        }
                        matmul_add(nk, dim, nq, (Left){p, 1, KEY_BLOCK}, dout, dim, dv + k0 * dim,
                                   dim);
                        matmul_add(nk, dim, nq, (Left){ds, 1, KEY_BLOCK}, queries, dim,
                                   dk + k0 * dim, dim);
                        matmul_add(nq, dim, nk, (Left){ds, KEY_BLOCK, 1}, keys + k0 * dim, dim, dq,
                                   dim);
                    }
                    for (i64 i = 0; i < nq; i++)
                        store_row(
                            (char *)args->grad_q + ((start + q0 + i) * width + h * dim) * esize,
                            s->dtype, dim, dq + i * dim);
                }
            for (i64 t = 0; t < length; t++) {
                i64 at = ((start + t) * kv_width + kv * dim) * esize;
                store_row((char *)args->grad_k + at, s->dtype, dim, dk + t * dim);
                store_row((char *)args->grad_v + at, s->dtype, dim, dv + t * dim);
            }
            free(keys), free(keys_t), free(values_t), free(dk), free(dv);
            free(queries), free(dout), free(o), free(dq), free(p), free(ds);
        }
}
