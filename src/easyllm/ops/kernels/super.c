// Products with weights whose scales are quantized, too: GGUF's K-quants, as files store them.
//
// Terms and layouts of codes are those of matrix.h and grouped.c. A super-block is 8 groups, 256
// inputs, of 8 outputs.
//
// Data layout: [N/8][K/256], and in each super-block 8 times the codes of a group, 8 bytes a and 8
// bytes b (one of each for every output), then fp16 values d and, only with minima, e of 8 outputs.
//
//   minima   4 or 5 bits   w = d a code - e b              a, b in 0 .. 63
//   scales   6 bits        w = d a (code - 32)             a for the group's first 16 inputs, b for
//                                                          the others, signed
#include "matrix.h"

#define GROUPS 8  // of a super-block

static inline i64 super_bytes(const Matrix *w) {
    return GROUPS * (code_bytes(w->bits) + 16) + (w->shift == SHIFT_SUPER_MINIMA ? 32 : 16);
}

// Callers pass constants for `bits` and `rows`, so that the sums stay in registers.
ALWAYS_INLINE void add_with_minima(const uint8_t *p, i64 supers, const int8_t *codes,
                                   const float *terms, int bits, int rows, lane8 *out) {
    const i64 bytes = code_bytes(bits), groups = supers * GROUPS;
    lane8 sum[ROW_TILE];
    for (int m = 0; m < rows; m++) sum[m] = (lane8){0};
    for (i64 s = 0; s < supers; s++, p += 32) {
        const uint8_t *parts = p + bytes;
        lane8 inner[ROW_TILE], below[ROW_TILE];
        for (int m = 0; m < rows; m++) inner[m] = below[m] = (lane8){0};
        for (i64 g = s * GROUPS; g < (s + 1) * GROUPS; g++, p += bytes + 16) {
            fetch(p + 4096, bytes);
            chunk unpacked[8];
            unpack_codes(p, bits, unpacked);
            lane8 a = bytes_to_floats(p + bytes);
            for (int m = 0; m < rows; m++) {
                const int8_t *x = codes + (m * groups + g) * GROUP;
                index8 products =
                    bits == 4 ? products_int4(unpacked, x) : products_int5(unpacked, x);
                lane8 factor = a * terms[(m * groups + g) * TERMS];
                inner[m] = fused(__builtin_convertvector(products, lane8), factor, inner[m]);
            }
        }
        // apart from the products, for which the registers are needed
        for (i64 g = s * GROUPS; g < (s + 1) * GROUPS; g++, parts += bytes + 16) {
            lane8 b = bytes_to_floats(parts + 8);
            for (int m = 0; m < rows; m++)
                below[m] = fused(b, (lane8){0} + terms[(m * groups + g) * TERMS + 1], below[m]);
        }
        // terms[1] is -8 u sum_k q (see matrix.h), hence the sign
        lane8 d = halves_to_floats(p), e = halves_to_floats(p + 16) * 0.125f;
        for (int m = 0; m < rows; m++) sum[m] = fused(e, below[m], fused(d, inner[m], sum[m]));
    }
    for (int m = 0; m < rows; m++) out[m] = sum[m];
}

ALWAYS_INLINE void add_with_scales(const uint8_t *p, i64 supers, const int8_t *codes,
                                   const float *terms, int rows, lane8 *out) {
    const i64 bytes = code_bytes(6), groups = supers * GROUPS;
    lane8 sum[ROW_TILE];
    for (int m = 0; m < rows; m++) sum[m] = (lane8){0};
    for (i64 s = 0; s < supers; s++, p += 16) {
        lane8 inner[ROW_TILE];
        for (int m = 0; m < rows; m++) inner[m] = (lane8){0};
        for (i64 g = s * GROUPS; g < (s + 1) * GROUPS; g++, p += bytes + 16) {
            fetch(p + 4096, bytes);
            chunk centred[8], sizes[8];
            unpack_codes(p, 6, centred);
            for (int c = 0; c < 8; c++) {
                centred[c] -= 32;
                sizes[c] = absolute(centred[c]);
            }
            lane8 a = signed_bytes_to_floats(p + bytes);
            lane8 b = signed_bytes_to_floats(p + bytes + 8);
            for (int m = 0; m < rows; m++) {
                index8 half[2];
                products_int6(centred, sizes, codes + (m * groups + g) * GROUP, half);
                lane8 both = fused(__builtin_convertvector(half[0], lane8), a,
                                   __builtin_convertvector(half[1], lane8) * b);
                lane8 u = (lane8){0} + terms[(m * groups + g) * TERMS];
                inner[m] = fused(both, u, inner[m]);
            }
        }
        lane8 d = halves_to_floats(p);
        for (int m = 0; m < rows; m++) sum[m] = fused(d, inner[m], sum[m]);
    }
    for (int m = 0; m < rows; m++) out[m] = sum[m];
}

void super_block(const Matrix *w, i64 block, const int8_t *codes, const float *terms, int rows,
                 lane8 *sum) {
    i64 supers = w->inputs / (GROUP * GROUPS);
    const uint8_t *p = (const uint8_t *)w->data + block * supers * super_bytes(w);
    if (w->bits == 4 && rows == 1) add_with_minima(p, supers, codes, terms, 4, 1, sum);
    else if (w->bits == 4) add_with_minima(p, supers, codes, terms, 4, ROW_TILE, sum);
    else if (w->bits == 5 && rows == 1) add_with_minima(p, supers, codes, terms, 5, 1, sum);
    else if (w->bits == 5) add_with_minima(p, supers, codes, terms, 5, ROW_TILE, sum);
    else if (rows == 1) add_with_scales(p, supers, codes, terms, 1, sum);
    else add_with_scales(p, supers, codes, terms, ROW_TILE, sum);
}

WITHOUT_FMA void super_row(const Matrix *w, i64 row, float *x) {
    i64 supers = w->inputs / (GROUP * GROUPS), bytes = code_bytes(w->bits), lane = row % OUTPUTS;
    i64 tail = super_bytes(w) - GROUPS * (bytes + 16);
    const uint8_t *p = (const uint8_t *)w->data + row / OUTPUTS * supers * super_bytes(w);
    for (i64 s = 0; s < supers; s++, p += tail) {
        const uint8_t *end = p + GROUPS * (bytes + 16);
        float d = halves_to_floats(end)[lane];
        float e = w->shift == SHIFT_SUPER_MINIMA ? halves_to_floats(end + 16)[lane] : 0.0f;
        for (i64 g = 0; g < GROUPS; g++, p += bytes + 16, x += GROUP) {
            group_row(p, w->bits, lane, x);
            for (int i = 0; i < GROUP; i++) {
                if (w->shift == SHIFT_SUPER_MINIMA)
                    x[i] = d * p[bytes + lane] * x[i] - e * p[bytes + 8 + lane];
                else
                    x[i] = d * (int8_t)p[bytes + (i < 16 ? 0 : 8) + lane] * (x[i] - 32.0f);
            }
        }
    }
}
