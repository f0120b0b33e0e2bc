// Low-rank updates of matrices, as LoRA makes them: y += scale * B (A x).
//
// Terms
//   rank    rows of A and columns of B
//   inner   A x, [rank] values of a row
//   block   8 consecutive outputs, as in matrix.h
//   rounds  activations are bf16: results are rounded to bf16 where PyTorch stores them
//
// Data layout: A is [rank][inputs] and B [outputs][rank], both in fp32 or bf16.
//
// The order of sums is fixed: A x as in dense.c, B inner in ascending order of the rank. A row's
// result is bitwise independent of the other rows.
#pragma once
#include "matrix.h"
#include "rows.h"

// No outputs: the update leaves the matrix unchanged.
typedef struct {
    Matrix down, up;  // A, B
    float scale;
} Update;

// inner[0 .. OUTPUTS) = block of A x
ONE_COPY void low_rank_down(const Update *u, i64 block, const float *x, int rounds, float *inner);

// y[i][0 .. OUTPUTS) += scale * block of B inner[i], for i < count
ONE_COPY void low_rank_up(const Update *u, i64 block, i64 count, const float *const *inner,
                          int rounds, float *const *y);
