// Low-rank updates. Data layout and order of sums are those of low_rank.h; built without FMA but
// where it is written out (`fused`).
//
// Terms
//   rank, inner, block   as in low_rank.h
//   column   the values of B for one rank and the outputs of a block: one lane8
//   chunk    RANKS consecutive ranks, whose columns are kept in the L1 cache
//   group    rows that share an update
//
// Data layout: as in low_rank.h; columns are [rank][8] in fp32.
#include "low_rank.h"

#define RANKS 32
#define TASK_ROWS 16    // rows that a thread takes

void low_rank_down(const Update *u, i64 block, const float *x, int rounds, float *inner) {
    dense_row(&u->down, block, x, inner);
    if (rounds) round_to_bf16(inner, min_(OUTPUTS, u->down.outputs - block * OUTPUTS));
}

// Transposes 8 x 8 floats.
static inline void transpose(lane8 r[8]) {
    lane8 t[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = SHUFFLE(r[i], r[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        t[i + 1] = SHUFFLE(r[i], r[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            r[i + 2 * j] = SHUFFLE(t[i + j], t[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            r[i + 2 * j + 1] = SHUFFLE(t[i + j], t[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    for (int i = 0; i < 4; i++) {
        t[i] = SHUFFLE(r[i], r[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        t[i + 4] = SHUFFLE(r[i], r[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
    for (int i = 0; i < 8; i++) r[i] = t[i];
}

// columns[0 .. count) = columns [from, from + count) of a block of B; beyond the end of the matrix
// the last output is repeated
static inline void load_columns(const Matrix *w, i64 block, i64 from, i64 count, lane8 *columns) {
    i64 size = element_size(w->format), row = w->inputs * size, first = block * OUTPUTS;
    const char *at = (const char *)w->data + first * row + from * size;
    if (w->format == FP32 && count % 8 == 0 && first + OUTPUTS <= w->outputs) {
        for (i64 r = 0; r < count; r += 8, at += 8 * size) {
            for (int j = 0; j < OUTPUTS; j++) columns[r + j] = *(const lane8 *)(at + j * row);
            transpose(columns + r);
        }
        return;
    }
    for (i64 r = 0; r < count; r += 8, at += 8 * size) {
        lane8 rows[8] = {{0}};
        for (i64 j = 0; j < OUTPUTS; j++)
            load_row(at + min_(j, w->outputs - 1 - first) * row, w->format, min_(8, count - r),
                     (float *)&rows[j]);
        transpose(rows);
        for (i64 i = 0; i < min_(8, count - r); i++) columns[r + i] = rows[i];
    }
}

// sum[i] += columns[r] * inner[i][r] in ascending order of r
#define SUM_ROWS(NAME, ROWS)                                                                    \
    static inline void NAME(const lane8 *columns, i64 ranks, const float *const *inner, i64 at, \
                            lane8 *sum) {                                                       \
        lane8 acc[ROWS];                                                                        \
        const float *x[ROWS];                                                                   \
        for (int i = 0; i < ROWS; i++) acc[i] = sum[i], x[i] = inner[i] + at;                   \
        for (i64 r = 0; r < ranks; r++)                                                         \
            for (int i = 0; i < ROWS; i++)                                                      \
                acc[i] = fused(columns[r], (lane8){0} + x[i][r], acc[i]);                       \
        for (int i = 0; i < ROWS; i++) sum[i] = acc[i];                                         \
    }
SUM_ROWS(sum_4, 4)
SUM_ROWS(sum_2, 2)
SUM_ROWS(sum_1, 1)

// y += scale * delta
static inline void add_scaled(lane8 delta, float scale, i64 width, int rounds, float *y) {
    if (width == OUTPUTS && !rounds) {
        *(lane8 *)y += delta * scale;
        return;
    }
    for (i64 i = 0; i < width; i++) {
        float own = rounds ? rounded(rounded(delta[i]) * scale) : delta[i] * scale;
        y[i] = rounds ? rounded(y[i] + own) : y[i] + own;
    }
}

void low_rank_up(const Update *u, i64 block, i64 count, const float *const *inner, int rounds,
                 float *const *y) {
    const Matrix *w = &u->up;
    i64 rank = w->inputs, width = min_(OUTPUTS, w->outputs - block * OUTPUTS);
    for (i64 first = 0; first < count; first += TASK_ROWS) {
        lane8 columns[RANKS], sums[TASK_ROWS];
        i64 rows = min_(TASK_ROWS, count - first);
        for (i64 i = 0; i < rows; i++) sums[i] = (lane8){0};
        for (i64 at = 0; at < rank; at += RANKS) {
            i64 ranks = min_(RANKS, rank - at), i = 0;
            load_columns(w, block, at, ranks, columns);
            for (; i + 4 <= rows; i += 4) sum_4(columns, ranks, inner + first + i, at, sums + i);
            for (; i + 2 <= rows; i += 2) sum_2(columns, ranks, inner + first + i, at, sums + i);
            for (; i < rows; i++) sum_1(columns, ranks, inner + first + i, at, sums + i);
        }
        for (i64 i = 0; i < rows; i++) add_scaled(sums[i], u->scale, width, rounds, y[first + i]);
    }
}

// Arguments of low_rank_updates. Group g has the rows rows[starts[g] .. starts[g + 1]).
typedef struct {
    const void *x;          // [rows of all groups][inputs]
    void *y;                // [rows of all groups][outputs], changed in place
    const Update *updates;  // one per group
    const i64 *starts, *rows;
    i64 num_groups, inputs, outputs;
    int dtype;              // of x and y
} LowRankUpdates;

// Updates of some rows of one group. scratch: values of x and y in fp32, and inner, of TASK_ROWS
static void update_rows(const LowRankUpdates *a, const Update *u, const i64 *rows, i64 count,
                        float *scratch) {
    i64 size = element_size(a->dtype), rank = u->down.outputs, blocks = blocks_of(&u->down);
    const float *x[TASK_ROWS], *inner[TASK_ROWS];
    float *y[TASK_ROWS], *at[TASK_ROWS], *values = scratch, *all = values;
    all += TASK_ROWS * (a->inputs + a->outputs);
    for (i64 i = 0; i < count; i++) {
        const char *from = (const char *)a->x + rows[i] * a->inputs * size;
        char *to = (char *)a->y + rows[i] * a->outputs * size;
        x[i] = (const float *)from, y[i] = (float *)to;
        inner[i] = all + i * blocks * OUTPUTS;
        if (a->dtype == FP32) continue;
        x[i] = values + i * a->inputs, y[i] = values + TASK_ROWS * a->inputs + i * a->outputs;
        load_row(from, a->dtype, a->inputs, (float *)x[i]);
        load_row(to, a->dtype, a->outputs, y[i]);
    }
    for (i64 block = 0; block < blocks; block++)
        for (i64 i = 0; i < count; i++)
            low_rank_down(u, block, x[i], a->dtype == BF16, (float *)inner[i] + block * OUTPUTS);
    for (i64 block = 0; rank && block < blocks_of(&u->up); block++) {
        for (i64 i = 0; i < count; i++) at[i] = y[i] + block * OUTPUTS;
        low_rank_up(u, block, count, inner, a->dtype == BF16, at);
    }
    for (i64 i = 0; a->dtype != FP32 && i < count; i++)
        store_row((char *)a->y + rows[i] * a->outputs * size, a->dtype, a->outputs, y[i]);
}

// y += scale * B (A x) for the rows of each group
void low_rank_updates(const LowRankUpdates *a) {
    i64 tasks = 0, rank = 0;
    for (i64 g = 0; g < a->num_groups; g++) {
        tasks += (a->starts[g + 1] - a->starts[g] + TASK_ROWS - 1) / TASK_ROWS;
        rank = max_(rank, a->updates[g].down.outputs + OUTPUTS);
    }
#pragma omp parallel
    {
        float *scratch = floats(TASK_ROWS * (a->inputs + a->outputs + rank));
#pragma omp for schedule(dynamic, 1)
        for (i64 task = 0; task < tasks; task++) {
            i64 g = 0, first = task;
            for (i64 own; first >= (own = (a->starts[g + 1] - a->starts[g] + TASK_ROWS - 1) /
                                          TASK_ROWS);
                 g++)
                first -= own;
            i64 begin = a->starts[g] + first * TASK_ROWS;
            update_rows(a, a->updates + g, a->rows + begin,
                        min_(TASK_ROWS, a->starts[g + 1] - begin), scratch);
        }
        free(scratch);
    }
}
