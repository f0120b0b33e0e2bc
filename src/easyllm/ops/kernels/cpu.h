// Helpers shared by the CPU kernels: dtype codes, bf16 conversion, vector types, exp, a small GEMM.
//
// Terms
//   vec     one SIMD register of LANES floats: 16 with AVX-512, else 8
//   lane    one element of a register
//   lane8   a vector of exactly 8 floats on every processor
//   FMA     fused multiply-add, a * b + c rounded once; compilers form it from the expressions
//   tile    a block of outputs whose sums stay in registers, TILE_ROWS x TILE_VECS of them
//   bf16    the upper 16 bits of an fp32 value, stored as uint16_t
//
// Data layout: matrices are row-major; ld* and *stride are distances in elements between rows.
//
// Plain C with GCC vector extensions, which clang also supports; no intrinsics, so it builds on any
// processor. -ffast-math is not used: it can change the floating-point mode of the whole process.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int64_t i64;
#define ALWAYS_INLINE static inline __attribute__((always_inline))
// A function of which there is one copy of machine code: inlined or specialized copies could be
// compiled to other instructions, and so round differently.
#ifdef __clang__
#define ONE_COPY __attribute__((noinline))
#define WITHOUT_FMA ONE_COPY
#else
#define ONE_COPY __attribute__((noinline, noclone))
#define WITHOUT_FMA __attribute__((noinline, noclone, optimize("fp-contract=off")))
#endif
enum { FP32 = 0, BF16 = 1, INT8 = 2, INT4 = 3, GROUPED = 4, FP16 = 5 };

// A vec must be one register of the target: if it is wider, accumulators spill to memory.
#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));

// Keeps a vec that is used several times in a register: compilers otherwise load it from memory for
// each use, which takes more of the load units than the multiply-adds leave free.
#ifdef __AVX2__
#define KEEP_IN_REGISTER(x) __asm__("" : "+v"(x))
#else
#define KEEP_IN_REGISTER(x) ((void)0)
#endif

// Eight floats, for batch-invariant kernels: their sums are written out explicitly, so that the
// compiler cannot choose a different summation order for a different number of rows.
typedef float lane8 __attribute__((vector_size(32), aligned(4)));
typedef int32_t index8 __attribute__((vector_size(32)));

// Selects elements of a and b by index; indices from the vector length on refer to b.
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (index8){__VA_ARGS__})
#endif

// Horizontal add: sums of adjacent lanes; each half of the result has two sums of a, then two of b.
static inline lane8 pair_sums(lane8 a, lane8 b) {
    return SHUFFLE(a, b, 0, 2, 8, 10, 4, 6, 12, 14) + SHUFFLE(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
}

// Returns a vector whose element j is the sum of the lanes of a[j].
static inline lane8 sums_of(const lane8 a[8]) {
    lane8 low = pair_sums(pair_sums(a[0], a[1]), pair_sums(a[2], a[3]));
    lane8 high = pair_sums(pair_sums(a[4], a[5]), pair_sums(a[6], a[7]));
    return SHUFFLE(low, high, 0, 1, 2, 3, 8, 9, 10, 11) +
           SHUFFLE(low, high, 4, 5, 6, 7, 12, 13, 14, 15);
}

// Adds the two halves of a 16-lane register; an 8-lane register is returned unchanged.
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

// Returns the sum of all lanes, in a fixed order.
static inline float lane_sum(lane8 a) {
    a += SHUFFLE(a, a, 4, 5, 6, 7, 0, 1, 2, 3);
    a += SHUFFLE(a, a, 2, 3, 0, 1, 6, 7, 4, 5);
    return a[0] + a[1];
}

// Prefetches `bytes` from `from`. Any address is allowed: a prefetch never faults.
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

static inline float rounded(float x) { return bf16_to_float(float_to_bf16(x)); }

// Loads n values of a row of `dtype` to out[0..n) as fp32.
static inline void load_row(const void *row, int dtype, i64 n, float *restrict out) {
    if (dtype == BF16) {
        const uint16_t *x = row;
#pragma omp simd
        for (i64 i = 0; i < n; i++) out[i] = bf16_to_float(x[i]);
    } else {
        memcpy(out, row, n * sizeof(float));
    }
}

// Stores n fp32 values to a row of `dtype`.
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

// e^x to about 2 ULP: with x = n ln2 + r, a polynomial in r (constants of Cephes), scaled by 2^n
// through the exponent bits.
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

// The sums of a tile stay in registers: 24 of AVX-512's 32, 12 of AVX2's 16, 24 of NEON's 32 (where
// a vec takes two registers).
#define TILE_ROWS 6
#ifdef __AVX512F__
#define TILE_VECS 4
#else
#define TILE_VECS 2
#endif

// c[ROWS][VECS*LANES] += a[ROWS][depth] b[depth][VECS*LANES]; element (i, k) of a is
// a[i*ai + k*ak].
#define TILE(NAME, ROWS, VECS)                                                                  \
    static inline void NAME(i64 depth, const float *a, i64 ai, i64 ak, const float *b, i64 ldb, \
                            float *c, i64 ldc) {                                                \
        vec acc[ROWS][VECS];                                                                    \
        for (int i = 0; i < ROWS; i++)                                                          \
            for (int j = 0; j < VECS; j++) acc[i][j] = *(const vec *)(c + i * ldc + j * LANES); \
        for (i64 k = 0; k < depth; k++) {                                                       \
            vec row[VECS];                                                                      \
            for (int j = 0; j < VECS; j++) row[j] = *(const vec *)(b + k * ldb + j * LANES);    \
            for (int i = 0; i < ROWS; i++) {                                                    \
                float x = a[i * ai + k * ak];                                                   \
                for (int j = 0; j < VECS; j++) acc[i][j] += x * row[j];                         \
            }                                                                                   \
        }                                                                                       \
        for (int i = 0; i < ROWS; i++)                                                          \
            for (int j = 0; j < VECS; j++) *(vec *)(c + i * ldc + j * LANES) = acc[i][j];       \
    }
TILE(tile_wide, TILE_ROWS, TILE_VECS)
TILE(tile_narrow, TILE_ROWS, 1)
TILE(row_wide, 1, TILE_VECS)
TILE(row_narrow, 1, 1)

// The left operand of a GEMM, possibly transposed: element (i, k) is data[i * row + k * column].
typedef struct {
    const float *data;
    i64 row, column;  // elements from row to row, and from column to column
} Left;

// GEMM: c[rows][cols] += a[rows][depth] b[depth][cols]; cols must be a multiple of LANES.
static inline void matmul_add(i64 rows, i64 cols, i64 depth, const Left a, const float *b, i64 ldb,
                              float *c, i64 ldc) {
    i64 i = 0;
    for (; i + TILE_ROWS <= rows; i += TILE_ROWS) {
        const float *x = a.data + i * a.row;
        i64 j = 0;
        for (; j + TILE_VECS * LANES <= cols; j += TILE_VECS * LANES)
            tile_wide(depth, x, a.row, a.column, b + j, ldb, c + i * ldc + j, ldc);
        for (; j < cols; j += LANES)
            tile_narrow(depth, x, a.row, a.column, b + j, ldb, c + i * ldc + j, ldc);
    }
    for (; i < rows; i++) {
        const float *x = a.data + i * a.row;
        i64 j = 0;
        for (; j + TILE_VECS * LANES <= cols; j += TILE_VECS * LANES)
            row_wide(depth, x, a.row, a.column, b + j, ldb, c + i * ldc + j, ldc);
        for (; j < cols; j += LANES)
            row_narrow(depth, x, a.row, a.column, b + j, ldb, c + i * ldc + j, ldc);
    }
}

// Allocates n floats, zeroed and aligned to a cache line.
static inline float *floats(i64 n) {
    void *p = NULL;
    if (posix_memalign(&p, 64, (size_t)(n > 0 ? n : 1) * sizeof(float))) abort();
    memset(p, 0, (size_t)(n > 0 ? n : 1) * sizeof(float));
    return p;
}
