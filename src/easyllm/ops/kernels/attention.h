// Attention over packed sequences: declarations shared by its two kernels.
//
// Terms
//   T, H, K, d   packed tokens, query heads, KV heads, head dimension (a multiple of 16)
//   lse          log-sum-exp of a query's scores, saved for the backward pass
//   starts       cu_seqlens: sequence s is tokens starts[s] to starts[s + 1] (exclusive)
//   window       sliding window: number of most recent keys that a query sees
//   AMX          the matrix unit of some x86 processors; see tiles.h
//
// Data layout: q and out are [T][H][d], k and v [T][K][d] with strides between tokens, lse [T][H].
#pragma once
#include "cpu.h"

typedef struct {
    i64 heads, kv_heads, dim;
    i64 q_stride, k_stride, v_stride;  // elements from token to token
    int dtype;
    float scale;
    int causal;
    i64 window;  // 0: none
} Shape;

// Arguments of the backward pass. All tensors have the dtype of the shape, except lse.
typedef struct {
    const void *grad, *out;  // [T][H][d]: gradient of the output, and the output
    const void *q, *k, *v;   // as in the forward pass
    const float *lse;        // [T][H]
    void *grad_q;            // result, [T][H][d]
    void *grad_k, *grad_v;   // results, [T][K][d]
    const i64 *starts;       // [num_sequences + 1]
    i64 num_sequences;
} AttentionBackward;

// attention_tiles.c: the same for bf16 on AMX
void tiled_attention_forward(const uint16_t *q, const uint16_t *k, const uint16_t *v, uint16_t *out,
                             float *lse, const i64 *starts, i64 num_sequences, const Shape *s);
void tiled_attention_backward(const AttentionBackward *args, const Shape *s);
