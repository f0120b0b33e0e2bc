// Products with quantized weight matrices, the dispatch to dense.c and tiles.c, and the quantized
// linear layer.
//
// Terms and data layout are those of matrix.h: block, group, chunk, panel, code, terms, VNNI, lane.
#include "matrix.h"

// ---- blocks; callers pass a constant for `rows`, so that the sums stay in registers

// Weights are stored in the order in which they are read, across blocks and matrices, but the
// hardware prefetcher does not run far enough ahead and stops at page boundaries.
#define AHEAD 4096  // bytes

ALWAYS_INLINE void int4_block(const uint8_t *w, i64 groups, const int8_t *codes,
                              const float *terms, int rows, lane8 *sum) {
    for (i64 g = 0; g < groups; g++, w += 160) {
        fetch(w + AHEAD, 160);
        chunk unpacked[8];
        for (int v = 0; v < 4; v++) {
            chunk both = *(const chunk *)(w + 32 * v);
            unpacked[v] = both & 15;
            unpacked[v + 4] = both >> 4;
        }
        lane8 scale = halves_to_floats(w + 128), offset = halves_to_floats(w + 144);
        for (int m = 0; m < rows; m++) {
            const float *t = terms + (m * groups + g) * TERMS;
            index8 products = products_int4(unpacked, codes + (m * groups + g) * GROUP);
            sum[m] += scale * (__builtin_convertvector(products, lane8) * t[0] + t[1]);
            sum[m] += offset * t[2];
        }
    }
}

ALWAYS_INLINE void int8_block(const int8_t *w, i64 groups, const int8_t *codes,
                              const float *terms, int rows, lane8 *sum) {
    for (i64 g = 0; g < groups; g++, w += 256) {
        fetch(w + AHEAD, 256);
        index8 products[ROW_TILE];
        products_int8((const chunk *)w, codes + g * GROUP, groups * GROUP, rows, products);
        for (int m = 0; m < rows; m++)
            sum[m] += __builtin_convertvector(products[m], lane8) *
                      terms[(m * groups + g) * TERMS];
    }
}

// ---- functions declared in matrix.h

void quantize_group(const float *x, int8_t *codes, float *terms) {
    const lane8 *values = (const lane8 *)x, rounding = (lane8){0} + 0x1.8p23f;
    lane8 sum = values[0] + values[1] + (values[2] + values[3]);
    index8 sizes = {0}, total = {0}, rounded[GROUP / 8];
    // Compared as integers, the bits of positive floats keep their order, and NaN is the largest.
    for (int v = 0; v < GROUP / 8; v++) {
        index8 size = (index8)values[v] & 0x7fffffff, larger = size > sizes;
        sizes = (size & larger) | (sizes & ~larger);
    }
    int32_t maximum = 0;
    for (int i = 0; i < 8; i++) maximum = sizes[i] > maximum ? sizes[i] : maximum;
    float top;
    memcpy(&top, &maximum, sizeof(top));
    // a group of zeros, or so small that 127 / top overflows, has codes of 0
    float inverse = 127.0f / top;
    if (!__builtin_isfinite(inverse)) inverse = 0.0f;
    // Adding 1.5 * 2^23 rounds to the nearest integer, which is then in the last bits of the float.
    for (int v = 0; v < GROUP / 8; v++) {
        rounded[v] = (index8)(values[v] * inverse + rounding) - (index8)rounding;
        total += rounded[v];
    }
    store_codes(rounded, codes);
    terms[0] = top / 127.0f;
    terms[1] = -8.0f * lane_sum(__builtin_convertvector(total, lane8)) * terms[0];
    terms[2] = lane_sum(sum);
}

void quantize_row(const Rows *rows, i64 row, const float *x) {
    int8_t *codes = rows->codes + row * rows->groups * GROUP;
    float *terms = rows->terms + row * rows->groups * TERMS;
    i64 whole = rows->inputs / GROUP;
    for (i64 g = 0; g < whole; g++)
        quantize_group(x + g * GROUP, codes + g * GROUP, terms + g * TERMS);
    if (whole == rows->groups) return;
    float filled[GROUP] = {0};
    memcpy(filled, x + whole * GROUP, (rows->inputs - whole * GROUP) * sizeof(float));
    quantize_group(filled, codes + whole * GROUP, terms + whole * TERMS);
}

void matrix_row(const Matrix *w, i64 row, float *x) {
    if (w->format == GROUPED) {
        grouped_row(w, row, x);
        return;
    }
    if (w->format != INT8) {
        load_row((const char *)w->data + row * w->inputs * element_size(w->format), w->format,
                 w->inputs, x);
        return;
    }
    const int8_t *codes = (const int8_t *)w->data + row / OUTPUTS * groups_of(w->inputs) * 256 +
                          row % OUTPUTS * 4;
    for (i64 i = 0; i < w->inputs; i++) x[i] = codes[i / 4 * 32 + i % 4] * w->scales[row];
}

// out[m][0 .. OUTPUTS) = products of the rows with one block, plus bias
static void linear_block(const Matrix *w, i64 block, const Rows *x, i64 num_rows, float *out,
                         i64 out_stride) {
    if (!is_quantized(w)) {
        dense_block(w, block, x, num_rows, out, out_stride);
        return;
    }
    i64 groups = x->groups, width = min_(OUTPUTS, w->outputs - block * OUTPUTS), m = 0;
    const int8_t *codes = x->codes;
    const float *terms = x->terms;
    while (m < num_rows) {
        lane8 sum[ROW_TILE] = {{0}};
        int tile = num_rows - m >= ROW_TILE ? ROW_TILE : 1;
        if (w->format == GROUPED) {
            lane8 apart[ROW_TILE];  // in memory, which must not happen to `sum`
            grouped_block(w, block, codes, terms, tile, apart);
            for (int i = 0; i < tile; i++) sum[i] = apart[i];
        } else if (w->format == INT4) {
            const uint8_t *data = (const uint8_t *)w->data + block * groups * 160;
            if (tile == 1) int4_block(data, groups, codes, terms, 1, sum);
            else int4_block(data, groups, codes, terms, ROW_TILE, sum);
        } else {
            const int8_t *data = (const int8_t *)w->data + block * groups * 256;
            if (tile == 1) int8_block(data, groups, codes, terms, 1, sum);
            else int8_block(data, groups, codes, terms, ROW_TILE, sum);
            for (int i = 0; i < tile; i++) sum[i] *= *(const lane8 *)(w->scales + block * OUTPUTS);
        }
        for (int i = 0; i < tile; i++) {
            float *to = out + (m + i) * out_stride;
            for (i64 j = 0; w->bias && j < width; j++) sum[i][j] += w->bias[block * OUTPUTS + j];
            if (width == OUTPUTS) *(lane8 *)to = sum[i];
            else memcpy(to, &sum[i], width * sizeof(float));
        }
        m += tile, codes += tile * groups * GROUP, terms += tile * groups * TERMS;
    }
}

// Whether AMX is used: for few rows it gains nothing.
static int takes_tiles(i64 num_rows) { return num_rows > ROW_TILE && tiles_ready(); }

i64 panel_outputs(i64 num_rows) {
    return takes_tiles(num_rows) ? AMX_PANEL_BLOCKS * OUTPUTS : OUTPUTS;
}

void begin_panels(i64 num_rows) {
    if (takes_tiles(num_rows)) configure_quantized_tiles();
}

void end_panels(i64 num_rows) {
    if (takes_tiles(num_rows)) release_tiles();
}

void linear_panel(const Matrix *w, i64 panel, const Rows *x, i64 num_rows, float *out,
                  i64 out_stride) {
    if (is_quantized(w) && w->format != GROUPED && takes_tiles(num_rows)) {
        tile_panel(w, panel, x, num_rows, out, out_stride);
        return;
    }
    i64 blocks = panel_outputs(num_rows) / OUTPUTS, first = panel * blocks;
    for (i64 block = first; block < min_(blocks_of(w), first + blocks); block++, out += OUTPUTS)
        linear_block(w, block, x, num_rows, out, out_stride);
}

#define ROW_CHUNK 128

// y[rows][outputs] = x[rows][inputs] W^T + bias; x and y have `dtype`
void quantized_linear(const void *x, void *y, int dtype, i64 rows, const Matrix *w) {
    i64 groups = groups_of(w->inputs), chunk_rows = min_(rows, ROW_CHUNK);
    i64 size = element_size(dtype);
    i64 workspace = padded_rows(max_(1, chunk_rows)) * groups;
    Rows q = {NULL,
              NULL,
              malloc(workspace * GROUP),
              malloc(workspace * TERMS * sizeof(float)),
              w->inputs,
              groups};
    float *out = dtype == FP32 ? NULL : malloc(chunk_rows * w->outputs * sizeof(float));
    for (i64 begin = 0; begin < rows; begin += ROW_CHUNK) {
        i64 count = min_(ROW_CHUNK, rows - begin);
        float *to = dtype == FP32 ? (float *)y + begin * w->outputs : out;
#pragma omp parallel
        {
            float *row = floats(w->inputs);
#pragma omp for schedule(static)
            for (i64 m = 0; m < count; m++) {
                load_row((const char *)x + (begin + m) * w->inputs * size, dtype, w->inputs, row);
                quantize_row(&q, m, row);
            }
            free(row);
            begin_panels(count);
#pragma omp for schedule(static)
            for (i64 panel = 0; panel < panels_of(w, count); panel++)
                linear_panel(w, panel, &q, count, to + panel * panel_outputs(count), w->outputs);
            end_panels(count);
            if (dtype != FP32) {
#pragma omp for schedule(static)
                for (i64 m = 0; m < count; m++)
                    store_row((char *)y + (begin + m) * w->outputs * size, dtype, w->outputs,
                              out + m * w->outputs);
            }
        }
    }
    free(q.codes), free(q.terms), free(out);
}
