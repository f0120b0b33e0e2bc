// FlashAttention in bf16 on AMX: the functions of attention.c. Scores and sums are fp32;
// probabilities and gradients of scores are rounded to bf16 as inputs of a GEMM, as in
// FlashAttention's GPU kernels.
//
// Terms
//   tile, panel, VNNI pairs, mask   see tiles.h
//   block       32 consecutive tokens of a sequence: one pair of panels
//   operand     packed tiles of A or B in a GEMM
//   lane        one element of a register; lanes are queries or keys of a row of scores
//   lse, delta  log-sum-exp of a query's scores; sum over the head dimension of grad x out
//   group       query heads that share a KV head; in the backward pass also KEY_GROUP key blocks
//
// Data layout: operands packed along the head dimension are [blocks][inputs][2][tile], along the
// tokens [pairs][blocks][2][tile]. Scores and sums are 32 x 32 fp32 as [2][2][16][16] (SUMS).
//
// Sequences are divided into blocks of 32 tokens. The forward pass multiplies a block of queries by
// a few blocks of keys at a time. The backward pass multiplies a block of keys by each block of
// queries, with keys as the rows of the scores: scores are then an operand for the gradients of
// keys and values without change, and for the gradient of queries after a transpose.
//
// Intrinsics, in addition to those of tiles.h
//   _mm512_fmadd_ps, _fmsub_ps, _fnmadd_ps   FMA: a * b + c, a * b - c, c - a * b
//   _mm512_roundscale_ps(x, 8)               rounds to integers
//   _mm512_scalef_ps(p, n)                   p * 2^n
//   _mm512_cvtne2ps_pbh(high, low)           converts 2 x 16 fp32 values to 32 bf16
//   _mm512_dpbf16_ps                         adds products of bf16 pairs to fp32 lanes
//   _mm512_reduce_max_ps, _reduce_add_ps     maximum and sum of all lanes
//   _mm512_mask_max_ps, _maskz_mov_ps        maximum under a mask; zero lanes outside a mask
#include "attention.h"

#include "tiles.h"

#ifdef HAS_TILES

#define BLOCK (2 * SIDE)  // tokens
#define KEY_BLOCKS 8      // blocks of keys per softmax step of a block of queries
#define KEY_GROUP 4       // blocks of keys per update of the gradient of queries

// Head dimension in tiles of inputs and in pairs of panels; sequence length in blocks.
typedef struct {
    i64 inputs, pairs, blocks;
} Parts;

static Parts parts_of(const Shape *s, i64 length) {
    return (Parts){(s->dim + DEPTH - 1) / DEPTH, even_panels(s->dim) / 2, even_panels(length) / 2};
}

// Workspace of a thread, from which buffers are taken.
typedef struct {
    char *memory, *next;
} Workspace;

static void *take(Workspace *workspace, i64 pairs_of_tiles) {
    void *piece = workspace->next;
    workspace->next += pairs_of_tiles * 2 * TILE_BYTES;
    return piece;
}

static Workspace new_workspace(i64 pairs_of_tiles) {
    void *memory = NULL;
    if (posix_memalign(&memory, 4096, (size_t)(pairs_of_tiles * 2 * TILE_BYTES))) abort();
    return (Workspace){memory, memory};
}

// Packs operands of a sequence's GEMMs. Along the head dimension, [blocks][inputs][2][tile]: tokens
// are rows of A or columns of B. Along the tokens, [pairs][blocks][2][tile]: head dimensions are
// columns of B.
static void pack_along_head(const uint16_t *x, i64 stride, i64 length, const Shape *s, int columns,
                            uint16_t *out) {
    Operand tokens = {x, stride, columns};
    Parts p = parts_of(s, length);
    const Packing all = {.size = length,
                         .depth = s->dim,
                         .num_panels = 2 * p.blocks,
                         .tiles = p.inputs,
                         .pitch = p.inputs};
    pack_panels(&tokens, all, out);
}

static void pack_along_tokens(const uint16_t *x, i64 stride, i64 length, const Shape *s,
                              uint16_t *out) {
    Operand tokens = {x, stride, 0};
    Parts p = parts_of(s, length);
    const Packing all = {.size = s->dim,
                         .depth = length,
                         .num_panels = 2 * p.pairs,
                         .tiles = p.blocks,
                         .pitch = p.blocks,
                         .interleaved = 1};
    pack_panels(&tokens, all, out);
}

// Mask of those of the 16 tokens from `start` on that are in [first, last].
static inline __mmask16 lanes_in(i64 start, i64 first, i64 last) {
    i64 from = min_(16, max_(0, first - start)), to = min_(16, max_(0, last + 1 - start));
    return (__mmask16)(((1u << to) - 1) & ~((1u << from) - 1));
}

// exp_ of cpu.h in each lane.
static inline __m512 exp_lanes(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-87.0f), x);  // with operands in this order, NaN stays NaN
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), 8);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(_mm512_mul_ps(p, r), r, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(p, n);
}

// Address of a row's 16 sums in the left or right half of 32 x 32 sums.
static inline float *sums_row(float *sums, i64 row, i64 half) {
    return sums + row / SIDE * 512 + half * 256 + row % SIDE * 16;
}

// Stores 32 values in bf16 as a row of the two tiles of an operand.
static inline void store_operand(uint16_t *pair, i64 row, __m512 left, __m512 right) {
    _mm512_store_si512(pair + row * DEPTH, (__m512i)_mm512_cvtne2ps_pbh(right, left));
}

// Stores a row of 32 x 32 sums times a factor in bf16.
static inline void store_row_of(float *sums, i64 row, float factor, i64 width, uint16_t *out) {
    __m512 by = _mm512_set1_ps(factor);
    __m512 left = _mm512_mul_ps(_mm512_load_ps(sums_row(sums, row, 0)), by);
    __m512 right = _mm512_mul_ps(_mm512_load_ps(sums_row(sums, row, 1)), by);
    _mm512_mask_storeu_epi16(out, first_of(width), (__m512i)_mm512_cvtne2ps_pbh(right, left));
}

// Range of keys that a query sees, both ends included.
typedef struct {
    i64 first, last;
} Keys;

static inline Keys keys_of(const Shape *s, i64 query, i64 length) {
    return (Keys){s->window ? max_(0, query - s->window + 1) : 0, s->causal ? query : length - 1};
}

// Running softmax of a query: maximum score, and sum of the exponentials relative to it.
typedef struct {
    float top, sum;
} Softmax;

// Online softmax of a row over `count` blocks of scores from key `start` on; probabilities are
// stored as a row of an operand. Returns the factor by which the row's earlier sums must be
// multiplied.
static float softmax_row(float *scores, i64 row, i64 start, i64 count, const Keys visible,
                         float scale, Softmax *state, uint16_t *probabilities) {
    const i64 first = visible.first, last = visible.last;
    __m512 best = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
    if (max_(first, start) > min_(last, start + count * BLOCK - 1)) {  // no visible key
        for (i64 b = 0; b < count; b++) store_operand(probabilities + b * PAIR, row, total, total);
        return 1.0f;
    }
    for (i64 j = 0; j < 2 * count; j++)
        best = _mm512_mask_max_ps(best, lanes_in(start + 16 * j, first, last), best,
                                  _mm512_load_ps(sums_row(scores + j / 2 * SUMS, row, j % 2)));
    float highest = fmaxf(state->top, _mm512_reduce_max_ps(best) * scale);
    __m512 by = _mm512_set1_ps(scale), less = _mm512_set1_ps(-highest);
    for (i64 b = 0; b < count; b++) {
        __m512 halves[2];
        for (i64 h = 0; h < 2; h++) {
            __m512 x = _mm512_load_ps(sums_row(scores + b * SUMS, row, h));
            x = _mm512_fmadd_ps(x, by, less);
            halves[h] =
                _mm512_maskz_mov_ps(lanes_in(start + (2 * b + h) * 16, first, last), exp_lanes(x));
            total = _mm512_add_ps(total, halves[h]);
        }
        store_operand(probabilities + b * PAIR, row, halves[0], halves[1]);
    }
    float rescale = state->top == -INFINITY ? 0.0f : exp_(state->top - highest);
    state->sum = state->sum * rescale + _mm512_reduce_add_ps(total);
    state->top = highest;
    return rescale;
}

// Forward pass of one sequence and query head.
static void forward_of_head(const uint16_t *q, const uint16_t *k, const uint16_t *v, uint16_t *out,
                            float *lse, i64 length, const Shape *s, Workspace workspace) {
    Parts p = parts_of(s, length);
    uint16_t *queries = take(&workspace, p.blocks * p.inputs);
    uint16_t *keys = take(&workspace, p.blocks * p.inputs);
    uint16_t *values = take(&workspace, p.pairs * p.blocks);
    uint16_t *probabilities = take(&workspace, KEY_BLOCKS);
    float *scores = take(&workspace, 2 * KEY_BLOCKS), *sums = take(&workspace, 2 * p.pairs);
    pack_along_head(q, s->q_stride, length, s, 0, queries);
    pack_along_head(k, s->k_stride, length, s, 1, keys);
    pack_along_tokens(v, s->v_stride, length, s, values);
    for (i64 i = 0; i < p.blocks; i++) {
        i64 rows = min_(BLOCK, length - i * BLOCK);
        i64 from = keys_of(s, i * BLOCK, length).first;
        i64 to = keys_of(s, i * BLOCK + rows - 1, length).last;
        Softmax state[BLOCK];
        for (i64 r = 0; r < BLOCK; r++) state[r] = (Softmax){-INFINITY, 0};
        for (i64 b = from / BLOCK; b <= to / BLOCK; b += KEY_BLOCKS) {
            i64 count = min_(KEY_BLOCKS, to / BLOCK + 1 - b);
            int starts = b == from / BLOCK;
            for (i64 j = 0; j < count; j++)
                four_tiles(p.inputs, packed_panels(queries + i * p.inputs * PAIR),
                           packed_panels(keys + (b + j) * p.inputs * PAIR), 1, scores + j * SUMS);
            COMPILER_BARRIER();
            for (i64 r = 0; r < BLOCK; r++) {
                // padding rows see no key
                const Keys visible = r < rows ? keys_of(s, i * BLOCK + r, length) : (Keys){1, 0};
                float rescale = softmax_row(scores, r, b * BLOCK, count, visible, s->scale,
                                            state + r, probabilities);
                if (starts || rescale == 1.0f) continue;
                for (i64 c = 0; c < 2 * p.pairs; c++) {
                    float *row = sums_row(sums + c / 2 * SUMS, r, c % 2);
                    _mm512_store_ps(row,
                                    _mm512_mul_ps(_mm512_load_ps(row), _mm512_set1_ps(rescale)));
                }
            }
            for (i64 c = 0; c < p.pairs; c++)
                four_tiles(count, packed_panels(probabilities),
                           packed_panels(values + (c * p.blocks + b) * PAIR), starts,
                           sums + c * SUMS);
        }
        COMPILER_BARRIER();
        for (i64 r = 0; r < rows; r++) {
            i64 t = i * BLOCK + r;
            for (i64 c = 0; c < p.pairs; c++)
                store_row_of(sums + c * SUMS, r, 1.0f / state[r].sum, s->dim - c * BLOCK,
                             out + t * s->heads * s->dim + c * BLOCK);
            lse[t * s->heads] = state[r].top + logf(state[r].sum);
        }
    }
}

// What the backward pass computes for 32 keys (rows) and 32 queries.
typedef struct {
    float *scores, *products;           // sums of keys x queries, and of values x gradients
    const float *lse, *delta;           // of all queries of the sequence
    uint16_t *probabilities, *gradient;  // results, as operands; the gradient is that of the scores
} ScoreBlock;

// Computes probabilities, and the gradient of the scores, of the keys from `key` and the queries
// from `query` on.
static void gradient_of_scores(const ScoreBlock *block, i64 key, i64 query, i64 length,
                               const Shape *s) {
    const float *lse = block->lse, *delta = block->delta;
    __m512 by = _mm512_set1_ps(s->scale);
    for (i64 r = 0; r < BLOCK; r++) {
        i64 j = key + r, first = s->causal ? j : 0;
        i64 last = s->window ? min_(length, j + s->window) - 1 : length - 1;
        __m512 p[2], g[2];
        for (i64 h = 0; h < 2; h++) {
            i64 at = query + 16 * h;
            __m512 x = _mm512_load_ps(sums_row(block->scores, r, h));
            x = _mm512_fmsub_ps(x, by, _mm512_load_ps(lse + at));
            p[h] = _mm512_maskz_mov_ps(j < length ? lanes_in(at, first, last) : 0, exp_lanes(x));
            g[h] = _mm512_load_ps(sums_row(block->products, r, h));
            g[h] = _mm512_sub_ps(g[h], _mm512_load_ps(delta + at));
            g[h] = _mm512_mul_ps(_mm512_mul_ps(p[h], g[h]), by);
        }
        store_operand(block->probabilities, r, p[0], p[1]);
        store_operand(block->gradient, r, g[0], g[1]);
    }
}

// Stores sums [blocks][pairs][32 x 32] as rows of bf16.
static void store_sums(float *sums, i64 length, const Shape *s, i64 stride, uint16_t *out) {
    Parts p = parts_of(s, length);
    COMPILER_BARRIER();
    for (i64 t = 0; t < length; t++)
        for (i64 c = 0; c < p.pairs; c++)
            store_row_of(sums + (t / BLOCK * p.pairs + c) * SUMS, t % BLOCK, 1.0f,
                         s->dim - c * BLOCK, out + t * stride + c * BLOCK);
}

// Computes lse and delta of a sequence's queries, zero-padded to complete blocks.
static void terms_of_queries(const uint16_t *grad, const uint16_t *out, const float *from,
                             i64 length, const Shape *s, float *lse, float *delta) {
    i64 width = s->heads * s->dim;
    for (i64 t = 0; t < even_panels(length) * SIDE; t++) {
        __m512 sum = _mm512_setzero_ps();
        for (i64 c = 0; t < length && c < s->dim; c += 32) {
            __mmask32 there = first_of(s->dim - c);
            __m512i x = _mm512_maskz_loadu_epi16(there, grad + t * width + c);
            __m512i y = _mm512_maskz_loadu_epi16(there, out + t * width + c);
            sum = _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)y);
        }
        lse[t] = t < length ? from[t * s->heads] : 0.0f, delta[t] = _mm512_reduce_add_ps(sum);
    }
}

// Tensors of one sequence, from the first head of the group on.
typedef struct {
    const uint16_t *grad, *q, *k, *v, *out;
    const float *lse;
    uint16_t *grad_q, *grad_k, *grad_v;
} Tensors;

// First block of queries that no longer sees any key of a block.
static i64 end_of_queries(const Shape *s, i64 block, i64 blocks) {
    return s->window ? min_(blocks, (block * BLOCK + BLOCK - 1 + s->window - 1) / BLOCK + 1)
                     : blocks;
}

// Backward pass of one sequence and KV head, with all its query heads.
static void backward_of_group(Tensors x, i64 length, const Shape *s, Workspace workspace) {
    Parts p = parts_of(s, length);
    i64 along_head = p.blocks * p.inputs, along_tokens = p.pairs * p.blocks;
    i64 width = s->heads * s->dim;
    uint16_t *keys = take(&workspace, along_head), *values = take(&workspace, along_head);
    uint16_t *keys_along = take(&workspace, along_tokens);
    uint16_t *queries = take(&workspace, along_head);
    uint16_t *queries_along = take(&workspace, along_tokens);
    uint16_t *grads = take(&workspace, along_head), *grads_along = take(&workspace, along_tokens);
    uint16_t *probabilities = take(&workspace, p.blocks), *gradient = take(&workspace, p.blocks);
    // [blocks of queries][KEY_GROUP][2][tile]
    uint16_t *transposed = take(&workspace, p.blocks * KEY_GROUP);
    float *scores = take(&workspace, 2), *products = take(&workspace, 2);
    float *dq = take(&workspace, 2 * along_tokens), *dk = take(&workspace, 2 * along_tokens);
    float *dv = take(&workspace, 2 * along_tokens);
    float *lse = take(&workspace, p.blocks), *delta = take(&workspace, p.blocks);
    pack_along_head(x.k, s->k_stride, length, s, 0, keys);
    pack_along_head(x.v, s->v_stride, length, s, 0, values);
    pack_along_tokens(x.k, s->k_stride, length, s, keys_along);
    for (i64 h = 0; h < s->heads / s->kv_heads; h++) {
        const uint16_t *q = x.q + h * s->dim, *grad = x.grad + h * s->dim;
        pack_along_head(q, s->q_stride, length, s, 1, queries);
        pack_along_tokens(q, s->q_stride, length, s, queries_along);
        pack_along_head(grad, width, length, s, 1, grads);
        pack_along_tokens(grad, width, length, s, grads_along);
        // with a window, the first group that reaches a block of queries may not be group 0
        if (s->window) memset(dq, 0, (size_t)along_tokens * SUMS * sizeof(*dq));
        terms_of_queries(grad, x.out + h * s->dim, x.lse + h, length, s, lse, delta);
        for (i64 group = 0; group < p.blocks; group += KEY_GROUP) {
            i64 size = min_(KEY_GROUP, p.blocks - group), from = s->causal ? group : 0;
            i64 to_last = end_of_queries(s, group + size - 1, p.blocks);
            for (i64 b = group; b < group + size; b++) {
                i64 first = s->causal ? b : 0, end = end_of_queries(s, b, p.blocks);
                for (i64 i = from; i < to_last; i++) {
                    uint16_t *to = transposed + (i * KEY_GROUP + b - group) * PAIR;
                    if (i < first || i >= end) {
                        memset(to, 0, PAIR * sizeof(*to));
                        continue;
                    }
                    four_tiles(p.inputs, packed_panels(keys + b * p.inputs * PAIR),
                               packed_panels(queries + i * p.inputs * PAIR), 1, scores);
                    four_tiles(p.inputs, packed_panels(values + b * p.inputs * PAIR),
                               packed_panels(grads + i * p.inputs * PAIR), 1, products);
                    COMPILER_BARRIER();
                    const ScoreBlock block = {scores, products, lse, delta,
                                              probabilities + i * PAIR, gradient + i * PAIR};
                    gradient_of_scores(&block, b * BLOCK, i * BLOCK, length, s);
                    pack_pairs(gradient + i * PAIR, DEPTH, BLOCK, BLOCK, 1, to);
                }
                for (i64 c = 0; c < p.pairs; c++) {
                    i64 at = (c * p.blocks + first) * PAIR, sums = (b * p.pairs + c) * SUMS;
                    four_tiles(end - first, packed_panels(probabilities + first * PAIR),
                               packed_panels(grads_along + at), h == 0, dv + sums);
                    four_tiles(end - first, packed_panels(gradient + first * PAIR),
                               packed_panels(queries_along + at), h == 0, dk + sums);
                }
            }
            for (i64 i = from; i < to_last; i++)
                for (i64 c = 0; c < p.pairs; c++)
                    four_tiles(size, packed_panels(transposed + i * KEY_GROUP * PAIR),
                               packed_panels(keys_along + (c * p.blocks + group) * PAIR),
                               group == 0 && !s->window, dq + (i * p.pairs + c) * SUMS);
        }
        store_sums(dq, length, s, width, x.grad_q + h * s->dim);
    }
    store_sums(dk, length, s, s->kv_heads * s->dim, x.grad_k);
    store_sums(dv, length, s, s->kv_heads * s->dim, x.grad_v);
}

typedef struct {
    i64 length, number;
} Sequence;

static int by_length(const void *a, const void *b) {
    const Sequence *x = a, *y = b;
    if (x->length != y->length) return x->length < y->length ? 1 : -1;
    return x->number < y->number ? -1 : 1;
}

// Order of the sequences, longest first, so that the last tasks are short (load balancing).
static i64 *longest_first(const i64 *starts, i64 num_sequences) {
    Sequence *sequences = malloc((size_t)(num_sequences + 1) * sizeof(*sequences));
    i64 *order = malloc((size_t)(num_sequences + 1) * sizeof(*order));
    if (!sequences || !order) abort();
    for (i64 n = 0; n < num_sequences; n++) sequences[n] = (Sequence){starts[n + 1] - starts[n], n};
    qsort(sequences, (size_t)num_sequences, sizeof(*sequences), by_length);
    for (i64 n = 0; n < num_sequences; n++) order[n] = sequences[n].number;
    free(sequences);
    return order;
}

void tiled_attention_forward(const uint16_t *q, const uint16_t *k, const uint16_t *v, uint16_t *out,
                             float *lse, const i64 *starts, i64 num_sequences, const Shape *s) {
    i64 *order = longest_first(starts, num_sequences), dim = s->dim;
    if (num_sequences == 0) return free(order);
    Parts maximum = parts_of(s, starts[order[0] + 1] - starts[order[0]]);
    i64 needed = maximum.blocks * (2 * maximum.inputs + maximum.pairs) + 3 * KEY_BLOCKS +
                 2 * maximum.pairs;
#pragma omp parallel
    {
        Workspace workspace = new_workspace(needed);
        configure_tiles();
#pragma omp for schedule(dynamic, 1) collapse(2)
        for (i64 n = 0; n < num_sequences; n++)
            for (i64 h = 0; h < s->heads; h++) {
                i64 start = starts[order[n]], kv = h / (s->heads / s->kv_heads);
                forward_of_head(q + start * s->q_stride + h * dim,
                                k + start * s->k_stride + kv * dim,
                                v + start * s->v_stride + kv * dim,
                                out + (start * s->heads + h) * dim, lse + start * s->heads + h,
                                starts[order[n] + 1] - start, s, workspace);
            }
        _tile_release();
        free(workspace.memory);
    }
    free(order);
}

void tiled_attention_backward(const AttentionBackward *args, const Shape *s) {
    const uint16_t *grad = args->grad, *q = args->q, *k = args->k, *v = args->v, *out = args->out;
    uint16_t *grad_q = args->grad_q, *grad_k = args->grad_k, *grad_v = args->grad_v;
    const float *lse = args->lse;
    const i64 *starts = args->starts, num_sequences = args->num_sequences;
    i64 *order = longest_first(starts, num_sequences), dim = s->dim;
    i64 groups = s->heads / s->kv_heads;
    if (num_sequences == 0) return free(order);
    Parts maximum = parts_of(s, starts[order[0] + 1] - starts[order[0]]);
    i64 needed = maximum.blocks * (4 * maximum.inputs + 9 * maximum.pairs + 2 + KEY_GROUP + 2) + 4;
#pragma omp parallel
    {
        Workspace workspace = new_workspace(needed);
        configure_tiles();
#pragma omp for schedule(dynamic, 1) collapse(2)
        for (i64 n = 0; n < num_sequences; n++)
            for (i64 kv = 0; kv < s->kv_heads; kv++) {
                i64 start = starts[order[n]], row = (start * s->heads + kv * groups) * dim;
                i64 kv_row = (start * s->kv_heads + kv) * dim;
                Tensors x = {grad + row,
                             q + start * s->q_stride + kv * groups * dim,
                             k + start * s->k_stride + kv * dim,
                             v + start * s->v_stride + kv * dim,
                             out + row,
                             lse + start * s->heads + kv * groups,
                             grad_q + row,
                             grad_k + kv_row,
                             grad_v + kv_row};
                backward_of_group(x, starts[order[n] + 1] - start, s, workspace);
            }
        _tile_release();
        free(workspace.memory);
    }
    free(order);
}

#else

void tiled_attention_forward(const uint16_t *q, const uint16_t *k, const uint16_t *v, uint16_t *out,
                             float *lse, const i64 *starts, i64 num_sequences, const Shape *s) {
    (void)q, (void)k, (void)v, (void)out, (void)lse, (void)starts, (void)num_sequences, (void)s;
}
void tiled_attention_backward(const AttentionBackward *args, const Shape *s) {
    (void)args, (void)s;
}

#endif
