// Operations on one row; see rows.h. Built without FMA.
//
// Terms
//   lane     one of the eight partial sums of a row: lane i sums elements j with j % 8 = i
//   strand   one of several registers of lanes, whose additions do not wait for each other
//
// Data layout: a row is contiguous, in fp32.
#include "rows.h"

#define STRANDS 4

// Sum of strands and lanes, in a fixed order.
static inline float strand_sum(const lane8 s[STRANDS]) {
    return lane_sum((s[0] + s[1]) + (s[2] + s[3]));
}

float rms_norm_row(const float *x, const float *w, i64 width, float eps, float *y) {
    lane8 squares[STRANDS] = {{0}};
    i64 i = 0;
    for (; i + 8 * STRANDS <= width; i += 8 * STRANDS)
        for (int s = 0; s < STRANDS; s++) {
            lane8 v = *(const lane8 *)(x + i + 8 * s);
            squares[s] += v * v;
        }
    for (; i + 8 <= width; i += 8)
        squares[0] += *(const lane8 *)(x + i) * *(const lane8 *)(x + i);
    float sum = strand_sum(squares);
    for (; i < width; i++) sum += x[i] * x[i];
    float inverse = 1.0f / sqrtf(sum / width + eps);
#pragma omp simd
    for (i64 j = 0; j < width; j++) y[j] = x[j] * inverse * w[j];
    return inverse;
}

void rotate_head_pairs(const float *x, const float *cosine, const float *sine, i64 pairs,
                       float sign, float *y) {
#pragma omp simd
    for (i64 i = 0; i < pairs; i++) {
        float first = x[i], second = x[pairs + i];
        y[i] = first * cosine[i] - sign * second * sine[i];
        y[pairs + i] = second * cosine[i] + sign * first * sine[i];
    }
}

void silu_gate_values(const float *gate, const float *up, i64 count, float *out) {
#pragma omp simd
    for (i64 i = 0; i < count; i++) out[i] = gate[i] * sigmoid_(gate[i]) * up[i];
}

void round_to_bf16(float *x, i64 count) {
#pragma omp simd
    for (i64 i = 0; i < count; i++) x[i] = rounded(x[i]);
}

float logsumexp_row(const float *x, i64 width) {
    float top = -INFINITY;
    int has_nan = 0;
#pragma omp simd reduction(max : top) reduction(| : has_nan)
    for (i64 i = 0; i < width; i++) {
        has_nan |= x[i] != x[i];
        top = x[i] > top ? x[i] : top;
    }
    if (has_nan) return NAN;
    if (!__builtin_isfinite(top)) return top;  // all excluded, or an infinite logit
    lane8 sums[STRANDS] = {{0}};
    float rest = 0;
    i64 i = 0;
    for (; i + 8 * STRANDS <= width; i += 8 * STRANDS) {
        float terms[8 * STRANDS];
#pragma omp simd
        for (int j = 0; j < 8 * STRANDS; j++) terms[j] = exp_(x[i + j] - top);
        for (int s = 0; s < STRANDS; s++) sums[s] += *(const lane8 *)(terms + 8 * s);
    }
    for (; i < width; i++) rest += exp_(x[i] - top);
    return top + logf(strand_sum(sums) + rest);
}
