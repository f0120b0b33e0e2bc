// The matrix unit of processors that have AMX: tiles of bf16, how they are packed, and four products that share their loads.
//
// A tile of A has 16 rows x 32 inputs; one of B 32 inputs x 16 columns, with pairs of inputs side by side; a tile of sums
// 16 x 16 in fp32. A strip is 16 rows of A or 16 columns of B; strips lie in pairs, [tiles][2][tile].
#pragma once
#include "matrix.h"

#if defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__linux__)
#define HAS_TILES

#include <immintrin.h>

#define SIDE 16   // rows of a tile, columns of sums
#define DEPTH 32  // inputs of a tile
#define TILE_SIZE (SIDE * DEPTH)
#define TILE_BYTES 1024       // of operands and of sums
#define PAIR (2 * TILE_SIZE)  // tiles of two strips that lie beside each other
#define SUMS (4 * SIDE * SIDE)  // 32 x 32 sums: tiles (0, 0), (0, 1), (1, 0), (1, 1)
// What memory these instructions read, compilers are not told.
#define MEMORY_IS_READ() __asm__ volatile("" ::: "memory")

typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} TileShapes;

typedef struct {
    const uint16_t *data;
    i64 stride;  // elements from row to row
    int turned;  // rows run along the other dimension than in C = A B
} Operand;

// How a pair of strips lies: packed, or where the matrix is.
typedef struct {
    const char *first, *second;
    i64 row, step;  // bytes from row to row of a tile, from tile to tile
} Strips;

ALWAYS_INLINE Strips packed_strips(const void *tiles) {
    return (Strips){tiles, (const char *)tiles + TILE_BYTES, 64, 2 * TILE_BYTES};
}

static inline void begin_whole_tiles(void) {
    TileShapes shapes = {.palette = 1};
    for (int i = 0; i < 8; i++) shapes.rows[i] = SIDE, shapes.row_bytes[i] = 64;
    MEMORY_IS_READ();
    _tile_loadconfig(&shapes);
}

static inline i64 even_strips(i64 size) { return (size + 2 * SIDE - 1) / (2 * SIDE) * 2; }

static inline void turn(__m512i r[16]) {  // 16 x 16 numbers of 32 bits
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

static inline __mmask32 first_of(i64 count) { return count >= 32 ? ~0u : count <= 0 ? 0u : (1u << count) - 1; }

static inline void put(__m512i r[16], int turned, uint16_t *tile) {
    if (turned) turn(r);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) _mm512_store_si512(tile + i * DEPTH, r[i]);
}

// A tile of x[rows][columns]: 16 rows as they are; what is beyond the edges is zero.
static inline void pack_rows(const uint16_t *x, i64 stride, i64 rows, i64 columns, int turned, uint16_t *tile) {
    __m512i r[16];
    __mmask32 there = first_of(columns);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) r[i] = _mm512_maskz_loadu_epi16(i < rows ? there : 0, x + i * stride);
    put(r, turned, tile);
}

// Two tiles beside each other: 32 rows, of which every two are laced into one.
static inline void pack_pairs(const uint16_t *x, i64 stride, i64 rows, i64 columns, int turned, uint16_t *tiles) {
    __m512i left[16], right[16], first = _mm512_set_epi16(
        47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    __mmask32 there = first_of(columns);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++, x += 2 * stride) {
        __m512i even = _mm512_maskz_loadu_epi16(2 * i < rows ? there : 0, x);
        __m512i odd = _mm512_maskz_loadu_epi16(2 * i + 1 < rows ? there : 0, x + stride);
        left[i] = _mm512_permutex2var_epi16(even, first, odd);
        right[i] = _mm512_permutex2var_epi16(even, second, odd);
    }
    put(left, turned, tiles);
    put(right, turned, tiles + TILE_SIZE);
}

// Strips s to s + count of a matrix, `tiles` of each from input k0 on, into [count / 2][pitch][2][tile], whose first they
// are. `laced`: its rows run along the inputs, so every two of them are laced.
static inline void pack_strips(const Operand *x, i64 size, i64 depth, i64 s, i64 count, i64 k0, i64 tiles, i64 pitch, int laced,
                               uint16_t *out) {
    for (i64 t = 0; t < tiles; t++)
        for (i64 i = 0; i < count; i++) {
            i64 k = k0 + t * DEPTH, at = (s + i) * SIDE;
            uint16_t *tile = out + (i / 2 * pitch + t) * PAIR + i % 2 * TILE_SIZE;
            if (!laced)
                pack_rows(x->data + at * x->stride + k, x->stride, size - at, depth - k, x->turned, tile);
            else if (i % 2 == 0) {
                // the processor sees no pattern in lines of 32 rows far from each other
                for (i64 r = 0; r < min_(DEPTH, depth - k - DEPTH); r++)
                    _mm_prefetch((const char *)(x->data + (k + DEPTH + r) * x->stride + at), _MM_HINT_T0);
                pack_pairs(x->data + k * x->stride + at, x->stride, depth - k, size - at, x->turned, tile);
            }
        }
}

ALWAYS_INLINE void begin_sums(int starts, const float *sums) {
    MEMORY_IS_READ();
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

ALWAYS_INLINE void end_sums(float *sums) {
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
    MEMORY_IS_READ();
}

// sums[2][2][tile of C] (+)= A's two strips times B's, over `count` tiles that are in the first cache
ALWAYS_INLINE void four_tiles(i64 count, Strips a, Strips b, int starts, float *sums) {
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
