// AMX tiles of bf16: packing, and a kernel of 2 x 2 tiles that shares their loads.
//
// Terms (C = A B)
//   AMX          matrix unit of some x86 processors: 8 tile registers of 16 rows x 64 bytes
//   tile         of A: 16 rows x 32 inputs; of B: 32 inputs x 16 columns; of sums: 16 x 16 fp32
//   VNNI pairs   a tile of B has inputs 2 i and 2 i + 1 of a column next to each other
//   panel        16 rows of A or 16 columns of B, along the inputs
//   operand      A or B in memory, possibly transposed
//   L1           the first-level data cache
//   mask         __mmask16/32, one bit per lane; lanes without it load as zero or are not stored
//
// Data layout: panels are packed in pairs, [tiles][2][tile]; 32 x 32 sums are [2][2][16][16].
//
// Intrinsics
//   _tile_loadconfig, _tile_release     set the tile shapes of a thread; release its tiles
//   _tile_loadd(t, p, row)              loads tile t from p, with `row` bytes between rows
//   _tile_stored(t, p, row)             stores tile t in the same way
//   _tile_zero(t)                       sets a tile to zero
//   _tile_dpbf16ps(c, a, b)             tile c += tile a x tile b, bf16 inputs and fp32 sums
//   _mm512_unpacklo/unpackhi_epi32/64   interleave 32- or 64-bit elements of two registers
//   _mm512_shuffle_i32x4                selects 128-bit parts of two registers
//   _mm512_maskz_loadu_epi16            loads 16-bit elements under a mask
//   _mm512_permutex2var_epi16           selects 16-bit elements of two registers by index
//   _mm512_store_si512                  stores 64 aligned bytes
//   _mm_prefetch                        prefetches a cache line
#pragma once
#include "matrix.h"

#if defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && \
    defined(__AVX512BW__) && defined(__linux__)
#define HAS_TILES

#include <immintrin.h>

#define SIDE 16   // rows of a tile, columns of sums
#define DEPTH 32  // inputs of a tile
#define TILE_SIZE (SIDE * DEPTH)
#define TILE_BYTES 1024         // of operands and of sums
#define PAIR (2 * TILE_SIZE)    // two adjacent tiles, one of each panel of a pair
#define SUMS (4 * SIDE * SIDE)  // 32 x 32 sums: tiles (0, 0), (0, 1), (1, 0), (1, 1)
// Compiler barrier: compilers do not know which memory the tile instructions read and write.
#define COMPILER_BARRIER() __asm__ volatile("" ::: "memory")

// The operand of _tile_loadconfig, in the layout that the processor defines.
typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} TileShapes;

typedef struct {
    const uint16_t *data;
    i64 stride;      // elements from row to row
    int transposed;  // transposed with respect to C = A B
} Operand;

// Location of a pair of panels, packed or directly in the matrix.
typedef struct {
    const char *first, *second;
    i64 row, step;  // bytes from row to row of a tile, and from tile to tile
} PanelPair;

ALWAYS_INLINE PanelPair packed_panels(const void *tiles) {
    return (PanelPair){tiles, (const char *)tiles + TILE_BYTES, 64, 2 * TILE_BYTES};
}

// Configures all eight tiles as 16 rows x 64 bytes.
static inline void configure_tiles(void) {
    TileShapes shapes = {.palette = 1};
    for (int i = 0; i < 8; i++) shapes.rows[i] = SIDE, shapes.row_bytes[i] = 64;
    COMPILER_BARRIER();
    _tile_loadconfig(&shapes);
}

// Number of panels of `size` rows or columns, rounded up to complete pairs.
static inline i64 even_panels(i64 size) { return (size + 2 * SIDE - 1) / (2 * SIDE) * 2; }

// Transposes 16 x 16 elements of 32 bits: 2 x 2 and 4 x 4 blocks within the 128-bit parts of the
// registers (unpack), then the parts themselves (shuffle).
static inline void transpose_16x16(__m512i r[16]) {
    __m512i t[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
            r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
        }
#pragma GCC unroll 16
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 16; j += 8) {
            t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0x88);
            t[i + j + 4] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0xdd);
        }
#pragma GCC unroll 16
    for (int i = 0; i < 8; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}

// Mask of the first `count` of 32 lanes.
static inline __mmask32 first_of(i64 count) {
    return count >= 32 ? ~0u : count <= 0 ? 0u : (1u << count) - 1;
}

// Stores 16 registers as a tile, transposed if `transposed`.
static inline void store_tile(__m512i r[16], int transposed, uint16_t *tile) {
    if (transposed) transpose_16x16(r);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) _mm512_store_si512(tile + i * DEPTH, r[i]);
}

// Packs a tile from 16 rows of x[rows][columns]; beyond the edges it is zero.
static inline void pack_rows(const uint16_t *x, i64 stride, i64 rows, i64 columns, int transposed,
                             uint16_t *tile) {
    __m512i r[16];
    __mmask32 there = first_of(columns);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++)
        r[i] = _mm512_maskz_loadu_epi16(i < rows ? there : 0, x + i * stride);
    store_tile(r, transposed, tile);
}

// Packs two adjacent tiles from 32 rows; every two rows are interleaved to VNNI pairs.
static inline void pack_pairs(const uint16_t *x, i64 stride, i64 rows, i64 columns, int transposed,
                              uint16_t *tiles) {
    __m512i left[16], right[16];
    __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,
                                     39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    __mmask32 there = first_of(columns);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++, x += 2 * stride) {
        __m512i even = _mm512_maskz_loadu_epi16(2 * i < rows ? there : 0, x);
        __m512i odd = _mm512_maskz_loadu_epi16(2 * i + 1 < rows ? there : 0, x + stride);
        left[i] = _mm512_permutex2var_epi16(even, first, odd);
        right[i] = _mm512_permutex2var_epi16(even, second, odd);
    }
    store_tile(left, transposed, tiles);
    store_tile(right, transposed, tiles + TILE_SIZE);
}

// Which tiles of an operand are packed.
typedef struct {
    i64 size, depth;        // of the operand: rows of A or columns of B, and inputs
    i64 panel, num_panels;  // first panel, and how many
    i64 input, tiles;       // first input, and tiles of each panel from there on
    i64 pitch;              // tiles of a panel in the packed operand
    int interleaved;        // rows run along the inputs: every two are interleaved to VNNI pairs
} Packing;

// Packs panels as the first tiles of [num_panels / 2][pitch][2][tile].
static inline void pack_panels(const Operand *x, const Packing p, uint16_t *out) {
    const i64 size = p.size, depth = p.depth;
    for (i64 t = 0; t < p.tiles; t++)
        for (i64 i = 0; i < p.num_panels; i++) {
            i64 k = p.input + t * DEPTH, at = (p.panel + i) * SIDE;
            uint16_t *tile = out + (i / 2 * p.pitch + t) * PAIR + i % 2 * TILE_SIZE;
            if (!p.interleaved)
                pack_rows(x->data + at * x->stride + k, x->stride, size - at, depth - k,
                          x->transposed, tile);
            else if (i % 2 == 0) {
                // the hardware prefetcher detects no pattern in cache lines of 32 distant rows
                for (i64 r = 0; r < min_(DEPTH, depth - k - DEPTH); r++)
                    _mm_prefetch((const char *)(x->data + (k + DEPTH + r) * x->stride + at),
                                 _MM_HINT_T0);
                pack_pairs(x->data + k * x->stride + at, x->stride, depth - k, size - at,
                           x->transposed, tile);
            }
        }
}

// Sets the four tiles of sums to zero, or loads them.
ALWAYS_INLINE void begin_sums(int starts, const float *sums) {
    COMPILER_BARRIER();
    if (starts) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, sums, 64);
        _tile_loadd(1, sums + 256, 64);
        _tile_loadd(2, sums + 512, 64);
        _tile_loadd(3, sums + 768, 64);
    }
}

// Stores the four tiles of sums.
ALWAYS_INLINE void end_sums(float *sums) {
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
    COMPILER_BARRIER();
}

// sums[2][2][tile of C] (+)= two panels of A times two of B, over `count` tiles that are in L1.
// Four tile products share four loads.
ALWAYS_INLINE void four_tiles(i64 count, PanelPair a, PanelPair b, int starts, float *sums) {
    begin_sums(starts, sums);
    for (i64 k = 0; k < count; k++) {
        _tile_loadd(4, a.first, a.row);
        _tile_loadd(6, b.first, b.row);
        _tile_loadd(7, b.second, b.row);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, a.second, a.row);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        a.first += a.step, a.second += a.step, b.first += b.step, b.second += b.step;
    }
    end_sums(sums);
}

#endif
