// The optimizer's passes over all weights: AdamW in one, from the gradient as it came to the rounded copy, and the norm
// of gradients. Built without contraction: what is fused into one rounding is written so.
#include "cpu.h"

#define BLOCK 4096  // elements a thread takes at once

typedef struct {
    float scale;           // of the gradient
    float shrink;          // 1 - rate * decay
    float beta1_rest;      // 1 - beta1
    float beta2, beta2_rest;
    float correction;      // sqrt(1 - beta2^t)
    float eps, step_size;  // rate / (1 - beta1^t)
} AdamW;

// theta <- shrink theta;  m <- m + (1 - beta1)(g - m);  v <- beta2 v + (1 - beta2) g^2;
// theta <- theta - step_size m / (sqrt(v) / correction + eps), then copied, if there is a copy
void adamw(float *restrict master, float *restrict mean, float *restrict square, const void *gradient, int dtype,
           uint16_t *copy, i64 count, const AdamW *s) {
#pragma omp parallel
    {
        float *g = floats(BLOCK);
#pragma omp for schedule(static)
        for (i64 first = 0; first < count; first += BLOCK) {
            i64 n = min_(BLOCK, count - first);
            float *w = master + first, *m = mean + first, *v = square + first;
            load_row((const char *)gradient + first * element_size(dtype), dtype, n, g);
#pragma omp simd
            for (i64 i = 0; i < n; i++) {
                float x = g[i] * s->scale;
                m[i] = __builtin_fmaf(s->beta1_rest, x - m[i], m[i]);
                v[i] = __builtin_fmaf(s->beta2_rest * x, x, v[i] * s->beta2);
                float below = sqrtf(v[i]) / s->correction + s->eps;
                w[i] = w[i] * s->shrink + -s->step_size * m[i] / below;  // rounded as PyTorch's kernel rounds
            }
            if (copy) store_row(copy + first, BF16, n, w);
        }
        free(g);
    }
}

// sum of squares, of blocks in fp32 and then of blocks in double in their order, whatever the number of threads
double sum_of_squares(const void *x, int dtype, i64 count) {
    i64 blocks = (count + BLOCK - 1) / BLOCK;
    float *sums = floats(blocks);
#pragma omp parallel
    {
        float *row = floats(BLOCK);
#pragma omp for schedule(static)
        for (i64 b = 0; b < blocks; b++) {
            i64 n = min_(BLOCK, count - b * BLOCK);
            float sum = 0;
            load_row((const char *)x + b * BLOCK * element_size(dtype), dtype, n, row);
#pragma omp simd reduction(+ : sum)
            for (i64 i = 0; i < n; i++) sum += row[i] * row[i];
            sums[b] = sum;
        }
        free(row);
    }
    double total = 0;
    for (i64 b = 0; b < blocks; b++) total += sums[b];
    free(sums);
    return total;
}
