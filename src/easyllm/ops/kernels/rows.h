// Operations on one row that training, prefill and the compiled decoding step share.
//
// Terms
//   row   consecutive fp32 values: the features of a token, a head, or logits
//   FMA   fused multiply-add, which rounds once
//
// Data layout: rows are contiguous.
//
// Deterministic mode needs the same bits from all of them, so each operation is one function of
// rows.c: a copy inlined elsewhere could be compiled to other instructions. rows.c is built without
// FMA, so an element does not depend on whether a loop is vectorized, and RoPE and the scaled sum
// round like PyTorch's separate operations.
#pragma once
#include "cpu.h"

// y = x / r * w with r = sqrt(mean(x^2) + eps); returns 1 / r
ONE_COPY float rms_norm_row(const float *x, const float *w, i64 width, float eps, float *y);

// RoPE of one head: rotates each pair (x_i, x_{pairs+i}) to y; y may be x. sign: 1, or -1 for the
// inverse rotation
ONE_COPY void rotate_head_pairs(const float *x, const float *cosine, const float *sine, i64 pairs,
                                float sign, float *y);

// out = silu(gate) * up; out may be gate or up
ONE_COPY void silu_gate_values(const float *gate, const float *up, i64 count, float *out);

// Rounds values to bf16 and back.
ONE_COPY void round_to_bf16(float *x, i64 count);

// log(sum(exp(x))): the sum of eight lanes, each in ascending order
ONE_COPY float logsumexp_row(const float *x, i64 width);
