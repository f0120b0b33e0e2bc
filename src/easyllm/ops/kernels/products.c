// Products of bf16 matrices of many rows, C = A B summed in fp32, on the matrix unit of processors that have AMX.
//
// The unit takes tiles: 16 rows x 32 inputs of A, 32 inputs x 16 columns of B with pairs of inputs side by side. Operands
// are packed into such tiles, strips of 16 rows or columns two at a time, so that four products share four loads; then
// a block of C is computed from blocks that stay in the second cache, and what comes next is fetched into the first where
// that pays. Sums are put down between the next products, in whose shadow they cost little.
// An element's sum runs over the inputs in one order, whatever rows and columns are computed beside it.
//
// Matrices may be joined. Linear layers of one input are one product: forward, C's beside each other, of one A; the input's
// gradient, a sum over all their outputs; the weights' gradients, C's above each other, of one B.
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
#define CYCLES_HELD_BACK 200       // of the time stamp counter, for four products

typedef struct {
    i64 rows, columns, depth;
    i64 row_strips, column_strips, tiles;  // packed at a time
    i64 row_bytes, column_bytes;           // of them
} Sizes;

// One of the matrices that are joined.
typedef struct {
    void *data;
    i64 stride;  // elements from row to row
    i64 size;    // in the direction in which they are joined; a multiple of 32, unless it is the only one
} Part;

typedef struct {
    const Part *parts;
    i64 count;
    int turned;       // as in Operand
    int along_depth;  // joined along the inputs, not along C
} Joined;

static Sizes sizes_of(i64 rows, i64 columns, i64 depth) {
    i64 row_strips = min_(MOST_STRIPS, even_strips(rows)), column_strips = min_(MOST_STRIPS, even_strips(columns));
    i64 all_tiles = max_(1, (depth + DEPTH - 1) / DEPTH), parts = (all_tiles + MOST_TILES - 1) / MOST_TILES;
    i64 tiles = (all_tiles + parts - 1) / parts, strip_bytes = tiles * TILE_BYTES;
    return (Sizes){rows, columns, depth, row_strips, column_strips, tiles, row_strips * strip_bytes, column_strips * strip_bytes};
}

// Room that a product needs: packed operands, and sums, of twice four tiles a thread or of all that are not done.
i64 product_bytes(i64 rows, i64 columns, i64 depth) {
    Sizes s = sizes_of(rows, columns, depth);
    i64 open_tiles = depth > s.tiles * DEPTH ? s.row_strips * s.column_strips : 0;
    return s.row_bytes + s.column_bytes + max_(open_tiles, 8 * omp_get_max_threads()) * TILE_BYTES;
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

// Strips that a thread packs together.
static i64 packed_together(i64 strips) {
    return min_(PACKED_TOGETHER, even_block(strips, max_(2, strips / omp_get_num_threads())));
}

// The one of the joined matrices that has `at`, which becomes a place in it.
static const Part *part_at(const Part *parts, i64 count, i64 *at) {
    for (; count > 1 && *at >= parts->size; parts++, count--) *at -= parts->size;
    return parts;
}

static void pack(const Joined *x, i64 size, i64 depth, i64 s, i64 count, i64 k0, i64 tiles, int laced, char *packed) {
    for (i64 i = 0, n; i < count; i += n)
        for (i64 t = 0, m; t < tiles; t += m) {
            i64 at = (s + i) * SIDE, k = k0 + t * DEPTH;
            const Part *part = part_at(x->parts, x->count, x->along_depth ? &k : &at);
            Operand one = {part->data, part->stride, x->turned};
            i64 part_size = x->along_depth ? size : part->size, part_depth = x->along_depth ? part->size : depth;
            n = min_(count - i, even_strips(part_size - at)), m = min_(tiles - t, (part_depth - k + DEPTH - 1) / DEPTH);
            pack_strips(&one, part_size, part_depth, at / SIDE, n, k, m, tiles, laced,
                        (uint16_t *)packed + (i / 2 * tiles + t) * PAIR);
        }
}

// Where a product goes: values of bf16 or fp32, or added to those of fp32.
typedef struct {
    const Part *parts;
    i64 count;
    int above;  // joined one above the other, not beside each other
    int dtype, add, streams;
    const float *bias;
} Result;

// 32 x 32 sums on their way to C.
typedef struct {
    const float *sums, *bias;
    char *out;
    i64 stride, rows, done;  // bytes from row to row of C
    __mmask32 there;         // of the columns
} Waiting;

static Waiting waiting_for(const Result *c, const Sizes *s, i64 row, i64 column, const float *sums) {
    i64 rows = min_(2 * SIDE, s->rows - row), at = row, along = column;
    const Part *part = part_at(c->parts, c->count, c->above ? &at : &along);
    i64 size = element_size(c->dtype);
    return (Waiting){sums, c->bias ? c->bias + column : NULL, (char *)part->data + (at * part->stride + along) * size,
                     part->stride * size, rows, 0, first_of(s->columns - column)};
}

ALWAYS_INLINE void put_down_row(const Result *c, void *to, const float *bias, __mmask32 there, __m512 low, __m512 high) {
    __mmask16 left = (__mmask16)there, right = (__mmask16)(there >> 16);
    if (bias) {
        low = _mm512_add_ps(low, _mm512_maskz_loadu_ps(left, bias));
        high = _mm512_add_ps(high, _mm512_maskz_loadu_ps(right, bias + SIDE));
    }
    if (c->dtype == BF16) {
        __m512i values = (__m512i)_mm512_cvtne2ps_pbh(high, low);
        // a whole line goes to memory without being read first
        if (c->streams && there == ~0u && (uintptr_t)to % 64 == 0) _mm512_stream_si512((__m512i *)to, values);
        else _mm512_mask_storeu_epi16(to, there, values);
        return;
    }
    float *out = to;
    if (c->add) {
        low = _mm512_add_ps(low, _mm512_maskz_loadu_ps(left, out));
        high = _mm512_add_ps(high, _mm512_maskz_loadu_ps(right, out + SIDE));
    }
    _mm512_mask_storeu_ps(out, left, low);
    _mm512_mask_storeu_ps(out + SIDE, right, high);
}

ALWAYS_INLINE void put_down(const Result *c, Waiting *w, i64 count) {
    for (i64 end = min_(w->rows, w->done + count); w->done < end; w->done++) {
        const float *from = w->sums + w->done / SIDE * 512 + w->done % SIDE * SIDE;
        put_down_row(c, w->out + w->done * w->stride, w->bias, w->there, _mm512_load_ps(from), _mm512_load_ps(from + 256));
    }
}

ALWAYS_INLINE void fetch_tile(const char *tile, i64 row) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) _mm_prefetch(tile + i * row, _MM_HINT_T0);
}

// What is used after the strips at hand: four lines a tile of theirs are fetched into the second cache meanwhile.
typedef struct {
    const char *at;
    i64 row, step;
} Next;

ALWAYS_INLINE void fetch_next(Next *next) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) _mm_prefetch(next->at + i * next->row, _MM_HINT_T1);
    next->at += next->step;
}

// Adds A's two strips times B's, `count` tiles of each, to the sums in tiles 0 to 3. With each of them, tiles that have their turn
// soon are fetched into the first cache, if `fetches`, and `each` rows that wait are put down.
ALWAYS_INLINE void add_products(i64 count, Strips a, Strips b, int fetches, Next next, const Result *c, Waiting *waiting,
                                i64 each) {
    for (i64 k = 0; k < count; k++) {
        _tile_loadd(4, a.first, a.row);
        _tile_loadd(6, b.first, b.row);
        if (fetches) fetch_tile(a.first + TILES_AHEAD * a.step, a.row);
        _tile_loadd(7, b.second, b.row);
        if (fetches) fetch_tile(b.first + TILES_AHEAD * b.step, b.row);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, a.second, a.row);
        if (fetches) fetch_tile(a.second + TILES_AHEAD * a.step, a.row);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        if (fetches) fetch_tile(b.second + TILES_AHEAD * b.step, b.row);
        _tile_dpbf16ps(3, 5, 7);
        fetch_next(&next);
        put_down(c, waiting, each);
        a.first += a.step, a.second += a.step, b.first += b.step, b.second += b.step;
    }
}

// Whether a thread's unit is held back, as shared machines' are at times: it loads tiles then only when it multiplies none,
// and had better find them in the first cache; else fetching them takes more time than it saves. Seen from its last block.
static _Thread_local int held_back = 1;

typedef struct {
    Sizes sizes;
    Joined a, b;
    Result c;
    char *packed_a, *packed_b;
    float *sums;
    int direct;  // A's tiles are loaded from where they are
    int open;    // sums wait for more inputs than are packed at a time
} Product;

// What is packed at a time: strips of rows and columns from m0 and n0 on, inputs from k0 on.
typedef struct {
    i64 m0, n0, k0, m_count, n_count, tiles;
    int starts, ends;  // the sums
} Panel;

static Panel panel_at(const Sizes *s, i64 m0, i64 n0, i64 k0) {
    return (Panel){m0, n0, k0, min_(s->row_strips, even_strips(s->rows) - m0), min_(s->column_strips, even_strips(s->columns) - n0),
                   min_(s->tiles, (s->depth - k0 + DEPTH - 1) / DEPTH), k0 == 0, k0 + s->tiles * DEPTH >= s->depth};
}

// Strips m and m + 1 of A, tiles t to t + *count of them, or fewer if their matrix ends before; `turn`: how many strips of columns
// have met them, each of which fetches another part of what comes next.
ALWAYS_INLINE Strips strips_of_rows(const Product *p, const Panel *panel, i64 m, i64 t, i64 turn, i64 *count, Next *next) {
    if (!p->direct) {
        i64 bytes = panel->tiles * TILE_BYTES;
        const char *x = p->packed_a + m * bytes;
        *next = (Next){x + 2 * bytes + turn * panel->tiles * 256, 64, 256};
        return packed_strips(x);
    }
    i64 k = panel->k0 + t * DEPTH, at = (panel->m0 + m) * SIDE;
    const Part *part = part_at(p->a.parts, p->a.count, p->a.along_depth ? &k : &at);
    if (p->a.along_depth) *count = min_(*count, (part->size - k) / DEPTH);
    i64 row = part->stride * 2;
    const char *x = (const char *)part->data + at * row + k * 2;
    *next = (Next){x + (2 * SIDE + 4 * turn) * row, row, 64};
    return (Strips){x, x + SIDE * row, row, 64};
}

// Strips m1 to m_end of A times strips n1 to n_end of B, of those that are packed.
static void multiply_block(const Product *p, const Panel *panel, i64 m1, i64 m_end, i64 n1, i64 n_end) {
    i64 start = (i64)__rdtsc(), turns = 0, tiles = panel->tiles, own = omp_get_thread_num() * 2;
    int fetches = held_back;
    Waiting waiting = {0};
    for (i64 m = m1; m < m_end; m += 2)
        for (i64 n = n1; n < n_end; n += 2) {
            i64 open_place = m / 2 * (p->sizes.column_strips / 2) + n / 2;
            float *sums = p->sums + (p->open ? open_place : own + turns++ % 2) * SUMS;  // those before still wait
            const char *y = p->packed_b + n * tiles * TILE_BYTES;
            i64 each = (waiting.rows + tiles - 1) / tiles;
            begin_sums(panel->starts, sums);
            for (i64 t = 0, count; t < tiles; t += count, y += count * 2 * TILE_BYTES) {
                Next next;
                count = tiles - t;
                Strips x = strips_of_rows(p, panel, m, t, (n - n1) / 2, &count, &next);
                add_products(count, x, packed_strips(y), fetches, next, &p->c, &waiting, each);
            }
            put_down(&p->c, &waiting, waiting.rows);
            end_sums(sums);
            if (panel->ends) waiting = waiting_for(&p->c, &p->sizes, (panel->m0 + m) * SIDE, (panel->n0 + n) * SIDE, sums);
        }
    put_down(&p->c, &waiting, waiting.rows);
    held_back = (i64)__rdtsc() - start > (m_end - m1) * (n_end - n1) / 4 * tiles * CYCLES_HELD_BACK;
}

// Whether whole tiles of A can be loaded from where they are.
static int is_direct(const Joined *a, i64 rows, i64 depth) {
    int direct = !a->turned && rows % (2 * SIDE) == 0 && depth % DEPTH == 0;
    for (i64 i = 0; i < a->count; i++)
        direct &= (uintptr_t)a->parts[i].data % 64 == 0 && a->parts[i].stride % LINE == 0 &&
                  a->parts[i].stride % (32 * LINE) != 0;  // else rows fall upon the same sets of the cache
    return direct;
}

// C[rows][columns] = A B + bias, for A [rows][depth], B [depth][columns], all of them one matrix or joined of several. A turned
// operand lies with its rows along the other dimension: A as [depth][rows], B as [columns][depth]. Of A and B, one alone is joined
// along C, whose parts have the same sizes; both are along the depth. C is bf16 or fp32, to which the product may be added. bias:
// [columns] fp32 or NULL. room: product_bytes of it, aligned to 64 bytes.
void product(const Part *a, i64 a_count, int a_turned, const Part *b, i64 b_count, int b_turned, const float *bias,
             const Part *c, int c_dtype, int add, i64 rows, i64 columns, i64 depth, char *room) {
    const Sizes s = sizes_of(rows, columns, depth);
    const int along_depth = a_count > 1 && b_count > 1, streams = rows * columns * 2 >= STREAMED_BYTES;
    char *packed_b = room + s.row_bytes, *sums = packed_b + s.column_bytes;
    const Joined left = {a, a_count, a_turned, along_depth}, right = {b, b_count, b_turned, along_depth};
    const Result result = {c, along_depth ? 1 : max_(a_count, b_count), a_count > 1, c_dtype, add, streams, bias};
    const int direct = is_direct(&left, rows, depth), open = depth > s.tiles * DEPTH;
    const Product p = {s, left, right, result, room, packed_b, (float *)sums, direct, open};
#pragma omp parallel
    {
        begin_whole_tiles();
        for (i64 m0 = 0; m0 < even_strips(rows); m0 += s.row_strips)
            for (i64 n0 = 0; n0 < even_strips(columns); n0 += s.column_strips)
                for (i64 k0 = 0; k0 < depth; k0 += s.tiles * DEPTH) {
                    const Panel panel = panel_at(&s, m0, n0, k0);
                    i64 strip_bytes = panel.tiles * TILE_BYTES, m_together = packed_together(panel.m_count);
                    i64 n_together = packed_together(panel.n_count), m_block, n_block;
                    choose_blocks(panel.m_count, panel.n_count, panel.tiles, &m_block, &n_block);
                    if (!p.direct && (n0 == 0 || p.open)) {
#pragma omp for schedule(dynamic) nowait
                        for (i64 m = 0; m < panel.m_count; m += m_together)
                            pack(&p.a, rows, depth, m0 + m, min_(m_together, panel.m_count - m), k0, panel.tiles, a_turned,
                                 p.packed_a + m * strip_bytes);
                    }
#pragma omp for schedule(dynamic)
                    for (i64 n = 0; n < panel.n_count; n += n_together)
                        pack(&p.b, columns, depth, n0 + n, min_(n_together, panel.n_count - n), k0, panel.tiles, !b_turned,
                             p.packed_b + n * strip_bytes);
#pragma omp for collapse(2) schedule(dynamic)
                    for (i64 m = 0; m < panel.m_count; m += m_block)
                        for (i64 n = 0; n < panel.n_count; n += n_block)
                            multiply_block(&p, &panel, m, min_(m + m_block, panel.m_count), n, min_(n + n_block, panel.n_count));
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
void product(const void *a, i64 a_count, int a_turned, const void *b, i64 b_count, int b_turned, const float *bias,
             const void *c, int c_dtype, int add, i64 rows, i64 columns, i64 depth, char *room) {
    (void)a, (void)a_count, (void)a_turned, (void)b, (void)b_count, (void)b_turned, (void)bias, (void)c;
    (void)c_dtype, (void)add, (void)rows, (void)columns, (void)depth, (void)room;
}

#endif
