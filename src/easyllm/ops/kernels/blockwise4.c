// Weights in 4-bit codes with one scale per block (NF4, FP4): dequantization, and products with a
// few activation rows.
//
// Terms
//   N, K       outputs and inputs of a weight matrix
//   code       4-bit index into the codebook
//   codebook   the 16 values in -1 .. 1 that codes stand for
//   block      BLOCK consecutive weights of the flat matrix, which share a scale; blocks run over
//              row ends, and the last one may be short
//   absmax     the scale of a block: its largest absolute value
//   nested     quantization of the absmax values themselves, less their mean, in blocks of NESTED:
//              absmax = nested_map[code] * nested_absmax[block / NESTED] + nested_offset
//
// Data layout: weights are row-major [N][K]; the codes of weights 2 i and 2 i + 1 are the high and
// the low half of byte i.
//
// Built with -ffp-contract=off: a scale is a product and a sum, each rounded, as in bitsandbytes
// and in the PyTorch reference. A weight is the product of its scale and an entry of the codebook.
#include "cpu.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

#define BLOCK 64
#define NESTED 256
#define FEW_ROWS 4
#define CHAINS 4  // independent sums of a dot product, which hide the latency of an addition

typedef struct {
    const uint8_t *codes;         // [N K / 2], rounded up
    const void *absmax;           // [blocks]: fp32, or uint8 codes if nested_map is not NULL
    const float *nested_map;      // [256] or NULL
    const float *nested_absmax;   // [blocks / NESTED], rounded up, or NULL
    const float *nested_offset;   // one value, or NULL
    const float *codebook;        // [16]
    i64 outputs, inputs;
} Blockwise4;

static inline float scale_of(const Blockwise4 *w, i64 block) {
    if (!w->nested_map) return ((const float *)w->absmax)[block];
    float relative = w->nested_map[((const uint8_t *)w->absmax)[block]];
    return relative * w->nested_absmax[block / NESTED] + *w->nested_offset;
}

// out[0 .. BLOCK) = the weights of a complete block
#if defined(__AVX2__)
static inline void whole_block(const uint8_t *codes, const float *codebook, float scale,
                               float *out) {
    const __m128i low_half = _mm_set1_epi8(15);
#ifdef __AVX512F__
    __m512 values = _mm512_mul_ps(_mm512_loadu_ps(codebook), _mm512_set1_ps(scale));
#else
    __m256 scales = _mm256_set1_ps(scale);
    __m256 first = _mm256_mul_ps(_mm256_loadu_ps(codebook), scales);
    __m256 second = _mm256_mul_ps(_mm256_loadu_ps(codebook + 8), scales);
#endif
    for (int i = 0; i < BLOCK; i += 32) {
        __m128i bytes = _mm_loadu_si128((const __m128i *)(codes + i / 2));
        __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), low_half);
        __m128i low = _mm_and_si128(bytes, low_half);
        __m128i ordered[2] = {_mm_unpacklo_epi8(high, low), _mm_unpackhi_epi8(high, low)};
        for (int part = 0; part < 2; part++) {
            float *to = out + i + 16 * part;
#ifdef __AVX512F__
            _mm512_storeu_ps(
                to, _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(ordered[part]), values));
#else
            for (int half = 0; half < 2; half++) {
                __m256i code = _mm256_cvtepu8_epi32(
                    half ? _mm_unpackhi_epi64(ordered[part], ordered[part]) : ordered[part]);
                // a permutation reads the lowest three bits of a code; the fourth selects the table
                __m256 is_second = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28));
                _mm256_storeu_ps(to + 8 * half,
                                 _mm256_blendv_ps(_mm256_permutevar8x32_ps(first, code),
                                                  _mm256_permutevar8x32_ps(second, code),
                                                  is_second));
            }
#endif
        }
    }
}
#else
static inline void whole_block(const uint8_t *codes, const float *codebook, float scale,
                               float *out) {
    float values[16];
    for (int i = 0; i < 16; i++) values[i] = codebook[i] * scale;
    for (int i = 0; i < BLOCK / 2; i++) {
        out[2 * i] = values[codes[i] >> 4];
        out[2 * i + 1] = values[codes[i] & 15];
    }
}
#endif

// out[0 .. count) = weights first .. first + count of the flat matrix
static void unpack(const Blockwise4 *w, i64 first, i64 count, float *out) {
    const i64 end = first + count;
    while (first < end) {
        i64 block = first / BLOCK, stop = min_(end, (block + 1) * BLOCK);
        float scale = scale_of(w, block);
        if (stop - first == BLOCK) {
            whole_block(w->codes + first / 2, w->codebook, scale, out);
            out += BLOCK;
        } else {
            for (i64 i = first; i < stop; i++) {
                int code = i & 1 ? w->codes[i / 2] & 15 : w->codes[i / 2] >> 4;
                *out++ = w->codebook[code] * scale;
            }
        }
        first = stop;
    }
}

// out[count][K] = rows first .. first + count of the weight, in `dtype`
void blockwise4_rows(const Blockwise4 *w, i64 first, i64 count, void *out, int dtype) {
    const i64 inputs = w->inputs;
#pragma omp parallel
    {
        float *row = dtype == FP32 ? NULL : floats(inputs);
#pragma omp for schedule(static)
        for (i64 n = 0; n < count; n++) {
            char *to = (char *)out + n * inputs * element_size(dtype);
            unpack(w, (first + n) * inputs, inputs, row ? row : (float *)to);
            if (row) store_row(to, dtype, inputs, row);
        }
        free(row);
    }
}

// The order of the sum is fixed, whatever the number of rows.
static inline float dot(const float *a, const float *b, i64 count) {
    vec sums[CHAINS] = {{0}};
    i64 i = 0;
    for (; i + CHAINS * LANES <= count; i += CHAINS * LANES)
        for (int j = 0; j < CHAINS; j++)
            sums[j] += *(const vec *)(a + i + j * LANES) * *(const vec *)(b + i + j * LANES);
    float sum = lane_sum(folded(sums[0] + sums[1] + (sums[2] + sums[3])));
    for (; i < count; i++) sum += a[i] * b[i];
    return sum;
}

// y[rows][N] = x[rows][K] W^T + bias for at most FEW_ROWS rows; x and y have `dtype`, bias is fp32
// or NULL. A row of the weight is dequantized once, into the L1 cache.
void blockwise4_linear(const Blockwise4 *w, const void *x, void *y, const float *bias, int dtype,
                       i64 rows) {
    const i64 inputs = w->inputs, outputs = w->outputs;
    if (rows > FEW_ROWS) abort();
    float *wide = floats(rows * inputs);
    load_row(x, dtype, rows * inputs, wide);
#pragma omp parallel
    {
        float *row = floats(inputs);
#pragma omp for schedule(static)
        for (i64 n = 0; n < outputs; n++) {
            unpack(w, n * inputs, inputs, row);
            for (i64 m = 0; m < rows; m++) {
                float sum = dot(row, wide + m * inputs, inputs) + (bias ? bias[n] : 0);
                i64 at = m * outputs + n;
                if (dtype == FP32) ((float *)y)[at] = sum;
                else ((uint16_t *)y)[at] = float_to_bf16(sum);
            }
        }
        free(row);
    }
    free(wide);
}
