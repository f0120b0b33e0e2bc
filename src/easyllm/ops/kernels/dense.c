// Products of rows with fp32 and bf16 weights.
//
// Terms
//   lane       one of the eight partial sums of a dot product: lane i sums inputs k with k % 8 = i
//   register   a vec of cpu.h: the eight lanes of one row, or with AVX-512 of two rows
//   block      8 consecutive outputs
//   chunk      CHUNK consecutive inputs (not the chunk of matrix.h)
//   tile       the sums of up to three registers of rows x TILE_OUTPUTS outputs
//   step       eight inputs, one register per row
//   L1         the first-level data cache
//
// Data layout: weights [outputs][inputs] in fp32 or bf16; rows [rows][inputs] in fp32, and
// interleaved in pairs for AVX-512 (`Rows.packed` of matrix.h).
//
// A lane sums its inputs in ascending order; the lanes are added in a fixed order, and after them
// the inputs beyond the last multiple of eight. So the result is batch-invariant: bitwise
// independent of the number of rows, the register width and the chunks below.
//
// With several rows, a block is multiplied by groups of three registers of rows at a time, whose
// sums stay in registers. Inputs are processed in chunks, so that the weights of the block and the
// values of a group stay in L1.
//
// Intrinsics (AVX-512)
//   _mm512_broadcast_f64x4               copies 256 bits to both halves of a register
//   _mm512_shuffle_ps, _shuffle_f32x4    select floats, or 128-bit parts, of two registers
//   _mm512_add_ps, _mm512_storeu_ps      add; store unaligned
#include "matrix.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define CHUNK 640          // inputs of a chunk: 20 KB of weights in fp32
#define ROWS_AT_ONCE 64    // rows whose sums are stored from chunk to chunk
#define MAX_GROUP_REGISTERS 3    // registers of rows in a group
#ifdef __AVX512F__
#define TILE_OUTPUTS 8     // 24 sums in 32 registers
#else
#define TILE_OUTPUTS 4     // 12 sums in 16 registers
#endif
#define GROUPS_TO_SPREAD 4  // minimum number of groups that share the prefetch of the next block

// Loads eight weights as fp32; a bf16 is the upper half of its fp32 value.
static inline lane8 load_8(const void *row, int format, i64 at) {
    if (format == FP32) return *(const lane8 *)((const float *)row + at);
    typedef uint16_t short8 __attribute__((vector_size(16), aligned(2)));
    typedef uint32_t word8 __attribute__((vector_size(32)));
    const short8 upper_halves = *(const short8 *)((const uint16_t *)row + at);
    return (lane8)(__builtin_convertvector(upper_halves, word8) << 16);
}

static inline float load_1(const void *row, int format, i64 at) {
    return format == FP32 ? ((const float *)row)[at] : bf16_to_float(((const uint16_t *)row)[at]);
}

// Rows of weights of a block; the last output is repeated beyond the end of the matrix.
static inline void rows_of_block(const Matrix *w, i64 block, const char *row[OUTPUTS]) {
    for (i64 j = 0; j < OUTPUTS; j++) {
        i64 output = min_(block * OUTPUTS + j, w->outputs - 1);
        row[j] = (const char *)w->data + output * w->inputs * element_size(w->format);
    }
}

// Products with the inputs beyond the last multiple of eight. All callers share one function, built
// without FMA: otherwise the compiler could round differently in each of them.
static WITHOUT_FMA lane8
rest_of(const Matrix *w, const char *const *row, const float *x) {
    lane8 rest = {0};
    for (i64 k = w->inputs / 8 * 8; k < w->inputs; k++)
        for (int j = 0; j < OUTPUTS; j++) rest[j] += x[k] * load_1(row[j], w->format, k);
    return rest;
}

static inline lane8 with_rest(lane8 sum, const Matrix *w, const char *const *row, const float *x) {
    return w->inputs % 8 ? sum + rest_of(w, row, x) : sum;
}

// Stores the first `width` of eight outputs.
static inline void store_outputs(lane8 sum, i64 width, float *to) {
    if (width == OUTPUTS) *(lane8 *)to = sum;
    else memcpy(to, &sum, width * sizeof(float));
}

// ---- one row

// `fetches`: whether the next block is prefetched
ALWAYS_INLINE lane8 one_row(const Matrix *w, int format, i64 block, const float *x, int fetches) {
    lane8 acc[OUTPUTS] = {{0}};
    const char *row[OUTPUTS];
    i64 k = 0, size = element_size(format), ahead = OUTPUTS * w->inputs * size;
    rows_of_block(w, block, row);
    for (; k + 8 <= w->inputs; k += 8) {
        lane8 values = *(const lane8 *)(x + k);
        // prefetch the next block: the hardware does too little, and stops at page boundaries
        if (fetches && k * size % 64 == 0)
            for (int j = 0; j < OUTPUTS; j++) __builtin_prefetch(row[j] + ahead + k * size);
        for (int j = 0; j < OUTPUTS; j++) acc[j] += values * load_8(row[j], format, k);
    }
    return with_rest(sums_of(acc), w, row, x);
}

// ---- several rows

#if ROWS_PER_REGISTER == 2
// Copies eight floats to both halves of a register.
static inline vec broadcast(const float *eight) {
    return (vec)_mm512_castpd_ps(_mm512_broadcast_f64x4(_mm256_loadu_pd((const double *)eight)));
}
// pair_sums of cpu.h in each half.
static inline __m512 neighbours(vec a, vec b) {
    return _mm512_add_ps(_mm512_shuffle_ps((__m512)a, (__m512)b, 0x88),
                         _mm512_shuffle_ps((__m512)a, (__m512)b, 0xdd));
}
// to[t] = sums_of (cpu.h) the lanes of row t
static inline void row_sums(const vec a[OUTPUTS], lane8 to[ROWS_PER_REGISTER]) {
    __m512 low = neighbours((vec)neighbours(a[0], a[1]), (vec)neighbours(a[2], a[3]));
    __m512 high = neighbours((vec)neighbours(a[4], a[5]), (vec)neighbours(a[6], a[7]));
    __m512 sums = _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88),
                                _mm512_shuffle_f32x4(low, high, 0xdd));
    _mm512_storeu_ps(to, _mm512_shuffle_f32x4(sums, sums, 0xd8));
}
#else
static inline vec broadcast(const float *eight) { return *(const vec *)eight; }
static inline void row_sums(const vec a[OUTPUTS], lane8 to[ROWS_PER_REGISTER]) {
    to[0] = sums_of((const lane8 *)a);
}
#endif

// Parameters shared by the tiles of a chunk.
typedef struct {
    const float *weights[OUTPUTS];
    i64 steps;          // eight inputs each
    i64 between;        // floats from register to register of packed rows
    int starts;         // first chunk: sums start from zero
    i64 fetch_step;     // bytes of the next block to prefetch per step
} Chunk;

// sums[REGISTERS][OUTPUTS] (+)= products of rows with the chunk; LINES: cache lines to prefetch per
// step
#define TILE_OF(NAME, REGISTERS, LINES)                                                            \
    static void NAME(const Chunk *c, const float *x, const char *ahead, vec *sums) {               \
        for (int first = 0; first < OUTPUTS; first += TILE_OUTPUTS) {                              \
            vec acc[REGISTERS][TILE_OUTPUTS];                                                      \
            const float *w[TILE_OUTPUTS];                                                          \
            for (int j = 0; j < TILE_OUTPUTS; j++) {                                               \
                w[j] = c->weights[first + j];                                                      \
                for (int r = 0; r < REGISTERS; r++)                                                \
                    acc[r][j] = c->starts ? (vec){0} : sums[r * OUTPUTS + first + j];              \
            }                                                                                      \
            const float *at = x;                                                                   \
            for (i64 k = 0; k < c->steps; k++, at += LANES, ahead += c->fetch_step) {              \
                vec values[REGISTERS];                                                             \
                for (int i = 0; i < LINES; i++) __builtin_prefetch(ahead + 64 * i);                \
                for (int r = 0; r < REGISTERS; r++) {                                              \
                    values[r] = *(const vec *)(at + r * c->between);                               \
                    KEEP_IN_REGISTER(values[r]);                                                   \
                }                                                                                  \
                for (int j = 0; j < TILE_OUTPUTS; j++) {                                           \
                    vec weights = broadcast(w[j] + 8 * k);                                         \
                    KEEP_IN_REGISTER(weights);                                                     \
                    for (int r = 0; r < REGISTERS; r++) acc[r][j] += values[r] * weights;          \
                }                                                                                  \
            }                                                                                      \
            for (int j = 0; j < TILE_OUTPUTS; j++)                                                 \
                for (int r = 0; r < REGISTERS; r++) sums[r * OUTPUTS + first + j] = acc[r][j];     \
        }                                                                                          \
    }
TILE_OF(tile_1_fetching_all, 1, 4)
TILE_OF(tile_2_fetching_all, 2, 4)
TILE_OF(tile_3_fetching_all, 3, 4)
TILE_OF(tile_1, 1, 1)
TILE_OF(tile_2, 2, 1)
TILE_OF(tile_3, 3, 1)

typedef void Tile(const Chunk *, const float *, const char *, vec *);

// Sets the weights of a chunk; bf16 weights are converted to fp32 in `wide`.
static void open_chunk(Chunk *c, const Matrix *w, const char *const *row, i64 k,
                       float (*wide)[CHUNK]) {
    i64 count = 8 * c->steps;
    for (int j = 0; j < OUTPUTS; j++) {
        if (w->format == BF16) load_row((const uint16_t *)row[j] + k, BF16, count, wide[j]);
        c->weights[j] = w->format == BF16 ? wide[j] : (const float *)row[j] + k;
    }
}

// out[m][OUTPUTS] = products of rows [first_row, first_row + num_rows) with a block, plus bias
static void some_rows(const Matrix *w, i64 block, const Rows *x, i64 first_row, i64 num_rows,
                      lane8 bias, float *out, i64 stride) {
    static Tile *const fetching_all[] = {tile_1_fetching_all, tile_2_fetching_all,
                                         tile_3_fetching_all};
    static Tile *const fetching_some[] = {tile_1, tile_2, tile_3};
    float wide[OUTPUTS][CHUNK] __attribute__((aligned(64)));
    vec sums[ROWS_AT_ONCE / ROWS_PER_REGISTER][OUTPUTS] __attribute__((aligned(64)));
    const char *row[OUTPUTS];
    rows_of_block(w, block, row);
    i64 registers = (num_rows + ROWS_PER_REGISTER - 1) / ROWS_PER_REGISTER;
    i64 size = element_size(w->format);
    i64 groups = (registers + MAX_GROUP_REGISTERS - 1) / MAX_GROUP_REGISTERS;
    i64 whole = w->inputs / 8 * 8;
    int all = groups < GROUPS_TO_SPREAD;  // with few groups, each prefetches all of the next block
    i64 share = OUTPUTS * 8 * size / (all ? 1 : GROUPS_TO_SPREAD);
    Chunk c = {.between = ROWS_PER_REGISTER == 1 ? w->inputs : whole * ROWS_PER_REGISTER,
               .fetch_step = share * TILE_OUTPUTS / OUTPUTS};
    if (!whole) memset(sums, 0, registers * sizeof(*sums));
    for (i64 k = 0; k < whole; k += CHUNK) {
        const char *ahead = row[0] + OUTPUTS * (w->inputs + k) * size;
        c.steps = min_(CHUNK, whole - k) / 8, c.starts = k == 0;
        open_chunk(&c, w, row, k, wide);
        for (i64 r = 0, g = 0, count; r < registers; r += count, g++) {
            count = registers - r == MAX_GROUP_REGISTERS + 1  // 2 + 2 rather than 3 + 1
                        ? 2
                        : min_(MAX_GROUP_REGISTERS, registers - r);
            const float *values = x->packed + (first_row / ROWS_PER_REGISTER + r) * c.between +
                                  k * ROWS_PER_REGISTER;
            (all ? fetching_all : fetching_some)[count - 1](&c, values, ahead, sums[r]);
            if (!all && g < GROUPS_TO_SPREAD - 1) ahead += share * c.steps;
        }
    }
    i64 width = min_(OUTPUTS, w->outputs - block * OUTPUTS);
    for (i64 r = 0; r < registers; r++) {
        lane8 found[ROWS_PER_REGISTER];
        row_sums(sums[r], found);
        for (i64 t = 0; t < ROWS_PER_REGISTER && r * ROWS_PER_REGISTER + t < num_rows; t++) {
            i64 m = r * ROWS_PER_REGISTER + t;
            lane8 sum = with_rest(found[t], w, row, x->values + (first_row + m) * x->inputs);
            store_outputs(w->bias ? sum + bias : sum, width, out + m * stride);
        }
    }
}

// ---- functions declared in matrix.h

void pack_values(const Rows *rows, i64 row, i64 num_rows, i64 from, i64 count) {
    if (ROWS_PER_REGISTER == 1 || num_rows == 1) return;
    const float *x = rows->values + row * rows->inputs;
    // a last row without a partner is duplicated, so that the unused lanes are initialized
    int is_alone = row == num_rows - 1 && row % ROWS_PER_REGISTER == 0;
    float *to = rows->packed +
                row / ROWS_PER_REGISTER * ROWS_PER_REGISTER * (rows->inputs / 8 * 8) +
                row % ROWS_PER_REGISTER * 8;
    for (i64 k = from; k + 8 <= from + count; k += 8) {
        *(lane8 *)(to + k * ROWS_PER_REGISTER) = *(const lane8 *)(x + k);
        if (is_alone) *(lane8 *)(to + k * ROWS_PER_REGISTER + 8) = *(const lane8 *)(x + k);
    }
}

void dense_row(const Matrix *w, i64 block, const float *x, float *out) {
    lane8 sum = w->format == FP32 ? one_row(w, FP32, block, x, 0) : one_row(w, BF16, block, x, 0);
    store_outputs(sum, min_(OUTPUTS, w->outputs - block * OUTPUTS), out);
}

void dense_block(const Matrix *w, i64 block, const Rows *x, i64 num_rows, float *out, i64 stride) {
    i64 width = min_(OUTPUTS, w->outputs - block * OUTPUTS);
    lane8 bias = {0};
    for (i64 j = 0; w->bias && j < width; j++) bias[j] = w->bias[block * OUTPUTS + j];
    if (num_rows == 1) {
        lane8 sum = w->format == FP32 ? one_row(w, FP32, block, x->values, 1)
                                      : one_row(w, BF16, block, x->values, 1);
        store_outputs(w->bias ? sum + bias : sum, width, out);
        return;
    }
    for (i64 m = 0; m < num_rows; m += ROWS_AT_ONCE)
        some_rows(w, block, x, m, min_(ROWS_AT_ONCE, num_rows - m), bias, out + m * stride, stride);
}
