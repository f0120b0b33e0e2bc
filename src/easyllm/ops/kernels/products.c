// Products of bf16 matrices of many rows, C = A B summed in fp32, on the matrix unit of processors that have AMX.
//
// The unit takes tiles: 16 rows x 32 inputs of A, 32 inputs x 16 columns of B with pairs of inputs side by side. Operands
// are packed into such tiles, strips of 16 rows or columns two at a time, so that four products share four loads; then
// a block of C is computed from blocks that stay in the second cache, and what comes next is fetched into the first.
// An element's sum runs over the inputs in one order, whatever rows and columns are computed beside it.
#include <omp.h>

#include "tiles.h"

#ifdef HAS_TILES

#define LINE 32                    // elements of a cache line
#define MOST_STRIPS 128            // packed at a time
#define MOST_TILES 64              // of a strip, packed at a time
#define PACKED_TOGETHER 16         // strips, whose rows lie in one piece
#define BLOCK_BYTES (3 << 19)      // of both operands of a block of C, which stay in the second cache
#define BLOCKS_A_THREAD 4          // at least: threads are not equally fast
#define TILES_AHEAD 2              // of a strip, between the one in use and the one being fetched
#define STREAMED_BYTES (16 << 20)  // of a result that is too large to be in any cache when it is read

typedef struct {
    i64 rows, columns, depth;
    i64 row_strips, column_strips, tiles;  // packed at a time
    i64 row_bytes, column_bytes;           // of them
} Sizes;

static Sizes sizes_of(i64 rows, i64 columns, i64 depth) {
    i64 row_strips = min_(MOST_STRIPS, even_strips(rows)), column_strips = min_(MOST_STRIPS, even_strips(columns));
    i64 all_tiles = max_(1, (depth + DEPTH - 1) / DEPTH), parts = (all_tiles + MOST_TILES - 1) / MOST_TILES;
    i64 tiles = (all_tiles + parts - 1) / parts, strip_bytes = tiles * TILE_BYTES;
    return (Sizes){rows, columns, depth, row_strips, column_strips, tiles, row_strips * strip_bytes, column_strips * strip_bytes};
}

// Room that a product needs: packed operands, and sums, of four tiles a thread or of all that are not done.
i64 product_bytes(i64 rows, i64 columns, i64 depth) {
    Sizes s = sizes_of(rows, columns, depth);
    i64 open_tiles = depth > s.tiles * DEPTH ? s.row_strips * s.column_strips : 0;
    return s.row_bytes + s.column_bytes + max_(open_tiles, 4 * omp_get_max_threads()) * TILE_BYTES;
}

// Strips of a block when so many are cut into even ones of `most` at most.
static i64 even_block(i64 strips, i64 most) {
    i64 blocks = (strips + most - 1) / most;
    return (strips / 2 + blocks - 1) / blocks * 2;
}

// Strips of rows and of columns of a block of C: as many as the cache keeps, with several blocks for each thread.
static void choose_blocks(i64 row_strips, i64 column_strips, i64 tiles, i64 *rows, i64 *columns) {
    i64 most = max_(4, BLOCK_BYTES / (2 * tiles * TILE_BYTES) / 2 * 2), wanted = BLOCKS_A_THREAD * omp_get_num_threads();
    *rows = even_block(row_strips, most), *columns = even_block(column_strips, most);
    while ((row_strips / *rows) * (column_strips / *columns) < wanted && max_(*rows, *columns) > 2) {
        i64 *longer = *rows >= *columns ? rows : columns;
        *longer = even_block(*longer, max_(2, *longer / 4 * 2));
    }
}

// Where a product goes: values of bf16 or fp32, or added to those of fp32.
typedef struct {
    void *data;
    i64 stride;
    int dtype, add, streams;
    const float *bias;
} Result;

ALWAYS_INLINE void put_down_row(const Result *c, i64 at, const float *bias, __mmask32 there, __m512 low, __m512 high) {
    __mmask16 left = (__mmask16)there, right = (__mmask16)(there >> 16);
    if (bias) {
        low = _mm512_add_ps(low, _mm512_maskz_loadu_ps(left, bias));
        high = _mm512_add_ps(high, _mm512_maskz_loadu_ps(right, bias + SIDE));
    }
    if (c->dtype == BF16) {
        uint16_t *out = (uint16_t *)c->data + at;
        __m512i values = (__m512i)_mm512_cvtne2ps_pbh(high, low);
        // a whole line goes to memory without being read first
        if (c->streams && there == ~0u && (uintptr_t)out % 64 == 0) _mm512_stream_si512((__m512i *)out, values);
        else _mm512_mask_storeu_epi16(out, there, values);
        return;
    }
    float *out = (float *)c->data + at;
    if (c->add) {
        low = _mm512_add_ps(low, _mm512_maskz_loadu_ps(left, out));
        high = _mm512_add_ps(high, _mm512_maskz_loadu_ps(right, out + SIDE));
    }
    _mm512_mask_storeu_ps(out, left, low);
    _mm512_mask_storeu_ps(out + SIDE, right, high);
}

// 32 x 32 sums to rows `row` and columns `column` of C
static void put_down(const float *sums, const Sizes *s, i64 row, i64 column, const Result *c) {
    __mmask32 there = first_of(s->columns - column);
    const float *bias = c->bias ? c->bias + column : NULL;
    MEMORY_IS_READ();
    for (i64 i = 0; i < min_(2 * SIDE, s->rows - row); i++) {
        const float *from = sums + i / SIDE * 512 + i % SIDE * SIDE;
        put_down_row(c, (row + i) * c->stride + column, bias, there, _mm512_load_ps(from), _mm512_load_ps(from + 256));
    }
}

// C[rows][columns] = A B + bias, for A [rows][depth], B [depth][columns]. A turned operand lies with its rows along the
// other dimension: A as [depth][rows], B as [columns][depth]. C is bf16 or fp32, to which the product may be added. bias:
// [columns] fp32 or NULL. room: product_bytes of it, aligned to 64 bytes.
void product(const uint16_t *a, i64 a_stride, int a_turned, const uint16_t *b, i64 b_stride, int b_turned,
             const float *bias, void *c, i64 c_stride, int c_dtype, int add, i64 rows, i64 columns, i64 depth, char *room) {
    const Sizes s = sizes_of(rows, columns, depth);
    const Operand left = {a, a_stride, a_turned}, right = {b, b_stride, b_turned};
    const Result result = {c, c_stride, c_dtype, add, rows * columns * 2 >= STREAMED_BYTES, bias};
    char *packed_a = room, *packed_b = packed_a + s.row_bytes;
    float *all_sums = (float *)(packed_b + s.column_bytes);
    const int open = depth > s.tiles * DEPTH;
    // whole tiles of a matrix with its rows along C's are loaded from where they are
    const int direct = !a_turned && rows % (2 * SIDE) == 0 && depth % DEPTH == 0 && (uintptr_t)a % 64 == 0 &&
                       a_stride % LINE == 0 && a_stride % (32 * LINE) != 0;  // else rows fall upon the same sets of the cache
#pragma omp parallel
    {
        begin_whole_tiles();
        for (i64 m0 = 0; m0 < even_strips(rows); m0 += s.row_strips)
            for (i64 n0 = 0; n0 < even_strips(columns); n0 += s.column_strips)
                for (i64 k0 = 0; k0 < depth; k0 += s.tiles * DEPTH) {
                    i64 tiles = min_(s.tiles, (depth - k0 + DEPTH - 1) / DEPTH), strip_bytes = tiles * TILE_BYTES;
                    i64 m_count = min_(s.row_strips, even_strips(rows) - m0);
                    i64 n_count = min_(s.column_strips, even_strips(columns) - n0), m_block, n_block;
                    choose_blocks(m_count, n_count, tiles, &m_block, &n_block);
                    int starts = k0 == 0, ends = k0 + s.tiles * DEPTH >= depth;
                    if (!direct && (n0 == 0 || open)) {
#pragma omp for schedule(dynamic) nowait
                        for (i64 m = 0; m < m_count; m += PACKED_TOGETHER)
                            pack_strips(&left, rows, depth, m0 + m, min_(PACKED_TOGETHER, m_count - m), k0, tiles, a_turned,
                                        (uint16_t *)(packed_a + m * strip_bytes));
                    }
#pragma omp for schedule(dynamic)
                    for (i64 n = 0; n < n_count; n += PACKED_TOGETHER)
                        pack_strips(&right, columns, depth, n0 + n, min_(PACKED_TOGETHER, n_count - n), k0, tiles, !b_turned,
                                    (uint16_t *)(packed_b + n * strip_bytes));
#pragma omp for collapse(2) schedule(dynamic)
                    for (i64 m1 = 0; m1 < m_count; m1 += m_block)
                        for (i64 n1 = 0; n1 < n_count; n1 += n_block)
                            for (i64 m = m1; m < min_(m1 + m_block, m_count); m += 2)
                                for (i64 n = n1; n < min_(n1 + n_block, n_count); n += 2) {
                                    i64 place = open ? m / 2 * (s.column_strips / 2) + n / 2 : omp_get_thread_num();
                                    float *sums = all_sums + place * SUMS;
                                    const char *y = packed_b + n * strip_bytes, *x = packed_a + m * strip_bytes;
                                    i64 turn = (n - n1) / 2;  // each fetches another part of the next strips
                                    if (direct) {
                                        i64 row = a_stride * 2;
                                        x = (const char *)(a + (m0 + m) * SIDE * a_stride + k0);
                                        Strips rows_of = {x, x + SIDE * row, row, 64};
                                        Next next = {x + (2 * SIDE + 4 * turn) * row, row, 64};
                                        four_tiles_ahead(tiles, rows_of, packed_strips(y), starts, sums, TILES_AHEAD, next);
                                    } else {
                                        Next next = {x + 2 * strip_bytes + turn * tiles * 256, 64, 256};
                                        four_tiles_ahead(tiles, packed_strips(x), packed_strips(y), starts, sums, TILES_AHEAD, next);
                                    }
                                    if (ends) put_down(sums, &s, (m0 + m) * SIDE, (n0 + n) * SIDE, &result);
                                }
                }
        _mm_sfence();  // what was streamed is there for whoever reads it next
        _tile_release();
    }
}

int product_ready(void) { return tiles_ready(); }

#else

int product_ready(void) { return 0; }
i64 product_bytes(i64 rows, i64 columns, i64 depth) {
    (void)rows, (void)columns, (void)depth;
    return 0;
}
void product(const uint16_t *a, i64 a_stride, int a_turned, const uint16_t *b, i64 b_stride, int b_turned,
             const float *bias, void *c, i64 c_stride, int c_dtype, int add, i64 rows, i64 columns, i64 depth, char *room) {
    (void)a, (void)a_stride, (void)a_turned, (void)b, (void)b_stride, (void)b_turned, (void)bias, (void)c;
    (void)c_stride, (void)c_dtype, (void)add, (void)rows, (void)columns, (void)depth, (void)room;
}

#endif
