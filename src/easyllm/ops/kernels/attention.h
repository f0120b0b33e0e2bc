// Attention over packed sequences: what its two kernels share.
//
// Shapes: q, out [T][H][d], k, v [T][K][d]; sequence s is rows starts[s] to starts[s+1]; lse [T][H]. d is a multiple of 16.
#pragma once
#include "cpu.h"

typedef struct {
    i64 heads, kv_heads, dim;
    i64 q_stride, k_stride, v_stride;  // elements from row to row
    int dtype;
    float scale;
    int causal;
    i64 window;  // 0: none
} Shape;

// attention_tiles.c: the same for bf16, where the processor has a matrix unit
void tiled_attention_forward(const uint16_t *q, const uint16_t *k, const uint16_t *v, uint16_t *out, float *lse,
                             const i64 *starts, i64 num_sequences, const Shape *s);
void tiled_attention_backward(const uint16_t *grad, const uint16_t *q, const uint16_t *k, const uint16_t *v,
                              const uint16_t *out, const float *lse, uint16_t *grad_q, uint16_t *grad_k, uint16_t *grad_v,
                              const i64 *starts, i64 num_sequences, const Shape *s);
