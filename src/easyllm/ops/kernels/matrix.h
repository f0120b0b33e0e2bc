// Products of a few rows with a weight matrix that is fp32, bf16, int8 or int4.
//
// Quantized weights lie in blocks of 8 outputs x 32 inputs, chunks of 4 inputs at a time, so that lane r of a vector
// serves output r: byte 4 r + i of chunk c is the code of output r and input 4 c + i. Inputs are filled up to a
// multiple of 32 with zeros, outputs to a multiple of 8.
//
//   int8   [N/8][K/32][256]    8 chunks;  w = scales[n] code
//   int4   [N/8][K/32][160]    4 vectors, vector v has chunk v in its low and v + 4 in its high nibbles, then 8 steps s and
//                              8 middles c in fp16;  w = s (code - 8) + c
//
// The row they meet is quantized to int8 a group of 32 at a time, x = u q with u = max|x| / 127, so that products are
// whole numbers and exact:
//
//   sum_k w x  =  sum_groups  s u (sum_k code q - 8 sum_k q)  +  c sum_k x        (the last sum is of x itself)
#pragma once
#include "cpu.h"

#define GROUP 32
#define OUTPUTS 8
#define UNIT_ROWS 16  // rows that the processor's matrix unit takes at once, where it has one
#define UNIT_STRIP 2  // blocks of outputs that it takes at once
#define TERMS 3       // of a row's group: u, -8 u sum q, sum x
#define TOGETHER (LANES / 8)  // rows of which a register holds eight values each

typedef struct {
    const void *data;
    const float *scales;  // int8: [N], filled up like the outputs
    const float *bias;    // [N] or NULL
    i64 outputs, inputs;
    int format;  // FP32, BF16, INT8, INT4
} Matrix;

// Rows as linear_strip takes them: values for fp32 and bf16 weights, of several rows packed as well, codes and terms for int8 and
// int4. A tile of rows is read whole, so there is room for a multiple of 16 of codes and terms; what lies in the rest does not matter.
typedef struct {
    float *values;   // [rows][inputs]
    float *packed;   // [rows / TOGETHER][inputs / 8][TOGETHER][8]: the values themselves where TOGETHER is 1
    int8_t *codes;   // [whole_tiles(rows)][groups * 32]
    float *terms;    // [whole_tiles(rows)][groups][3]
    i64 inputs, groups;
} Rows;

static inline i64 groups_of(i64 inputs) { return (inputs + GROUP - 1) / GROUP; }
static inline i64 blocks_of(const Matrix *w) { return (w->outputs + OUTPUTS - 1) / OUTPUTS; }
static inline i64 whole_tiles(i64 rows) { return (rows + UNIT_ROWS - 1) / UNIT_ROWS * UNIT_ROWS; }
static inline i64 packed_size(i64 rows, i64 inputs) { return (rows + 1) / TOGETHER * TOGETHER * inputs; }
static inline int is_quantized(const Matrix *w) { return w->format >= INT8; }

// x[inputs] = row `row` of an fp32, bf16 or int8 matrix: a token's vector
void matrix_row(const Matrix *w, i64 row, float *x);

// codes and terms of one group of a row's values
void quantize_group(const float *x, int8_t *codes, float *terms);

// codes and terms of row `row`, from x[inputs]
void quantize_row(const Rows *rows, i64 row, const float *x);

// dense.c: packs values[from .. from + count) of row `row` of num_rows; both are multiples of 8, but for the end of a row
void pack_values(const Rows *rows, i64 row, i64 num_rows, i64 from, i64 count);

// out[m][0 .. OUTPUTS) = the rows' products with a block of an fp32 or bf16 matrix, bias added
void dense_block(const Matrix *w, i64 block, const Rows *rows, i64 num_rows, float *out, i64 out_stride);

// Outputs are computed by strips: one block for few rows, several for many.
i64 strip_outputs(i64 num_rows);
static inline i64 strips_of(const Matrix *w, i64 num_rows) {
    return (w->outputs + strip_outputs(num_rows) - 1) / strip_outputs(num_rows);
}

// out[m][0 .. outputs of a strip) = the rows' products with it, bias added, for m < num_rows; rows of out are out_stride
// apart
void linear_strip(const Matrix *w, i64 strip, const Rows *rows, i64 num_rows, float *out, i64 out_stride);

// Around a thread's calls of linear_strip, which may use the matrix unit between them.
void begin_strips(i64 num_rows);
void end_strips(i64 num_rows);

// tiles.c: whether there is such a unit and it may be used; a thread's way in and out; a strip of UNIT_STRIP blocks
int tiles_ready(void);
void begin_tiles(void);
void end_tiles(void);
void tile_strip(const Matrix *w, i64 strip, const Rows *rows, i64 num_rows, float *out, i64 out_stride);
