// Row-wise kernels of a training step: RMS norm, SiLU gate, RoPE, cross-entropy.
//
// Terms
//   row     the features of one token, or its logits
//   width   elements of a row
//   piece   PIECE consecutive elements, small enough for intermediate values to stay in registers
//   SIMD    `omp simd` loops are vectorized by the compiler; no intrinsics are used here
//
// Data layout: matrices are row-major [rows][width] in fp32 or bf16 (dtype codes of cpu.h),
// contiguous unless a stride is given. Every kernel computes in fp32.
#include <omp.h>

#include "cpu.h"

// y = s / r * w with r = sqrt(mean(s^2) + eps) and s = x + added, which is stored to `sum`, or
// s = x if `added` is NULL; inverse[t] = 1 / r
void rms_norm_forward(const float *x, const void *added, int added_dtype, float *sum, const float *w, void *y, int y_dtype,
                      float *inverse, i64 rows, i64 width, float eps) {
#pragma omp parallel
    {
        float *row = floats(width), *more = floats(width);
#pragma omp for schedule(static)
        for (i64 t = 0; t < rows; t++) {
            const float *s = x + t * width;
            if (added) {
                load_row((const char *)added + t * width * element_size(added_dtype), added_dtype,
                         width, more);
                float *to = sum + t * width;
#pragma omp simd
                for (i64 i = 0; i < width; i++) to[i] = s[i] + more[i];
                s = to;
            }
            float squares = 0;
#pragma omp simd reduction(+ : squares)
            for (i64 i = 0; i < width; i++) squares += s[i] * s[i];
            float inv = 1.0f / sqrtf(squares / width + eps);
            inverse[t] = inv;
#pragma omp simd
            for (i64 i = 0; i < width; i++) row[i] = s[i] * inv * w[i];
            store_row((char *)y + t * width * element_size(y_dtype), y_dtype, width, row);
        }
        free(row);
        free(more);
    }
}

// grad_x = (g - x̂ mean(g x̂)) / r + grad_sum with g = grad w and x̂ = x / r; grad_sum can be NULL.
// grad_added, unless NULL, receives the same values in its dtype. grad_w = sum over rows of grad x̂
// (skipped if NULL).
void rms_norm_backward(const void *grad, int grad_dtype, const float *x, const float *w, const float *inverse,
                       const float *grad_sum, float *grad_x, void *grad_added, int added_dtype, float *grad_w, i64 rows,
                       i64 width) {
    int threads = omp_get_max_threads();
    float *parts = grad_w ? floats(threads * width) : NULL;
#pragma omp parallel
    {
        float *g = floats(width), *own = grad_w ? parts + omp_get_thread_num() * width : NULL;
#pragma omp for schedule(static)
        for (i64 t = 0; t < rows; t++) {
            const float *xt = x + t * width;
            float *out = grad_x + t * width, inv = inverse[t], dot = 0;
            load_row((const char *)grad + t * width * element_size(grad_dtype), grad_dtype, width,
                     g);
            if (own) {
#pragma omp simd
                for (i64 i = 0; i < width; i++) own[i] += g[i] * xt[i] * inv;
            }
#pragma omp simd reduction(+ : dot)
            for (i64 i = 0; i < width; i++) dot += g[i] * w[i] * xt[i];
            float mean = dot * inv * inv / width;  // x̂ mean(g x̂) = x inv (inv dot / width)
            if (grad_sum) {
                const float *also = grad_sum + t * width;
#pragma omp simd
                for (i64 i = 0; i < width; i++)
                    out[i] = (g[i] * w[i] - xt[i] * mean) * inv + also[i];
            } else {
#pragma omp simd
                for (i64 i = 0; i < width; i++) out[i] = (g[i] * w[i] - xt[i] * mean) * inv;
            }
            if (grad_added)
                store_row((char *)grad_added + t * width * element_size(added_dtype), added_dtype,
                          width, out);
        }
        free(g);
    }
    if (!grad_w) return;
    memset(grad_w, 0, width * sizeof(float));
    for (int part = 0; part < threads; part++)  // in a fixed order
        for (i64 i = 0; i < width; i++) grad_w[i] += parts[part * width + i];
    free(parts);
}

// Elements processed at a time, regardless of rows; few enough for intermediate values to stay in
// registers.
#define PIECE 64

static inline void silu_gate_piece(const void *gate, const void *up, void *out, int dtype, i64 at,
                                   i64 n) {
    float a[PIECE], b[PIECE];
    load_row((const char *)gate + at * element_size(dtype), dtype, n, a);
    load_row((const char *)up + at * element_size(dtype), dtype, n, b);
#pragma omp simd
    for (i64 i = 0; i < n; i++) a[i] = a[i] * sigmoid_(a[i]) * b[i];
    store_row((char *)out + at * element_size(dtype), dtype, n, a);
}

// out = silu(gate) * up
void silu_gate_forward(const void *gate, const void *up, void *out, int dtype, i64 rows,
                       i64 width) {
    i64 size = rows * width;
#pragma omp parallel for schedule(static)
    for (i64 at = 0; at < size / PIECE * PIECE; at += PIECE) {
        if (dtype == BF16) silu_gate_piece(gate, up, out, BF16, at, PIECE);
        else silu_gate_piece(gate, up, out, FP32, at, PIECE);
    }
    silu_gate_piece(gate, up, out, dtype, size / PIECE * PIECE, size % PIECE);
}

// grad_gate and grad_up for the elements [at, at + n)
static inline void silu_gate_backward_piece(const void *grad, const void *gate, const void *up,
                                            void *grad_gate, void *grad_up, int dtype, i64 at,
                                            i64 n) {
    float g[PIECE], a[PIECE], b[PIECE];
    load_row((const char *)grad + at * element_size(dtype), dtype, n, g);
    load_row((const char *)gate + at * element_size(dtype), dtype, n, a);
    load_row((const char *)up + at * element_size(dtype), dtype, n, b);
#pragma omp simd
    for (i64 i = 0; i < n; i++) {
        float s = sigmoid_(a[i]), silu = a[i] * s;
        b[i] = g[i] * b[i] * (s + silu * (1.0f - s));
        a[i] = g[i] * silu;
    }
    store_row((char *)grad_gate + at * element_size(dtype), dtype, n, b);
    store_row((char *)grad_up + at * element_size(dtype), dtype, n, a);
}

void silu_gate_backward(const void *grad, const void *gate, const void *up, void *grad_gate,
                        void *grad_up, int dtype, i64 rows, i64 width) {
    i64 size = rows * width;
#pragma omp parallel for schedule(static)
    for (i64 at = 0; at < size / PIECE * PIECE; at += PIECE) {
        if (dtype == BF16)
            silu_gate_backward_piece(grad, gate, up, grad_gate, grad_up, BF16, at, PIECE);
        else silu_gate_backward_piece(grad, gate, up, grad_gate, grad_up, FP32, at, PIECE);
    }
    silu_gate_backward_piece(grad, gate, up, grad_gate, grad_up, dtype, size / PIECE * PIECE,
                             size % PIECE);
}

// RoPE: rotates each pair (x_i, x_{i+half}) of each head; sign -1 is the inverse rotation.
// cosine, sine: [rows][half]
void rotary(const void *x, i64 x_stride, void *y, int dtype, const float *cosine, const float *sine,
            float sign, i64 rows, i64 heads, i64 half) {
    i64 width = heads * 2 * half, size = element_size(dtype);
#pragma omp parallel
    {
        float *in = floats(width), *out = floats(width);
#pragma omp for schedule(static)
        for (i64 t = 0; t < rows; t++) {
            const float *c = cosine + t * half, *s = sine + t * half;
            load_row((const char *)x + t * x_stride * size, dtype, width, in);
            for (i64 h = 0; h < heads; h++) {
                const float *a = in + h * 2 * half, *b = a + half;
                float *p = out + h * 2 * half, *q = p + half;
#pragma omp simd
                for (i64 i = 0; i < half; i++) {
                    p[i] = a[i] * c[i] - sign * b[i] * s[i];
                    q[i] = b[i] * c[i] + sign * a[i] * s[i];
                }
            }
            store_row((char *)y + t * width * size, dtype, width, out);
        }
        free(in);
        free(out);
    }
}

// loss[t] = logsumexp(logits[t]) - logits[t][labels[t]]; with_grad overwrites the logits with their
// gradient, softmax - onehot.
void cross_entropy(void *logits, i64 stride, int dtype, const i64 *labels, float *loss, i64 rows,
                   i64 width, int with_grad) {
#pragma omp parallel
    {
        float *x = floats(width);
#pragma omp for schedule(static)
        for (i64 t = 0; t < rows; t++) {
            char *at = (char *)logits + t * stride * element_size(dtype);
            load_row(at, dtype, width, x);
            float top = -INFINITY, target = x[labels[t]], sum = 0;
#pragma omp simd reduction(max : top)
            for (i64 i = 0; i < width; i++) top = x[i] > top ? x[i] : top;
#pragma omp simd reduction(+ : sum)
            for (i64 i = 0; i < width; i++) sum += (x[i] = exp_(x[i] - top));
            loss[t] = logf(sum) + top - target;
            if (!with_grad) continue;
            float inv = 1.0f / sum;
#pragma omp simd
            for (i64 i = 0; i < width; i++) x[i] *= inv;
            x[labels[t]] -= 1.0f;
            store_row(at, dtype, width, x);
        }
        free(x);
    }
}

// y = factor x, converted to `dtype`
void scaled(const float *x, float factor, void *y, int dtype, i64 size) {
#pragma omp parallel for schedule(static)
    for (i64 at = 0; at < size; at += PIECE) {
        float piece[PIECE];
        i64 n = min_(PIECE, size - at);
#pragma omp simd
        for (i64 i = 0; i < n; i++) piece[i] = x[at + i] * factor;
        store_row((char *)y + at * element_size(dtype), dtype, n, piece);
    }
}
