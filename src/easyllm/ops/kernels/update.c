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

// one block: theta <- shrink theta;  m <- m + (1 - beta1)(g - m);  v <- beta2 v + (1 - beta2) g^2;
// theta <- theta - step_size m / (sqrt(v) / correction + eps), rounded as PyTorch's kernel rounds
static inline void move_weights(float *restrict w, float *restrict m, float *restrict v, const float *restrict g,
                                i64 n, const AdamW *s) {
#pragma omp simd
    for (i64 i = 0; i < n; i++) {
        float x = g[i] * s->scale;
        m[i] = __builtin_fmaf(s->beta1_rest, x - m[i], m[i]);
        v[i] = __builtin_fmaf(s->beta2_rest * x, x, v[i] * s->beta2);
        float below = sqrtf(v[i]) / s->correction + s->eps;
        w[i] = w[i] * s->shrink + -s->step_size * m[i] / below;
    }
}

// The copy, if there is one, follows the master.
void adamw(float *restrict master, float *restrict mean, float *restrict square, const void *gradient, int dtype,
           uint16_t *copy, i64 count, const AdamW *s) {
#pragma omp parallel
    {
        float *g = floats(BLOCK);
#pragma omp for schedule(static)
        for (i64 first = 0; first < count; first += BLOCK) {
            i64 n = min_(BLOCK, count - first);
            load_row((const char *)gradient + first * element_size(dtype), dtype, n, g);
            move_weights(master + first, mean + first, square + first, g, n, s);
            if (copy) store_row(copy + first, BF16, n, master + first);
        }
        free(g);
    }
}

#define CODES 256  // that share a scale

// m = scale share |share|, share = q / 127;  v = scale share^4, share = q / 255
static inline void widen(const int8_t *mean, float mean_scale, const uint8_t *square, float square_scale, i64 n,
                         float *restrict m, float *restrict v) {
#pragma omp simd
    for (i64 i = 0; i < n; i++) {
        float share = (float)mean[i] / 127.0f;
        m[i] = share * fabsf(share) * mean_scale;
        share = (float)square[i] / 255.0f;
        share = share * share;
        v[i] = share * share * square_scale;
    }
}

// the largest as the scale, and of each share's root the whole part after the offset
static inline void narrow(const float *restrict m, const float *restrict v, const float *restrict offset, i64 n,
                          int8_t *mean, float *mean_scale, uint8_t *square, float *square_scale) {
    float most = 0, most_square = 0;
#pragma omp simd reduction(max : most, most_square)
    for (i64 i = 0; i < n; i++) {
        most = fabsf(m[i]) > most ? fabsf(m[i]) : most;
        most_square = v[i] > most_square ? v[i] : most_square;
    }
    float below = most > 1.17549435e-38f ? most : 1.17549435e-38f;
    float below_square = most_square > 1.17549435e-38f ? most_square : 1.17549435e-38f;
#pragma omp simd
    for (i64 i = 0; i < n; i++) {
        float code = floorf(sqrtf(fabsf(m[i]) / below) * 127.0f + offset[i]);
        mean[i] = (int8_t)(m[i] < 0 ? -code : code);
        code = floorf(sqrtf(sqrtf(v[i] / below_square)) * 255.0f + offset[i]);
        square[i] = (uint8_t)(code < 1.0f ? 1.0f : code);
    }
    *mean_scale = most, *square_scale = most_square;
}

// adamw on moments of a byte each, in blocks of CODES with a scale; offset[CODES] in [0, 1) dithers the codes
void adamw_int8(float *restrict master, int8_t *mean, float *mean_scales, uint8_t *square, float *square_scales,
                const float *offset, const void *gradient, int dtype, uint16_t *copy, i64 count, const AdamW *s) {
#pragma omp parallel
    {
        float *g = floats(CODES), *m = floats(CODES), *v = floats(CODES);
#pragma omp for schedule(static)
        for (i64 b = 0; b < (count + CODES - 1) / CODES; b++) {
            i64 first = b * CODES, n = min_(CODES, count - first);
            load_row((const char *)gradient + first * element_size(dtype), dtype, n, g);
            widen(mean + first, mean_scales[b], square + first, square_scales[b], n, m, v);
            move_weights(master + first, m, v, g, n, s);
            narrow(m, v, offset, n, mean + first, mean_scales + b, square + first, square_scales + b);
            if (copy) store_row(copy + first, BF16, n, master + first);
        }
        free(g), free(m), free(v);
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
