// Products with weights on grids of 2, 3, 4, 5 or 8 bits, as files store them (GPTQ, AWQ,
// compressed-tensors, GGUF): no value is rounded a second time.
//
// Terms and layouts are those of matrix.h: block, group, chunk, code, terms, lane. A span is one or
// more groups that share a scale.
//
// Data layout: [N/8][spans][parts], and in each part the codes of the span's groups, then 8 scales
// of 16 bits, then nothing, 8 zero points (uint8) or 8 minima (fp16). A group of codes is
//
//   8 bits   8 chunks of code - 128, signed
//   4 bits   4 vectors: chunk v in the low, chunk v + 4 in the high nibbles of vector v
//   5 bits   the same for the low 4 bits, then a vector whose bit c is bit 4 of chunk c
//   2 bits   2 vectors: chunk v + 2 k in bits 2 k and 2 k + 1 of vector v
//   3 bits   the same for the low 2 bits, then a vector whose bit c is bit 2 of chunk c
//   6 bits   the low 4 bits as for 4 bits, then the high 2 bits as for 2 bits (super.c)
//
// and stands for w = s (code - z), or with minima w = s code + m. Without zero points z is the
// middle code, 2^(bits - 1). With x = u q (see matrix.h) and the terms of a row,
//
//   sum_k w x  =  sum_spans s sum_groups (u sum_k code q - z u sum_k q)  +  m u sum_k q
//
// The last sum is over the codes, not over x: errors of the rounded row cancel where w is small.
#include "matrix.h"

static inline i64 header_bytes(int shift) {
    return 16 + (shift == SHIFT_ZEROS ? 8 : shift == SHIFT_MINIMA ? 16 : 0);
}

static inline lane8 scales_of(const uint8_t *p, int type) {
    if (type == FP16) return halves_to_floats(p);
    lane8 out;
    for (int i = 0; i < OUTPUTS; i++) {
        uint16_t value;
        memcpy(&value, p + 2 * i, 2);
        out[i] = bf16_to_float(value);
    }
    return out;
}

// Zero points divided by 8, the factor in terms[1], less 16 for codes stored less 128.
ALWAYS_INLINE lane8 zeros_of(const uint8_t *p, int bits, int shift) {
    float stored = bits == 8 ? 128.0f : 0.0f, middle = shift == SHIFT_MINIMA ? 0 : 1 << (bits - 1);
    lane8 out = (lane8){0} + (middle - stored) * 0.125f;
    for (int i = 0; shift == SHIFT_ZEROS && i < OUTPUTS; i++)
        out[i] = ((float)p[i] - stored) * 0.125f;
    return out;
}

// A block of a weight and the activation rows that it is multiplied by.
typedef struct {
    const uint8_t *data;
    i64 groups;
    int scale_type;
    const int8_t *codes;
    const float *terms;
} Product;

// Callers pass constants for `bits`, `shift` and `rows`, and for `span` if it is one group, so that
// the sums stay in registers.
ALWAYS_INLINE void add_block(Product a, int bits, int shift, i64 span, int rows, lane8 *out) {
    const uint8_t *p = a.data;
    const int8_t *codes = a.codes;
    const float *terms = a.terms;
    const i64 groups = a.groups;
    const int scale_type = a.scale_type;
    const i64 bytes = code_bytes(bits), header = header_bytes(shift);
    lane8 sum[ROW_TILE];
    for (int m = 0; m < rows; m++) sum[m] = (lane8){0};
    for (i64 first = 0; first < groups; first += span, p += header) {
        i64 last = span == 1 ? first + 1 : min_(first + span, groups);
        const uint8_t *h = p + (last - first) * bytes;
        lane8 scale = scales_of(h, scale_type), zero = zeros_of(h + 16, bits, shift);
        lane8 inner[ROW_TILE];
        float total[ROW_TILE] = {0};
        for (int m = 0; m < rows; m++) inner[m] = (lane8){0};
        for (i64 g = first; g < last; g++, p += bytes) {
            fetch(p + 4096, bytes);
            chunk unpacked[8];
            if (bits < 8) unpack_codes(p, bits, unpacked);
            index8 products[ROW_TILE];
            if (bits == 8)
                products_int8((const chunk *)p, codes + g * GROUP, groups * GROUP, rows, products);
            for (int m = 0; m < rows; m++) {
                const float *t = terms + (m * groups + g) * TERMS;
                const int8_t *x = codes + (m * groups + g) * GROUP;
                if (bits == 5) products[m] = products_int5(unpacked, x);
                else if (bits < 5) products[m] = products_int4(unpacked, x);
                lane8 value = __builtin_convertvector(products[m], lane8), u = (lane8){0} + t[0];
                int centred = bits == 8 && shift == SHIFT_NONE;
                inner[m] += centred ? value * u : fused(value, u, zero * t[1]);
                if (shift == SHIFT_MINIMA) total[m] -= t[1];
            }
        }
        for (int m = 0; m < rows; m++) sum[m] = fused(scale, inner[m], sum[m]);
        if (shift == SHIFT_MINIMA) {
            lane8 minimum = halves_to_floats(h + 16) * 0.125f;  // as terms[1] has a factor 8
            for (int m = 0; m < rows; m++)
                sum[m] = fused(minimum, (lane8){0} + total[m], sum[m]);
        }
    }
    for (int m = 0; m < rows; m++) out[m] = sum[m];
}

#define ADD_SPAN(BITS, SHIFT, SPAN)                                        \
    if (rows == 1) add_block(product, BITS, SHIFT, SPAN, 1, sum);          \
    else add_block(product, BITS, SHIFT, SPAN, ROW_TILE, sum)
// a span of one group, as in GGUF's blocks, is a constant, too
#define ADD_SHIFT(BITS, SHIFT)                                             \
    if (w->span == 1) { ADD_SPAN(BITS, SHIFT, 1); }                        \
    else { ADD_SPAN(BITS, SHIFT, w->span); }                               \
    break
#define ADD_BLOCK(BITS)                                                    \
    switch (w->shift) {                                                    \
    case SHIFT_NONE: ADD_SHIFT(BITS, SHIFT_NONE);                          \
    case SHIFT_ZEROS: ADD_SHIFT(BITS, SHIFT_ZEROS);                        \
    case SHIFT_MINIMA: ADD_SHIFT(BITS, SHIFT_MINIMA);                      \
    }                                                                      \
    break

void grouped_block(const Matrix *w, i64 block, const int8_t *codes, const float *terms, int rows,
                   lane8 *sum) {
    if (w->shift >= SHIFT_SUPER_MINIMA) {
        super_block(w, block, codes, terms, rows, sum);
        return;
    }
    i64 groups = groups_of(w->inputs), spans = (groups + w->span - 1) / w->span;
    i64 bytes = groups * code_bytes(w->bits) + spans * header_bytes(w->shift);
    const uint8_t *data = (const uint8_t *)w->data + block * bytes;
    const Product product = {data, groups, w->scale_type, codes, terms};
    switch (w->bits) {
    case 2: ADD_BLOCK(2);
    case 3: ADD_BLOCK(3);
    case 4: ADD_BLOCK(4);
    case 5: ADD_BLOCK(5);
    case 8: ADD_BLOCK(8);
    }
}

WITHOUT_FMA void grouped_row(const Matrix *w, i64 row, float *x) {
    if (w->shift >= SHIFT_SUPER_MINIMA) {
        super_row(w, row, x);
        return;
    }
    i64 groups = groups_of(w->inputs), spans = (groups + w->span - 1) / w->span;
    i64 bytes = code_bytes(w->bits), header = header_bytes(w->shift), lane = row % OUTPUTS;
    const uint8_t *p =
        (const uint8_t *)w->data + row / OUTPUTS * (groups * bytes + spans * header);
    for (i64 first = 0; first < groups; first += w->span, p += header) {
        i64 last = min_(first + w->span, groups);
        const uint8_t *h = p + (last - first) * bytes;
        float scale = scales_of(h, w->scale_type)[lane];
        float zero = 8.0f * zeros_of(h + 16, w->bits, w->shift)[lane];
        float minimum = w->shift == SHIFT_MINIMA ? halves_to_floats(h + 16)[lane] : 0.0f;
        for (i64 g = first; g < last; g++, p += bytes) {
            float values[GROUP];
            group_row(p, w->bits, lane, values);
            i64 count = min_(GROUP, w->inputs - g * GROUP);
            for (i64 i = 0; i < count; i++)
                x[g * GROUP + i] = (values[i] - zero) * scale + minimum;
        }
    }
}
