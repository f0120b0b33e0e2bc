// GEMM of bf16 matrices with many rows, C = A B with fp32 sums, on AMX.
//
// Terms
//   tile         16 rows x 32 inputs of A, 32 inputs x 16 columns of B (VNNI pairs), 16 x 16 sums
//   panel        16 rows of A or 16 columns of B; panels are packed in pairs
//   block of C   what a thread computes at a time, from panels of A and B that stay in L2
//   open sums    sums that are complete only after more inputs than are packed at a time
//   write-back   storing 32 x 32 finished sums to C, with conversion, bias or addition
//   streaming    stores that bypass the caches
//   L1, L2       the processor's caches, of which L1 is smaller and faster
//   lane, mask   see tiles.h
//
// Data layout: A [rows][depth], B [depth][columns], C [rows][columns], each with a stride between
// rows; transposed operands are stored as A [depth][rows], B [columns][depth]. Packed operands are
// [pairs of panels][tiles][2][tile], sums [2][2][16][16] for 2 x 2 tiles.
//
// Operands are packed into tiles, and pairs of panels are multiplied so that four tile products
// share four loads. A block of C is computed from packed panels that stay in L2; the next tiles are
// prefetched to L1 if that pays. Finished sums are written back between the next tile products,
// which hides most of the cost. The sum of an element runs over the inputs in a fixed order, so
// results are bitwise independent of the other rows and columns (batch-invariant).
//
// Matrices can be joined. Linear layers that share an input are one GEMM: forward, one A and
// several C's side by side; for the gradient of the input, a sum over the outputs of all layers;
// for the gradients of the weights, one B and several C's stacked vertically.
//
// Intrinsics, in addition to those of tiles.h
//   _mm512_cvtne2ps_pbh(high, low)      converts 2 x 16 fp32 values to 32 bf16
//   _mm512_mask_storeu_*, _maskz_loadu_ stores and loads under a mask
//   _mm512_stream_si512, _mm_sfence     streaming store; orders it before later stores
//   __rdtsc                             reads the time stamp counter
#include <omp.h>

#include "tiles.h"

// One of the matrices that are joined.
typedef struct {
    void *data;
    i64 stride;  // elements from row to row
    i64 size;    // along the joined dimension; a multiple of 32, unless there is only one
} Block;

// Arguments of gemm.
typedef struct {
    const Block *a, *b, *c;          // the matrices of each operand; C has those of the joined one
    i64 a_count, b_count;            // number of matrices
    int a_transposed, b_transposed;  // stored as A [depth][rows], B [columns][depth]
    const float *bias;               // [columns] or NULL
    int c_dtype;                     // BF16, or FP32
    int add;                         // adds the product to C, which must be fp32
    i64 rows, columns, depth;        // of all joined matrices
    char *workspace;                 // gemm_bytes bytes, aligned to 64 bytes
} Gemm;

#ifdef HAS_TILES

#define LINE 32                    // elements of a cache line
#define MAX_PANELS 128             // maximum panels packed at a time
#define MAX_TILES 64               // maximum tiles of a panel packed at a time
#define PACKED_TOGETHER 16         // panels packed by one task, for contiguous reads
#define BLOCK_BYTES (3 << 19)      // both operands of a block of C, which must stay in L2
#define BLOCKS_A_THREAD 4          // minimum, because threads are not equally fast
#define FEW_COLUMNS 128            // maximum columns for which A is never packed if tiles fit in it
#define TILES_AHEAD 2              // prefetch distance within a panel
#define STREAMED_BYTES (16 << 20)  // minimum size of C for streaming, beyond all caches
#define THROTTLED_CYCLES 200       // time stamp counts for four tile products that mean throttling

typedef struct {
    i64 rows, columns, depth;
    i64 row_panels, column_panels, tiles;  // packed at a time
    i64 row_bytes, column_bytes;           // size of these in bytes
} Sizes;

typedef struct {
    const Block *parts;
    i64 count;
    int transposed;   // as in Operand
    int along_depth;  // joined along the inputs, not along C
} Concatenated;

static Sizes sizes_of(i64 rows, i64 columns, i64 depth) {
    i64 row_panels = min_(MAX_PANELS, even_panels(rows));
    i64 column_panels = min_(MAX_PANELS, even_panels(columns));
    i64 all_tiles = max_(1, (depth + DEPTH - 1) / DEPTH);
    i64 parts = (all_tiles + MAX_TILES - 1) / MAX_TILES;
    i64 tiles = (all_tiles + parts - 1) / parts, panel_bytes = tiles * TILE_BYTES;
    return (Sizes){rows,
                   columns,
                   depth,
                   row_panels,
                   column_panels,
                   tiles,
                   row_panels * panel_bytes,
                   column_panels * panel_bytes};
}

// Workspace that a GEMM needs: packed operands, and sums, either two sets of four tiles per thread
// or all open sums.
i64 gemm_bytes(i64 rows, i64 columns, i64 depth) {
    Sizes s = sizes_of(rows, columns, depth);
    i64 open_tiles = depth > s.tiles * DEPTH ? s.row_panels * s.column_panels : 0;
    return s.row_bytes + s.column_bytes + max_(open_tiles, 8 * omp_get_max_threads()) * TILE_BYTES;
}

// Panels per block when `panels` panels are split into even blocks of at most `maximum`.
static i64 even_block(i64 panels, i64 maximum) {
    i64 blocks = (panels + maximum - 1) / maximum;
    return (panels / 2 + blocks - 1) / blocks * 2;
}

// Panels of rows and of columns in a block of C: as many as fit in L2, with several blocks per
// thread.
static void choose_blocks(i64 row_panels, i64 column_panels, i64 tiles, i64 *rows, i64 *columns) {
    i64 maximum = max_(4, BLOCK_BYTES / (2 * tiles * TILE_BYTES) / 2 * 2);
    i64 wanted = BLOCKS_A_THREAD * omp_get_num_threads();
    *rows = even_block(row_panels, maximum), *columns = even_block(column_panels, maximum);
    while ((row_panels / *rows) * (column_panels / *columns) < wanted &&
           max_(*rows, *columns) > 2) {
        i64 *longer = *rows >= *columns ? rows : columns;
        *longer = even_block(*longer, max_(2, *longer / 4 * 2));
    }
}

// Number of panels that a thread packs at a time.
static i64 packed_together(i64 panels) {
    return min_(PACKED_TOGETHER, even_block(panels, max_(2, panels / omp_get_num_threads())));
}

// Returns the joined matrix that contains index `at`, which becomes an index into that matrix.
static const Block *part_at(const Block *parts, i64 count, i64 *at) {
    for (; count > 1 && *at >= parts->size; parts++, count--) *at -= parts->size;
    return parts;
}

// Packs panels of joined matrices; p->size and p->depth are those of all matrices together.
static void pack(const Concatenated *x, const Packing *p, char *packed) {
    for (i64 i = 0, n = p->num_panels; i < p->num_panels; i += n)
        for (i64 t = 0, m; t < p->tiles; t += m) {
            i64 at = (p->panel + i) * SIDE, k = p->input + t * DEPTH;
            const Block *part = part_at(x->parts, x->count, x->along_depth ? &k : &at);
            const Operand one = {part->data, part->stride, x->transposed};
            i64 size = x->along_depth ? p->size : part->size;
            i64 depth = x->along_depth ? part->size : p->depth;
            n = min_(p->num_panels - i, even_panels(size - at));
            m = min_(p->tiles - t, (depth - k + DEPTH - 1) / DEPTH);
            const Packing of_part = {size, depth, at / SIDE, n, k, m, p->pitch, p->interleaved};
            pack_panels(&one, of_part, (uint16_t *)packed + (i / 2 * p->pitch + t) * PAIR);
        }
}

// Destination of a GEMM: bf16 or fp32 values; the result can be added to fp32 values.
typedef struct {
    const Block *parts;
    i64 count;
    int stacked;  // stacked vertically, not side by side
    int dtype, add, streams;
    const float *bias;
} Result;

// 32 x 32 sums that wait for their write-back to C.
typedef struct {
    const float *sums, *bias;
    char *out;
    i64 stride, rows, done;  // bytes from row to row of C; rows in all, and already written
    __mmask32 there;         // mask of the columns
} PendingWrite;

// Describes the write-back of the sums at (row, column) of C.
static PendingWrite pending_write(const Result *c, const Sizes *s, i64 row, i64 column,
                                  const float *sums) {
    i64 rows = min_(2 * SIDE, s->rows - row), at = row, along = column;
    const Block *part = part_at(c->parts, c->count, c->stacked ? &at : &along);
    i64 size = element_size(c->dtype);
    return (PendingWrite){sums,
                          c->bias ? c->bias + column : NULL,
                          (char *)part->data + (at * part->stride + along) * size,
                          part->stride * size,
                          rows,
                          0,
                          first_of(s->columns - column)};
}

// Writes one row of 32 sums to C.
ALWAYS_INLINE void write_back_row(const Result *c, void *to, const float *bias, __mmask32 there,
                                  __m512 low, __m512 high) {
    __mmask16 left = (__mmask16)there, right = (__mmask16)(there >> 16);
    if (bias) {
        low = _mm512_add_ps(low, _mm512_maskz_loadu_ps(left, bias));
        high = _mm512_add_ps(high, _mm512_maskz_loadu_ps(right, bias + SIDE));
    }
    if (c->dtype == BF16) {
        __m512i values = (__m512i)_mm512_cvtne2ps_pbh(high, low);
        // a complete cache line can be written without being read first
        if (c->streams && there == ~0u && (uintptr_t)to % 64 == 0)
            _mm512_stream_si512((__m512i *)to, values);
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

// Writes the next `count` rows of the waiting sums to C.
ALWAYS_INLINE void write_back(const Result *c, PendingWrite *w, i64 count) {
    for (i64 end = min_(w->rows, w->done + count); w->done < end; w->done++) {
        const float *from = w->sums + w->done / SIDE * 512 + w->done % SIDE * SIDE;
        write_back_row(c, w->out + w->done * w->stride, w->bias, w->there, _mm512_load_ps(from),
                       _mm512_load_ps(from + 256));
    }
}

// Prefetches a tile to L1.
ALWAYS_INLINE void fetch_tile(const char *tile, i64 row) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) _mm_prefetch(tile + i * row, _MM_HINT_T0);
}

// Data used after the current panels: while these are multiplied, four of its cache lines are
// prefetched to L2 for each tile.
typedef struct {
    const char *at;
    i64 row, step;
} Next;

ALWAYS_INLINE void fetch_next(Next *next) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) _mm_prefetch(next->at + i * next->row, _MM_HINT_T1);
    next->at += next->step;
}

// Adds two panels of A times two of B, `count` tiles of each, to the sums in tile registers 0 to 3.
// At each step it prefetches tiles needed soon to L1, if `fetches`, and writes back `each` waiting
// rows.
ALWAYS_INLINE void add_products(i64 count, PanelPair a, PanelPair b, int fetches, Next next,
                                const Result *c, PendingWrite *pending, i64 each) {
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
        write_back(c, pending, each);
        a.first += a.step, a.second += a.step, b.first += b.step, b.second += b.step;
    }
}

// Whether AMX is throttled on this thread's core (frequency throttling), as happens on shared
// machines. Tile loads then do not overlap with multiplications, so tiles should already be in L1;
// otherwise prefetching them costs more than it saves. Measured on the thread's last block.
static _Thread_local int throttled = 1;

typedef struct {
    Sizes sizes;
    Concatenated a, b;
    Result c;
    char *packed_a, *packed_b;
    float *sums;
    int direct;  // tiles of A are loaded in place, without packing
    int open;    // sums need more inputs than are packed at a time
} GemmPlan;

// What is packed at a time: panels of rows from m0 and of columns from n0 on, inputs from k0 on.
typedef struct {
    i64 m0, n0, k0, m_count, n_count, tiles;
    int starts, ends;  // whether these inputs are the first, and the last, of the sums
} PackedBlock;

static PackedBlock packed_block_at(const Sizes *s, i64 m0, i64 n0, i64 k0) {
    return (PackedBlock){m0,
                         n0,
                         k0,
                         min_(s->row_panels, even_panels(s->rows) - m0),
                         min_(s->column_panels, even_panels(s->columns) - n0),
                         min_(s->tiles, (s->depth - k0 + DEPTH - 1) / DEPTH),
                         k0 == 0,
                         k0 + s->tiles * DEPTH >= s->depth};
}

// Returns panels m and m + 1 of A, tiles t to t + *count, or fewer if their matrix ends before.
// `pair`: number of pairs of column panels already multiplied by them; each prefetches another part
// of the next panels.
ALWAYS_INLINE PanelPair panels_of_rows(const GemmPlan *p, const PackedBlock *packed, i64 m, i64 t,
                                       i64 pair, i64 *count, Next *next) {
    if (!p->direct) {
        i64 bytes = packed->tiles * TILE_BYTES;
        const char *x = p->packed_a + m * bytes;
        *next = (Next){x + 2 * bytes + pair * packed->tiles * 256, 64, 256};
        return packed_panels(x);
    }
    i64 k = packed->k0 + t * DEPTH, at = (packed->m0 + m) * SIDE;
    const Block *part = part_at(p->a.parts, p->a.count, p->a.along_depth ? &k : &at);
    if (p->a.along_depth) *count = min_(*count, (part->size - k) / DEPTH);
    i64 row = part->stride * 2;
    const char *x = (const char *)part->data + at * row + k * 2;
    *next = (Next){x + (2 * SIDE + 4 * pair) * row, row, 64};
    return (PanelPair){x, x + SIDE * row, row, 64};
}

// Multiplies packed panels m1 to m_end of A by panels n1 to n_end of B.
static void multiply_block(const GemmPlan *p, const PackedBlock *packed, i64 m1, i64 m_end, i64 n1,
                           i64 n_end) {
    i64 start = (i64)__rdtsc(), uses = 0, tiles = packed->tiles, own = omp_get_thread_num() * 2;
    int fetches = throttled;
    PendingWrite pending = {0};
    for (i64 m = m1; m < m_end; m += 2)
        for (i64 n = n1; n < n_end; n += 2) {
            i64 open_place = m / 2 * (p->sizes.column_panels / 2) + n / 2;
            // two sets alternate, because the previous sums still wait for their write-back
            float *sums = p->sums + (p->open ? open_place : own + uses++ % 2) * SUMS;
            const char *y = p->packed_b + n * tiles * TILE_BYTES;
            i64 each = (pending.rows + tiles - 1) / tiles;
            begin_sums(packed->starts, sums);
            for (i64 t = 0, count; t < tiles; t += count, y += count * 2 * TILE_BYTES) {
                Next next;
                count = tiles - t;
                PanelPair x = panels_of_rows(p, packed, m, t, (n - n1) / 2, &count, &next);
                add_products(count, x, packed_panels(y), fetches, next, &p->c, &pending, each);
            }
            write_back(&p->c, &pending, pending.rows);
            end_sums(sums);
            if (packed->ends)
                pending = pending_write(&p->c, &p->sizes, (packed->m0 + m) * SIDE,
                                        (packed->n0 + n) * SIDE, sums);
        }
    write_back(&p->c, &pending, pending.rows);
    throttled =
        (i64)__rdtsc() - start > (m_end - m1) * (n_end - n1) / 4 * tiles * THROTTLED_CYCLES;
}

// Whether complete tiles of A can be loaded in place. With few columns, packing a large A costs
// more than rows that map to the same cache sets.
static int is_direct(const Concatenated *a, i64 rows, i64 columns, i64 depth) {
    int direct = !a->transposed && rows % (2 * SIDE) == 0 && depth % DEPTH == 0;
    for (i64 i = 0; i < a->count; i++)
        direct &= (uintptr_t)a->parts[i].data % 64 == 0 && a->parts[i].stride % LINE == 0 &&
                  (columns <= FEW_COLUMNS || a->parts[i].stride % (32 * LINE) != 0);
    return direct;
}

// Divides the matrices into what is packed at a time, and the workspace into its arrays.
static GemmPlan plan_of(const Gemm *args) {
    const Sizes s = sizes_of(args->rows, args->columns, args->depth);
    const int along_depth = args->a_count > 1 && args->b_count > 1;
    const int streams = args->rows * args->columns * 2 >= STREAMED_BYTES;
    char *packed_b = args->workspace + s.row_bytes, *sums = packed_b + s.column_bytes;
    const Concatenated a = {args->a, args->a_count, args->a_transposed, along_depth};
    const Concatenated b = {args->b, args->b_count, args->b_transposed, along_depth};
    const Result result = {args->c,
                           along_depth ? 1 : max_(args->a_count, args->b_count),
                           args->a_count > 1,
                           args->c_dtype,
                           args->add,
                           streams,
                           args->bias};
    return (GemmPlan){s,
                      a,
                      b,
                      result,
                      args->workspace,
                      packed_b,
                      (float *)sums,
                      is_direct(&a, s.rows, s.columns, s.depth),
                      s.depth > s.tiles * DEPTH};
}

// C[rows][columns] = A B + bias, for A [rows][depth] and B [depth][columns]; each can be one matrix
// or several joined ones. If only A or only B is joined, it is joined along C, whose parts have the
// same sizes; if both are, they are joined along the depth. C is bf16, or fp32, to which the
// product can be added.
void gemm(const Gemm *args) {
    const GemmPlan p = plan_of(args);
    const Sizes s = p.sizes;
    const i64 rows = s.rows, columns = s.columns, depth = s.depth;
#pragma omp parallel
    {
        configure_tiles();
        for (i64 m0 = 0; m0 < even_panels(rows); m0 += s.row_panels)
            for (i64 n0 = 0; n0 < even_panels(columns); n0 += s.column_panels)
                for (i64 k0 = 0; k0 < depth; k0 += s.tiles * DEPTH) {
                    const PackedBlock packed = packed_block_at(&s, m0, n0, k0);
                    i64 tiles = packed.tiles, panel_bytes = tiles * TILE_BYTES;
                    i64 m_together = packed_together(packed.m_count);
                    i64 n_together = packed_together(packed.n_count), m_block, n_block;
                    choose_blocks(packed.m_count, packed.n_count, tiles, &m_block, &n_block);
                    if (!p.direct && (n0 == 0 || p.open)) {
#pragma omp for schedule(dynamic) nowait
                        for (i64 m = 0; m < packed.m_count; m += m_together) {
                            i64 count = min_(m_together, packed.m_count - m);
                            const Packing of_a = {rows, depth, m0 + m, count,
                                                  k0,   tiles, tiles,  p.a.transposed};
                            pack(&p.a, &of_a, p.packed_a + m * panel_bytes);
                        }
                    }
#pragma omp for schedule(dynamic)
                    for (i64 n = 0; n < packed.n_count; n += n_together) {
                        i64 count = min_(n_together, packed.n_count - n);
                        const Packing of_b = {columns, depth, n0 + n, count,
                                              k0,      tiles, tiles,  !p.b.transposed};
                        pack(&p.b, &of_b, p.packed_b + n * panel_bytes);
                    }
#pragma omp for collapse(2) schedule(dynamic)
                    for (i64 m = 0; m < packed.m_count; m += m_block)
                        for (i64 n = 0; n < packed.n_count; n += n_block)
                            multiply_block(&p, &packed, m, min_(m + m_block, packed.m_count), n,
                                           min_(n + n_block, packed.n_count));
                }
        _mm_sfence();  // makes streamed stores visible before the threads join
        _tile_release();
    }
}

int gemm_ready(void) { return tiles_ready(); }

#else

int gemm_ready(void) { return 0; }
i64 gemm_bytes(i64 rows, i64 columns, i64 depth) {
    (void)rows, (void)columns, (void)depth;
    return 0;
}
void gemm(const Gemm *args) { (void)args; }

#endif
