// Products with quantized weight matrices, the dispatch to dense.c and tiles.c, and a linear layer
// whose sums have one order.
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

#define CODE_ROWS 128         // rows of a tile whose codes stay in the L2 cache
#define VALUE_BYTES 262144    // the same for values: bytes of a tile
#define PREPARED_ROWS 1536    // rows that are prepared at a time, in whole tiles
#define OUT_FLOATS (1 << 22)  // most results that are converted at a time
#define TASK_OUTPUTS 32       // outputs of a task, one or more panels

// Activation rows that are prepared at a time, and their results if they are converted.
typedef struct {
    Rows rows;
    float *values, *out;  // allocated unless x, or y, is fp32
    i64 count;
} Prepared;

// Rows that a task multiplies; even, for rows that share registers in pairs.
static i64 tile_rows(const Matrix *w) {
    if (is_quantized(w)) return CODE_ROWS;
    i64 fitting = VALUE_BYTES / (i64)sizeof(float) / max_(1, w->inputs);
    return fitting < 48 ? 48 : fitting > 96 ? 96 : fitting / 6 * 6;  // whole groups of registers
}

static Prepared open_rows(const Matrix *w, int dtype, i64 rows) {
    i64 groups = groups_of(w->inputs), workspace = padded_rows(max_(1, rows)) * groups;
    Prepared p = {.rows = {.inputs = w->inputs, .groups = groups}};
    if (is_quantized(w)) {
        p.rows.codes = malloc(workspace * GROUP);
        p.rows.terms = malloc(workspace * TERMS * sizeof(float));
    } else if (ROWS_PER_REGISTER > 1) {
        p.rows.packed = malloc(packed_size(rows, w->inputs) * sizeof(float));
    }
    if (dtype == FP32) return p;
    if (!is_quantized(w)) p.values = malloc(rows * w->inputs * sizeof(float));
    p.out = malloc(rows * w->outputs * sizeof(float));
    return p;
}

static void close_rows(Prepared p) {
    free(p.rows.codes), free(p.rows.terms), free(p.values), free(p.out);
    if (ROWS_PER_REGISTER > 1) free(p.rows.packed);
}

// Prepares row m for its products; `row` is scratch memory for its values.
static void prepare_row(const Matrix *w, const Prepared *p, const char *x, int dtype, i64 m,
                        float *row) {
    const char *from = x + m * w->inputs * element_size(dtype);
    if (is_quantized(w)) {
        load_row(from, dtype, w->inputs, row);
        quantize_row(&p->rows, m, row);
        return;
    }
    if (dtype != FP32) load_row(from, dtype, w->inputs, p->values + m * w->inputs);
    pack_values(&p->rows, m, p->count, 0, w->inputs);
}

// The rows from `first` on, a multiple of the rows of a tile.
static Rows rows_from(const Prepared *p, i64 first) {
    Rows r = p->rows;
    if (r.codes) r.codes += first * r.groups * GROUP, r.terms += first * r.groups * TERMS;
    if (r.values) r.values += first * r.inputs;
    if (r.packed) r.packed += first * (ROWS_PER_REGISTER == 1 ? r.inputs : r.inputs / 8 * 8);
    return r;
}

// Products of one tile of rows with TASK_OUTPUTS outputs; tasks of a tile are consecutive.
static void run_task(const Matrix *w, const Prepared *p, i64 task, float *to) {
    i64 parts = (w->outputs + TASK_OUTPUTS - 1) / TASK_OUTPUTS, most = tile_rows(w);
    i64 first = task / parts * most, count = min_(most, p->count - first);
    const Rows rows = rows_from(p, first);
    i64 width = panel_outputs(count), from = task % parts * TASK_OUTPUTS;
    for (i64 at = from; at < min_(w->outputs, from + TASK_OUTPUTS); at += width)
        linear_panel(w, at / width, &rows, count, to + first * w->outputs + at, w->outputs);
}

// y[rows][outputs] = x[rows][inputs] W^T + bias; x and y have `dtype`. A row's result is bitwise
// independent of the other rows and of the number of threads.
void matrix_linear(const void *x, void *y, int dtype, i64 rows, const Matrix *w) {
    i64 size = element_size(dtype), tile = tile_rows(w), most = PREPARED_ROWS / tile * tile;
    if (dtype != FP32) most = max_(tile, min_(most, OUT_FLOATS / w->outputs / tile * tile));
    Prepared p = open_rows(w, dtype, min_(rows, most));
    for (i64 begin = 0; begin < rows; begin += most) {
        p.count = min_(most, rows - begin);
        const char *from = (const char *)x + begin * w->inputs * size;
        float *to = dtype == FP32 ? (float *)y + begin * w->outputs : p.out;
        p.rows.values = dtype == FP32 ? (float *)from : p.values;
        if (ROWS_PER_REGISTER == 1) p.rows.packed = p.rows.values;
        i64 tiles = (p.count + tile - 1) / tile;
        i64 tasks = tiles * ((w->outputs + TASK_OUTPUTS - 1) / TASK_OUTPUTS);
#pragma omp parallel
        {
            float *row = floats(w->inputs);
#pragma omp for schedule(static)
            for (i64 m = 0; m < p.count; m++) prepare_row(w, &p, from, dtype, m, row);
            free(row);
            begin_panels(p.count);
#pragma omp for schedule(dynamic, 1)
            for (i64 task = 0; task < tasks; task++) run_task(w, &p, task, to);
            end_panels(p.count);
            if (dtype != FP32) {
#pragma omp for schedule(static)
                for (i64 m = 0; m < p.count; m++)
                    store_row((char *)y + (begin + m) * w->outputs * size, dtype, w->outputs,
                              p.out + m * w->outputs);
            }
        }
    }
    close_rows(p);
}
