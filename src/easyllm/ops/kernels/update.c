// The optimizer's passes over all weights: AdamW, from the unscaled gradient to the bf16 copy in
// one pass, and the sum of squares of gradients (for clipping).
//
// Terms
//   master         fp32 weights, which are updated; `copy` is their bf16 copy for the model
//   mean, square   first and second moment of the gradient (m and v)
//   code           a moment quantized to 8 bits; CODES of them share a scale
//   dither         an offset in [0, 1) added before truncation, which makes rounding unbiased
//   FMA            fused multiply-add, rounded once
//
// Data layout: all arrays are flat, with one element per weight; gradients are fp32 or bf16.
//
// Built with -ffp-contract=off: the compiler forms no FMA, and fmaf is called where one is wanted.
#include "cpu.h"

#define BLOCK 4096  // elements that a thread processes at a time

typedef struct {
    float scale;           // of the gradient
    float rescale;         // 1 - rate * decay
    float beta1_rest;      // 1 - beta1
    float beta2, beta2_rest;
    float correction;      // sqrt(1 - beta2^t)
    float eps, step_size;  // rate / (1 - beta1^t)
} AdamW;

// Updates one weight and returns sqrt(v):
//   theta <- rescale theta;  m <- m + (1 - beta1)(g - m);  v <- beta2 v + (1 - beta2) g^2;
//   theta <- theta - step_size m / (sqrt(v) / correction + eps)
// Rounding is the same as in PyTorch's kernel.
static inline float move_weight(float *w, float *m, float *v, float g, const AdamW *s) {
    float x = g * s->scale;
    *m = __builtin_fmaf(s->beta1_rest, x - *m, *m);
    *v = __builtin_fmaf(s->beta2_rest * x, x, *v * s->beta2);
    float root = sqrtf(*v), below = root / s->correction + s->eps;
    *w = *w * s->rescale + -s->step_size * *m / below;
    return root;
}

// AdamW step with fp32 moments; `copy` is NULL or receives the new weights in bf16.
void adamw(float *restrict master, float *restrict mean, float *restrict square,
           const void *gradient, int dtype, uint16_t *copy, i64 count, const AdamW *s) {
#pragma omp parallel
    {
        float *g = floats(BLOCK);
#pragma omp for schedule(static)
        for (i64 first = 0; first < count; first += BLOCK) {
            i64 n = min_(BLOCK, count - first);
            load_row((const char *)gradient + first * element_size(dtype), dtype, n, g);
            float *restrict w = master + first, *restrict m = mean + first;
            float *restrict v = square + first;
#pragma omp simd
            for (i64 i = 0; i < n; i++) move_weight(w + i, m + i, v + i, g[i], s);
            if (copy) store_row(copy + first, BF16, n, w);
        }
        free(g);
    }
}

#define CODES 256  // codes that share a scale

#define MAX_MEAN 127.0f
#define MAX_SQUARE 255.0f
#define SMALLEST 1.17549435e-38f

// Arguments of adamw_int8, in addition to the scalars. Moments are updated in place.
typedef struct {
    float *master;                       // [count], updated in place
    int8_t *mean;                        // codes of the first moment, [count]
    uint8_t *square;                     // codes of the second moment, [count]
    float *mean_scales, *square_scales;  // [blocks of CODES weights]
    const float *offset;                 // dither in [0, 1), [CODES]
    const void *gradient;                // [count]
    uint16_t *copy;                      // NULL, or receives the new weights in bf16, [count]
    i64 count;
    int dtype;  // of the gradient
} AdamWInt8;

// Updates block b of `n` weights, for the gradient g. The moments m = scale (q / 127) |q / 127| and
// v = scale (q / 255)^4 are dequantized and updated with the weights. The new codes are the square
// root of m and the fourth root of v, relative to the largest in the block, plus the dither offset,
// truncated. roots[CODES] and moved[CODES] are workspace.
static inline void move_block(const AdamWInt8 *args, i64 b, i64 n, const float *restrict g,
                              const AdamW *s, float *restrict roots, float *restrict moved) {
    float *restrict w = args->master + b * CODES;
    int8_t *restrict mean = args->mean + b * CODES;
    uint8_t *restrict square = args->square + b * CODES;
    const float *restrict offset = args->offset;
    const float mean_unit = args->mean_scales[b] * (float)(1.0 / (127.0 * 127.0));
    const float square_unit =
        args->square_scales[b] * (float)(1.0 / (255.0 * 255.0 * 255.0 * 255.0));
    float maximum = 0, most_square = 0;
#pragma omp simd reduction(max : maximum, most_square)
    for (i64 i = 0; i < n; i++) {
        float q = mean[i], p = (float)square[i] * (float)square[i];
        float m = q * fabsf(q) * mean_unit, v = p * p * square_unit;
        roots[i] = move_weight(w + i, &m, &v, g[i], s);
        moved[i] = m;
        maximum = fabsf(m) > maximum ? fabsf(m) : maximum;
        most_square = v > most_square ? v : most_square;
    }
    const float per_root = MAX_MEAN / sqrtf(maximum > SMALLEST ? maximum : SMALLEST);
    const float per_square_root =
        MAX_SQUARE / sqrtf(sqrtf(most_square > SMALLEST ? most_square : SMALLEST));
#pragma omp simd
    for (i64 i = 0; i < n; i++) {
        float code = floorf(sqrtf(fabsf(moved[i])) * per_root + offset[i]);
        code = code > MAX_MEAN ? MAX_MEAN : code;
        mean[i] = (int8_t)(moved[i] < 0 ? -code : code);
        code = floorf(sqrtf(roots[i]) * per_square_root + offset[i]);
        square[i] = (uint8_t)(code < 1.0f ? 1.0f : code > MAX_SQUARE ? MAX_SQUARE : code);
    }
    args->mean_scales[b] = maximum, args->square_scales[b] = most_square;
}

// AdamW step with 8-bit moments in blocks of CODES, which share a scale.
void adamw_int8(const AdamWInt8 *args, const AdamW *s) {
    const i64 count = args->count;
    const int dtype = args->dtype;
#pragma omp parallel
    {
        float *g = floats(CODES), *roots = floats(CODES), *moved = floats(CODES);
#pragma omp for schedule(static)
        for (i64 b = 0; b < (count + CODES - 1) / CODES; b++) {
            i64 first = b * CODES, n = min_(CODES, count - first);
            load_row((const char *)args->gradient + first * element_size(dtype), dtype, n, g);
            move_block(args, b, n, g, s, roots, moved);
            if (args->copy) store_row(args->copy + first, BF16, n, args->master + first);
        }
        free(g), free(roots), free(moved);
    }
}

// Sum of squares: fp32 within blocks, then double over the blocks in order, so the result does not
// depend on the number of threads.
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
