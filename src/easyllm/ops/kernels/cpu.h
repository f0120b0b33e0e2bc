// Shared by the CPU kernels: number formats, a vectorisable exp, a small matrix product.
//
// Plain C with GCC vector extensions, which clang knows as well; no intrinsics, so that it builds on any processor.
// No -ffast-math: it can change the floating-point mode of the whole process.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int64_t i64;
#define ALWAYS_INLINE static inline __attribute__((always_inline))
enum { FP32 = 0, BF16 = 1, INT8 = 2, INT4 = 3 };

// A vec is one register; where the processor has narrower ones than the compiler is told of, sums would lie in memory.
#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));

// Eight floats, for kernels whose result for a row must have the same bits whatever else is computed beside it:
// their sums are written out, so that no compiler chooses another order for another number of rows.
typedef float lane8 __attribute__((vector_size(32), aligned(4)));
typedef int32_t index8 __attribute__((vector_size(32)));

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (index8){__VA_ARGS__})
#endif

// sums of neighbours, two of a's and two of b's in each half
static inline lane8 pair_sums(lane8 a, lane8 b) {
    return SHUFFLE(a, b, 0, 2, 8, 10, 4, 6, 12, 14) + SHUFFLE(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
}

// element j is the sum of a[j]'s lanes
static inline lane8 sums_of(const lane8 a[8]) {
    lane8 low = pair_sums(pair_sums(a[0], a[1]), pair_sums(a[2], a[3]));
    lane8 high = pair_sums(pair_sums(a[4], a[5]), pair_sums(a[6], a[7]));
    return SHUFFLE(low, high, 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(low, high, 4, 5, 6, 7, 12, 13, 14, 15);
}

// a register's halves added, where it has two
static inline lane8 folded(vec a) {
#if LANES == 8
    return a;
#elif defined(__clang__) || __GNUC__ >= 12
    return SHUFFLE(a, a, 0, 1, 2, 3, 4, 5, 6, 7) + SHUFFLE(a, a, 8, 9, 10, 11, 12, 13, 14, 15);
#else
    lane8 halves[2];
    memcpy(halves, &a, sizeof(a));
    return halves[0] + halves[1];
#endif
}

static inline float lane_sum(lane8 a) {
    a += SHUFFLE(a, a, 4, 5, 6, 7, 0, 1, 2, 3);
    a += SHUFFLE(a, a, 2, 3, 0, 1, 6, 7, 4, 5);
    return a[0] + a[1];
}

// asks for memory that is read soon; any address may be named
ALWAYS_INLINE void fetch(const void *from, i64 bytes) {
    for (i64 at = 0; at < bytes; at += 64) __builtin_prefetch((const char *)from + at);
}

static inline i64 min_(i64 a, i64 b) { return a < b ? a : b; }
static inline i64 max_(i64 a, i64 b) { return a > b ? a : b; }

static inline float bf16_to_float(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

static inline uint16_t float_to_bf16(float x) {  // round to nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? (uint16_t)((bits >> 16) | 0x40) : (uint16_t)rounded;
}

// out[0..n) = values of a row stored as `dtype`
static inline void load_row(const void *row, int dtype, i64 n, float *restrict out) {
    if (dtype == BF16) {
        const uint16_t *x = row;
#pragma omp simd
        for (i64 i = 0; i < n; i++) out[i] = bf16_to_float(x[i]);
    } else {
        memcpy(out, row, n * sizeof(float));
    }
}

static inline void store_row(void *row, int dtype, i64 n, const float *restrict values) {
    if (dtype == BF16) {
        uint16_t *x = row;
#pragma omp simd
        for (i64 i = 0; i < n; i++) x[i] = float_to_bf16(values[i]);
    } else {
        memcpy(row, values, n * sizeof(float));
    }
}

static inline i64 element_size(int dtype) { return dtype == BF16 ? 2 : 4; }

// e^x to about 2 units in the last place: x = n ln2 + r, a polynomial in r, n into the exponent (Cephes' constants)
static inline float exp_(float x) {
    x = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
    float n = rintf(x * 1.44269504088896341f);
    float r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t e = ((int32_t)n + 127) << 23;
    float scale;
    memcpy(&scale, &e, 4);
    return p * scale;
}

static inline float sigmoid_(float x) { return 1.0f / (1.0f + exp_(-x)); }

// Sums of a tile stay in registers: 24 of AVX-512's 32, 12 of AVX2's 16, 24 of NEON's 32 (where a vec is two of them).
#define TILE_ROWS 6
#ifdef __AVX512F__
#define TILE_VECS 4
#else
#define TILE_VECS 2
#endif

// c[ROWS][VECS*LANES] += a[ROWS][depth] b[depth][VECS*LANES]; element (i, k) of a lies at a[i*ai + k*ak]
#define TILE(NAME, ROWS, VECS)                                                                      \
    static inline void NAME(i64 depth, const float *a, i64 ai, i64 ak, const float *b, i64 ldb,     \
                            float *c, i64 ldc) {                                                    \
        vec acc[ROWS][VECS];                                                                        \
        for (int i = 0; i < ROWS; i++)                                                              \
            for (int j = 0; j < VECS; j++) acc[i][j] = *(const vec *)(c + i * ldc + j * LANES);     \
        for (i64 k = 0; k < depth; k++) {                                                           \
            vec row[VECS];                                                                          \
            for (int j = 0; j < VECS; j++) row[j] = *(const vec *)(b + k * ldb + j * LANES);        \
            for (int i = 0; i < ROWS; i++) {                                                        \
                float x = a[i * ai + k * ak];                                                       \
                for (int j = 0; j < VECS; j++) acc[i][j] += x * row[j];                             \
            }                                                                                       \
        }                                                                                           \
        for (int i = 0; i < ROWS; i++)                                                              \
            for (int j = 0; j < VECS; j++) *(vec *)(c + i * ldc + j * LANES) = acc[i][j];           \
    }
TILE(tile_wide, TILE_ROWS, TILE_VECS)
TILE(tile_narrow, TILE_ROWS, 1)
TILE(row_wide, 1, TILE_VECS)
TILE(row_narrow, 1, 1)

// c[rows][cols] += a b, cols a multiple of LANES
static inline void matmul_add(i64 rows, i64 cols, i64 depth, const float *a, i64 ai, i64 ak,
                              const float *b, i64 ldb, float *c, i64 ldc) {
    i64 i = 0;
    for (; i + TILE_ROWS <= rows; i += TILE_ROWS) {
        i64 j = 0;
        for (; j + TILE_VECS * LANES <= cols; j += TILE_VECS * LANES)
            tile_wide(depth, a + i * ai, ai, ak, b + j, ldb, c + i * ldc + j, ldc);
        for (; j < cols; j += LANES)
            tile_narrow(depth, a + i * ai, ai, ak, b + j, ldb, c + i * ldc + j, ldc);
    }
    for (; i < rows; i++) {
        i64 j = 0;
        for (; j + TILE_VECS * LANES <= cols; j += TILE_VECS * LANES)
            row_wide(depth, a + i * ai, ai, ak, b + j, ldb, c + i * ldc + j, ldc);
        for (; j < cols; j += LANES)
            row_narrow(depth, a + i * ai, ai, ak, b + j, ldb, c + i * ldc + j, ldc);
    }
}

static inline float *floats(i64 n) {  // zeroed, aligned to a cache line
    void *p = NULL;
    if (posix_memalign(&p, 64, (size_t)(n > 0 ? n : 1) * sizeof(float))) abort();
    memset(p, 0, (size_t)(n > 0 ? n : 1) * sizeof(float));
    return p;
}
