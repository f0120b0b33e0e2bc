// The codes of quantized weights: unpacking, and dot products with those of activation rows. The
// processor-specific instructions of matrix.c, grouped.c and super.c are only here.
//
// Terms and data layout are those of matrix.h: code, group, block, chunk, lane, VNNI.
//
// Intrinsics (256-bit registers of AVX2)
//   _mm256_dpbusd(_avx)_epi32   VNNI: adds 4 products of unsigned x signed bytes to each int32 lane
//   _mm256_maddubs_epi16        products of unsigned x signed bytes, adjacent pairs added to int16
//   _mm256_madd_epi16           products of int16, adjacent pairs added to int32
//   _mm256_abs/sign_epi8        absolute values of bytes; bytes of a with the signs of b
//   _mm256_fmadd_ps             a b + c with one rounding
//   _mm256_cvtph_ps             converts 8 fp16 values to fp32
//   _mm256_cvtepu8/cvtepi8_epi32, _mm256_cvtepi32_ps   convert 8 bytes to int32, int32 to fp32
//   _mm256_packs_epi32/epi16    halves the width of signed values of two registers, saturating
//   _mm256_permutevar8x32_epi32 moves 32-bit elements to other places
//   _mm256_set1_epi32, _mm256_loadu_si256, _mm256_storeu_si256, _mm256_add_epi*   broadcast, load,
//                               store, add
#pragma once
#include "cpu.h"

#define GROUP 32   // inputs
#define OUTPUTS 8  // outputs of a block
#define ROW_TILE 4  // rows that are multiplied together

#ifdef __AVX2__
#include <immintrin.h>
#endif
#if (defined(__AVX512VNNI__) && defined(__AVX512VL__)) || defined(__AVXVNNI__)
#define HAS_VNNI
#endif

// a b + c, rounded once where the processor can: which of two products of a sum the compiler would
// fuse could depend on the number of rows, on which results must not.
static inline lane8 fused(lane8 a, lane8 b, lane8 c) {
#if defined(__AVX2__) && defined(__FMA__)
    return (lane8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

typedef uint8_t chunk __attribute__((vector_size(32), aligned(1)));

// In each lane, adds the products of 4 unsigned and 4 signed codes to `sum`.
#if defined(HAS_VNNI)
static inline __m256i four_products(__m256i sum, __m256i unsigned_codes, __m256i signed_codes) {
#ifdef __AVXVNNI__
    return _mm256_dpbusd_avx_epi32(sum, unsigned_codes, signed_codes);
#else
    return _mm256_dpbusd_epi32(sum, unsigned_codes, signed_codes);
#endif
}
#elif defined(__AVX2__)
static inline __m256i four_products(__m256i sum, __m256i unsigned_codes, __m256i signed_codes) {
    // at most 2 * 127 * 127, which fits in int16
    __m256i pairs = _mm256_maddubs_epi16(unsigned_codes, signed_codes);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#endif

#ifdef __AVX2__
// Broadcasts four codes to every lane.
static inline __m256i four_codes(const int8_t *x) {
    int32_t four;
    memcpy(&four, x, 4);
    return _mm256_set1_epi32(four);
}
#endif

// Lane r of the result: sum over the group of w[chunk][4 r + i] x[4 chunk + i], for w in 0..15.
static inline index8 products_int4(const chunk w[8], const int8_t *x) {
#if defined(__AVX2__) && !defined(HAS_VNNI)
    // sums of pairs are at most 8 * 2 * 15 * 127 = 30480, so all eight chunks fit in int16
    __m256i even = _mm256_maddubs_epi16((__m256i)w[0], four_codes(x));
    __m256i odd = _mm256_maddubs_epi16((__m256i)w[1], four_codes(x + 4));
    for (int c = 2; c < 8; c += 2) {
        even = _mm256_add_epi16(even, _mm256_maddubs_epi16((__m256i)w[c], four_codes(x + 4 * c)));
        odd = _mm256_add_epi16(
            odd, _mm256_maddubs_epi16((__m256i)w[c + 1], four_codes(x + 4 * c + 4)));
    }
    return (index8)_mm256_madd_epi16(_mm256_add_epi16(even, odd), _mm256_set1_epi16(1));
#elif defined(HAS_VNNI)
    __m256i even = _mm256_setzero_si256(), odd = even;
    for (int c = 0; c < 8; c += 2) {
        even = four_products(even, (__m256i)w[c], four_codes(x + 4 * c));
        odd = four_products(odd, (__m256i)w[c + 1], four_codes(x + 4 * c + 4));
    }
    return (index8)_mm256_add_epi32(even, odd);
#else
    index8 sum = {0};
    for (int c = 0; c < 8; c++)
        for (int r = 0; r < OUTPUTS; r++)
            for (int i = 0; i < 4; i++) sum[r] += (int)w[c][4 * r + i] * x[4 * c + i];
    return sum;
#endif
}

// The same for w in 0..31, whose sums do not fit in int16.
static inline index8 products_int5(const chunk w[8], const int8_t *x) {
#if defined(__AVX2__) && !defined(HAS_VNNI)
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i sum = _mm256_setzero_si256();
    for (int c = 0; c < 8; c += 4) {  // at most 4 * 2 * 31 * 127 = 31496
        __m256i pairs = _mm256_maddubs_epi16((__m256i)w[c], four_codes(x + 4 * c));
        for (int i = c + 1; i < c + 4; i++)
            pairs = _mm256_add_epi16(
                pairs, _mm256_maddubs_epi16((__m256i)w[i], four_codes(x + 4 * i)));
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones));
    }
    return (index8)sum;
#else
    return products_int4(w, x);
#endif
}

// Absolute values of signed codes.
static inline chunk absolute(chunk w) {
#ifdef __AVX2__
    return (chunk)_mm256_abs_epi8((__m256i)w);
#else
    typedef int8_t codes __attribute__((vector_size(32), aligned(1)));
    codes negative = (codes)w < 0;
    return (chunk)(((codes)w ^ negative) - negative);
#endif
}

// The same for w in -127..127 and `rows` rows x, `stride` codes apart. AVX2 multiplies unsigned by
// signed bytes: |w| by x with the sign of w.
ALWAYS_INLINE void products_int8(const chunk *w, const int8_t *x, i64 stride, int rows,
                                 index8 *out) {
#ifdef __AVX2__
    // one row alone: two sums, so that an addition need not wait for the one before it
    const int chains = rows == 1 ? 2 : 1;
    __m256i sums[ROW_TILE + 1];
    for (int m = 0; m <= rows; m++) sums[m] = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int c = 0; c < 8; c++) {
        __m256i a = (__m256i)w[c], size = _mm256_abs_epi8(a);
        for (int m = 0; m < rows; m++) {
            __m256i b = _mm256_sign_epi8(four_codes(x + m * stride + 4 * c), a);
            sums[m + c % chains] = four_products(sums[m + c % chains], size, b);
        }
    }
    if (rows == 1) sums[0] = _mm256_add_epi32(sums[0], sums[1]);
    for (int m = 0; m < rows; m++) out[m] = (index8)sums[m];
#else
    for (int m = 0; m < rows; m++, x += stride) {
        out[m] = (index8){0};
        for (int c = 0; c < 8; c++)
            for (int r = 0; r < OUTPUTS; r++)
                for (int i = 0; i < 4; i++)
                    out[m][r] += (int)(int8_t)w[c][4 * r + i] * x[4 * c + i];
    }
#endif
}

// The same for w in -32..31, for the first 16 inputs and for the others. Signs as in products_int8;
// `sizes` are the absolute values of w.
ALWAYS_INLINE void products_int6(const chunk w[8], const chunk sizes[8], const int8_t *x,
                                 index8 half[2]) {
    for (int h = 0; h < 2; h++) {
#if defined(__AVX2__) && !defined(HAS_VNNI)
        __m256i pairs = _mm256_setzero_si256();
        for (int c = 4 * h; c < 4 * h + 4; c++) {  // at most 4 * 2 * 32 * 127 = 32512
            __m256i b = _mm256_sign_epi8(four_codes(x + 4 * c), (__m256i)w[c]);
            pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16((__m256i)sizes[c], b));
        }
        half[h] = (index8)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#elif defined(HAS_VNNI)
        __m256i sum = _mm256_setzero_si256();
        for (int c = 4 * h; c < 4 * h + 4; c++) {
            __m256i b = _mm256_sign_epi8(four_codes(x + 4 * c), (__m256i)w[c]);
            sum = four_products(sum, (__m256i)sizes[c], b);
        }
        half[h] = (index8)sum;
#else
        half[h] = (index8){0};
        for (int c = 4 * h; c < 4 * h + 4; c++)
            for (int r = 0; r < OUTPUTS; r++)
                for (int i = 0; i < 4; i++)
                    half[h][r] += (int)(int8_t)w[c][4 * r + i] * x[4 * c + i];
#endif
    }
}

// ---- codes of grouped.c and super.c, which describes the layouts

static inline i64 code_bytes(int bits) { return bits * 32; }

// The bits of x in `mask` after a shift to the left, or to the right if `left` is negative.
// Pairs of bytes are shifted: processors have no shift of single bytes, and the mask drops what
// crosses a byte.
ALWAYS_INLINE chunk shifted(chunk x, int left, uint8_t mask) {
    typedef uint16_t pairs __attribute__((vector_size(32), aligned(1)));
    return (chunk)(left < 0 ? (pairs)x >> -left : (pairs)x << left) & mask;
}

// Unpacks a group of codes of less than 8 bits to 8 chunks.
ALWAYS_INLINE void unpack_codes(const uint8_t *p, int bits, chunk out[8]) {
    if (bits >= 4) {
        for (int v = 0; v < 4; v++) {
            chunk both = *(const chunk *)(p + 32 * v);
            out[v] = both & 15, out[v + 4] = shifted(both, -4, 15);
        }
    } else {
        for (int v = 0; v < 2; v++) {
            chunk all = *(const chunk *)(p + 32 * v);
            for (int k = 0; k < 4; k++) out[v + 2 * k] = shifted(all, -2 * k, 3);
        }
    }
    if (bits == 3 || bits == 5) {
        chunk plane = *(const chunk *)(p + 32 * (bits - 1));
        for (int c = 0; c < 8; c++) out[c] |= shifted(plane, bits - 1 - c, 1 << (bits - 1));
    }
    if (bits == 6) {
        for (int v = 0; v < 2; v++) {
            chunk all = *(const chunk *)(p + 128 + 32 * v);
            for (int k = 0; k < 4; k++) out[v + 2 * k] |= shifted(all, 4 - 2 * k, 3 << 4);
        }
    }
}

// The codes of one output of a group; those of 8 bits are stored less 128.
static inline void group_row(const uint8_t *p, int bits, i64 lane, float out[GROUP]) {
    chunk chunks[8];
    if (bits == 8) memcpy(chunks, p, sizeof(chunks));
    else unpack_codes(p, bits, chunks);
    for (int c = 0; c < 8; c++) {
        for (int i = 0; i < 4; i++) {
            uint8_t code = chunks[c][4 * lane + i];
            out[4 * c + i] = bits == 8 ? (float)(int8_t)code : (float)code;
        }
    }
}

// Stores 32 codes in -127..127 as bytes.
static inline void store_codes(const index8 codes[4], int8_t *out) {
#ifdef __AVX2__
    __m256i low = _mm256_packs_epi32((__m256i)codes[0], (__m256i)codes[1]);
    __m256i high = _mm256_packs_epi32((__m256i)codes[2], (__m256i)codes[3]);
    // packs interleave the 128-bit halves of their operands
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
    _mm256_storeu_si256((__m256i *)out, bytes);
#else
    for (int i = 0; i < GROUP; i++) out[i] = (int8_t)codes[i / 8][i % 8];
#endif
}

// Convert eight bytes to fp32; a vector conversion would be compiled to eight scalar ones.
static inline lane8 bytes_to_floats(const uint8_t *p) {
#ifdef __AVX2__
    return (lane8)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
    lane8 out;
    for (int i = 0; i < 8; i++) out[i] = (float)p[i];
    return out;
#endif
}

static inline lane8 signed_bytes_to_floats(const uint8_t *p) {
#ifdef __AVX2__
    return (lane8)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
    lane8 out;
    for (int i = 0; i < 8; i++) out[i] = (float)(int8_t)p[i];
    return out;
#endif
}

// Converts eight fp16 values to fp32.
static inline lane8 halves_to_floats(const uint8_t *p) {
#ifdef __F16C__
    return (lane8)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#else
    lane8 out;
    // copies exponent and fraction, then scales by 2^(127 - 15); also correct for subnormals
    for (int i = 0; i < 8; i++) {
        uint16_t half;
        memcpy(&half, p + 2 * i, 2);
        uint32_t bits = (uint32_t)(half & 0x7fff) << 13, sign = (uint32_t)(half & 0x8000) << 16;
        float value;
        memcpy(&value, &bits, 4);
        value *= 0x1p112f;
        memcpy(&bits, &value, 4);
        bits |= sign;
        memcpy(&value, &bits, 4);
        out[i] = value;
    }
    return out;
#endif
}
