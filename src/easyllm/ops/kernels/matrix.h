// Weight matrices in fp32, bf16, int8 or int4, and their products with a few activation rows.
//
// Terms
//   N, K    outputs and inputs of a weight matrix
//   code    the integer that represents a quantized value
//   group   32 consecutive inputs, which share a scale
//   block   8 consecutive outputs
//   chunk   4 consecutive inputs of all 8 outputs of a block: 32 bytes, one vector register
//   panel   the outputs computed by one call: one block, or AMX_PANEL_BLOCKS blocks on AMX
//   lane    one element of a vector register; lane r accumulates output r of a block
//   VNNI    instructions that multiply the 4 bytes of each 32-bit lane and add the 4 products to it
//   AMX     the matrix unit of some x86 processors, which multiplies tiles; see tiles.h
//
// Data layout: fp32 and bf16 weights are [N][K]. Quantized weights are stored in blocks of 8
// outputs x 32 inputs, VNNI-interleaved: byte 4 r + i of chunk c is the code of output r and input
// 4 c + i. Inputs are padded with zeros to a multiple of 32, outputs to a multiple of 8.
//
//   int8   [N/8][K/32][256]    8 chunks;  w = scales[n] code  (per-channel)
//   int4   [N/8][K/32][160]    4 vectors, of which vector v has chunk v in its low and chunk v + 4
//                              in its high nibbles, then 8 scales s and 8 offsets c in fp16;
//                              w = s (code - 8) + c  (per group)
//   grouped  see grouped.c: 2, 3, 4, 5 or 8 bits, with a scale for one or more groups; and super.c:
//            4, 5 or 6 bits, with scales that are themselves quantized
//
// An activation row is quantized to int8 group by group, x = u q with u = max|x| / 127, so that dot
// products of codes are exact integers:
//
//   sum_k w x  =  sum_groups  s u (sum_k code q - 8 sum_k q)  +  c sum_k x
//
// The last sum is over x itself, not over its codes.
#pragma once
#include "codes.h"

#define AMX_TILE_ROWS 16               // rows of an AMX tile
#define AMX_PANEL_BLOCKS 2             // blocks of outputs in a panel on AMX
#define TERMS 3                        // floats per group of a row: u, -8 u sum q, sum x
#define ROWS_PER_REGISTER (LANES / 8)  // rows that share a register, with eight values each

typedef struct {
    const void *data;
    const float *scales;  // int8: [N], padded like the outputs
    const float *bias;    // [N] or NULL
    i64 outputs, inputs;
    int format;  // FP32, BF16, INT8, INT4, GROUPED
    // GROUPED only
    int bits;        // of a code
    int scale_type;  // FP16 or BF16
    int shift;       // SHIFT_NONE ...
    i64 span;        // groups that share a scale
} Matrix;

enum {
    SHIFT_NONE = 0,
    SHIFT_ZEROS = 1,
    SHIFT_MINIMA = 2,
    SHIFT_SUPER_MINIMA = 3,
    SHIFT_SUPER_SCALES = 4
};

// Activation rows in the form that linear_panel expects: values for fp32 and bf16 weights, also
// packed if there are several rows; codes and terms for int8 and int4 weights. A tile of 16 rows is
// always read completely, so codes and terms are allocated for a multiple of 16 rows; the contents
// of the padding do not matter.
typedef struct {
    float *values;   // [rows][inputs]
    float *packed;   // [rows / TOGETHER][inputs / 8][TOGETHER][8]: equal to values if TOGETHER is 1
    int8_t *codes;   // [padded_rows(rows)][groups * 32]
    float *terms;    // [padded_rows(rows)][groups][3]
    i64 inputs, groups;
} Rows;

static inline i64 groups_of(i64 inputs) { return (inputs + GROUP - 1) / GROUP; }
static inline i64 blocks_of(const Matrix *w) { return (w->outputs + OUTPUTS - 1) / OUTPUTS; }
static inline i64 padded_rows(i64 rows) {
    return (rows + AMX_TILE_ROWS - 1) / AMX_TILE_ROWS * AMX_TILE_ROWS;
}
static inline i64 packed_size(i64 rows, i64 inputs) {
    return (rows + 1) / ROWS_PER_REGISTER * ROWS_PER_REGISTER * inputs;
}
static inline int is_quantized(const Matrix *w) { return w->format >= INT8; }

// Loads row `row` of a matrix other than int4 to x[inputs]: an embedding lookup.
void matrix_row(const Matrix *w, i64 row, float *x);

// Quantizes one group of a row: computes its codes and terms.
void quantize_group(const float *x, int8_t *codes, float *terms);

// Quantizes x[inputs] as row `row`.
void quantize_row(const Rows *rows, i64 row, const float *x);

// dense.c: packs values[from .. from + count) of row `row` of num_rows. `from` and `count` must be
// multiples of 8, except at the end of a row.
void pack_values(const Rows *rows, i64 row, i64 num_rows, i64 from, i64 count);

// sum[m] = products of the rows, m < num_rows, with a block of a GROUPED matrix; num_rows is 1 or
// ROW_TILE
void grouped_block(const Matrix *w, i64 block, const int8_t *codes, const float *terms,
                   int num_rows, lane8 *sum);

// super.c: the same for SHIFT_SUPER_MINIMA and SHIFT_SUPER_SCALES
void super_block(const Matrix *w, i64 block, const int8_t *codes, const float *terms, int num_rows,
                 lane8 *sum);

// Loads row `row` of a GROUPED matrix to x[inputs], rounded like PyTorch's separate operations.
void grouped_row(const Matrix *w, i64 row, float *x);
void super_row(const Matrix *w, i64 row, float *x);

// out[m][0 .. OUTPUTS) = products of the rows with a block of an fp32 or bf16 matrix, plus bias
void dense_block(const Matrix *w, i64 block, const Rows *rows, i64 num_rows, float *out,
                 i64 out_stride);

// out[0 .. OUTPUTS) = products of one row with a block of an fp32 or bf16 matrix without a bias, of
// the same bits; for small matrices: nothing is prefetched
void dense_row(const Matrix *w, i64 block, const float *x, float *out);

// Outputs are computed panel by panel: one block for few rows, several for many.
i64 panel_outputs(i64 num_rows);
static inline i64 panels_of(const Matrix *w, i64 num_rows) {
    return (w->outputs + panel_outputs(num_rows) - 1) / panel_outputs(num_rows);
}

// out[m][0 .. outputs of a panel) = products of the rows with a panel, plus bias, for m < num_rows;
// out_stride: floats from row to row of out
void linear_panel(const Matrix *w, i64 panel, const Rows *rows, i64 num_rows, float *out,
                  i64 out_stride);

// Must be called before and after a thread's calls of linear_panel: they configure and release the
// thread's AMX tiles if these are used.
void begin_panels(i64 num_rows);
void end_panels(i64 num_rows);

// tiles.c: whether AMX is available and permitted; configure and release a thread's tiles; compute
// a panel of AMX_PANEL_BLOCKS blocks.
int tiles_ready(void);
void configure_quantized_tiles(void);
void release_tiles(void);
void tile_panel(const Matrix *w, i64 panel, const Rows *rows, i64 num_rows, float *out,
                i64 out_stride);
