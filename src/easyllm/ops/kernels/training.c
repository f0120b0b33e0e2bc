// Row-wise kernels: RMS norm, SiLU gate, RoPE, cross-entropy, log-sum-exp.
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

#include "rows.h"

// Arguments of rms_norm_forward.
typedef struct {
    const float *x;       // [rows][width]
    const void *added;    // [rows][width] or NULL
    float *sum;           // result x + added, [rows][width]; not written if `added` is NULL
    const float *weight;  // [width]
    void *y;              // result, [rows][width]
    float *inverse;       // result 1 / r, [rows]
    int added_dtype, y_dtype;
    i64 rows, width;
    float eps;
} RmsNormForward;

// y = s / r * weight with r = sqrt(mean(s^2) + eps) and s = x + added, or s = x
void rms_norm_forward(const RmsNormForward *args) {
    const float *x = args->x, *w = args->weight, eps = args->eps;
    const void *added = args->added;
    float *sum = args->sum, *inverse = args->inverse;
    void *y = args->y;
    const int added_dtype = args->added_dtype, y_dtype = args->y_dtype;
    const i64 rows = args->rows, width = args->width;
#pragma omp parallel
    {
        float *row = floats(width), *more = floats(width);
#pragma omp for schedule(static)
        for (i64 t = 0; t < rows; t++) {
            const float *s = x + t * width;
            if (added) {
                load_row((const char *)added + t * width * element_size(added_dtype),
                         added_dtype, width, more);
                float *to = sum + t * width;
#pragma omp simd
                for (i64 i = 0; i < width; i++) to[i] = s[i] + more[i];
                s = to;
            }
            inverse[t] = rms_norm_row(s, w, width, eps, row);
            store_row((char *)y + t * width * element_size(y_dtype), y_dtype, width, row);
        }
        free(row);
        free(more);
    }
}

// Arguments of rms_norm_backward; x is the sum if there was a residual.
typedef struct {
    const void *grad;       // gradient of y, [rows][width]
    const float *x;         // [rows][width]
    const float *weight;    // [width]
    const float *inverse;   // 1 / r of the forward pass, [rows]
    const float *grad_sum;  // gradient of the sum from its other uses, [rows][width], or NULL
    float *grad_x;          // result, [rows][width]
    void *grad_added;       // result: grad_x in another dtype, [rows][width], or NULL
    float *grad_weight;     // result, [width], or NULL
    int grad_dtype, added_dtype;
    i64 rows, width;
} RmsNormBackward;

// grad_x = (g - x̂ mean(g x̂)) / r + grad_sum with g = grad weight and x̂ = x / r;
// grad_weight = sum over rows of grad x̂
void rms_norm_backward(const RmsNormBackward *args) {
    const float *x = args->x, *w = args->weight, *inverse = args->inverse;
    const float *grad_sum = args->grad_sum;
    const void *grad = args->grad;
    float *grad_x = args->grad_x, *grad_w = args->grad_weight;
    void *grad_added = args->grad_added;
    const int grad_dtype = args->grad_dtype, added_dtype = args->added_dtype;
    const i64 rows = args->rows, width = args->width;
    int threads = omp_get_max_threads();
    float *parts = grad_w ? floats(threads * width) : NULL;
#pragma omp parallel
    {
        float *g = floats(width), *own = grad_w ? parts + omp_get_thread_num() * width : NULL;
#pragma omp for schedule(static)
        for (i64 t = 0; t < rows; t++) {
            const float *xt = x + t * width;
            float *out = grad_x + t * width, inv = inverse[t], dot = 0;
            load_row((const char *)grad + t * width * element_size(grad_dtype), grad_dtype,
                     width, g);
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
                store_row((char *)grad_added + t * width * element_size(added_dtype),
                          added_dtype, width, out);
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
    silu_gate_values(a, b, n, a);
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

// Arguments of rotary.
typedef struct {
    const void *x;               // [rows][heads][2 half]
    void *y;                     // result, [rows][heads][2 half], contiguous
    const float *cosine, *sine;  // [rows][half]
    i64 x_stride;                // elements from row to row of x
    i64 rows, heads, half;
    int dtype;                   // of x and y
    float sign;                  // 1, or -1 for the inverse rotation
} Rotary;

// RoPE: rotates each pair (x_i, x_{i+half}) of each head.
void rotary(const Rotary *args) {
    const void *x = args->x;
    void *y = args->y;
    const float *cosine = args->cosine, *sine = args->sine, sign = args->sign;
    const i64 x_stride = args->x_stride, rows = args->rows, heads = args->heads;
    const i64 half = args->half;
    const int dtype = args->dtype;
    i64 width = heads * 2 * half, size = element_size(dtype);
#pragma omp parallel
    {
        float *in = floats(width), *out = floats(width);
#pragma omp for schedule(static)
        for (i64 t = 0; t < rows; t++) {
            const float *c = cosine + t * half, *s = sine + t * half;
            load_row((const char *)x + t * x_stride * size, dtype, width, in);
            for (i64 h = 0; h < heads; h++)
                rotate_head_pairs(in + h * 2 * half, c, s, half, sign, out + h * 2 * half);
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

// out[rows] = log(sum(exp(x))) of each row
void logsumexp(const void *x, int dtype, i64 rows, i64 width, float *out) {
#pragma omp parallel
    {
        float *row = dtype == FP32 ? NULL : floats(width);
#pragma omp for schedule(static)
        for (i64 t = 0; t < rows; t++) {
            const char *at = (const char *)x + t * width * element_size(dtype);
            if (row) load_row(at, dtype, width, row);
            out[t] = logsumexp_row(row ? row : (const float *)at, width);
        }
        free(row);
    }
}
