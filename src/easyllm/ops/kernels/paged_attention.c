// Paged attention: attention over keys and values in pages, for a batch of sequences in one call.
//
// Terms: page, table, slot, split, octet and part as in paged.h, and
//   block      consecutive queries of one sequence, with all query heads of one KV head
//   row        one (token, query head) pair of a block
//   groups     query heads per KV head
//   lane       one element of a register (vec and lane8 of cpu.h)
//   prefetch   loading cache lines before their use; pages are scattered, so the hardware does not
//
// Data layout: q and out are [T][H][d] in fp32 or bf16; pages as in paged.h; inside, rows are fp32
// and keys [8][d] per octet. No intrinsics are used, only vector extensions of the compiler.
//
// Work is divided by sequence, KV head and block of queries; if that gives too few tasks for the
// threads, also by split of the keys (Flash-Decoding: Dao et al. 2023).
#include <omp.h>

#include "paged.h"

#define BLOCK_ROWS 32   // maximum rows of a block of queries
#define OCTETS_AHEAD 2  // prefetch distance of keys and values

// Returns the eight keys (or values) from `key` on, [8][dim] in fp32, dequantized to `to` if
// needed.
static const float *load_octet(const Pages *p, const void *base, const float *scales,
                               const int32_t *table, i64 kv, i64 key, float *restrict to) {
    i64 dim = p->dim, row = page_row(p, table, kv, key);
    if (p->format == FP32) return (const float *)base + row * dim;
    if (p->format == BF16) {
        load_row((const uint16_t *)base + row * dim, BF16, OCTET * dim, to);
    } else if (p->format == INT8) {
        for (i64 t = 0; t < OCTET; t++) {
            const int8_t *codes = (const int8_t *)base + (row + t) * dim;
            float scale = scales[row + t];
            for (i64 i = 0; i < dim; i++) to[t * dim + i] = codes[i] * scale;
        }
    } else {
        i64 half = dim / 2;
        for (i64 t = 0; t < OCTET; t++) {
            const uint8_t *codes = (const uint8_t *)base + (row + t) * half;
            float scale = scales[2 * (row + t)], minimum = scales[2 * (row + t) + 1];
            for (i64 i = 0; i < half; i++) {
                to[t * dim + i] = (codes[i] & 15) * scale + minimum;
                to[t * dim + half + i] = (codes[i] >> 4) * scale + minimum;
            }
        }
    }
    return to;
}

// Cache lines of an octet, of which each iteration of a loop prefetches a few. Pages are anywhere
// in memory, so the hardware prefetcher does not find them; prefetching them all at once would fill
// the queue of outstanding loads and stall the arithmetic.
typedef struct {
    const char *keys, *values;
    i64 at, end, step;  // bytes
} Ahead;

static inline Ahead octet_ahead(const Pages *p, const int32_t *table, i64 kv, i64 key, i64 turns) {
    i64 row = p->format == INT4   ? p->dim / 2
              : p->format == INT8 ? p->dim
                                  : p->dim * element_size(p->format);
    i64 at = page_row(p, table, kv, key) * row, end = OCTET * row;
    return (Ahead){(const char *)p->keys + at, (const char *)p->values + at, 0, end,
                   (end + 64 * turns - 1) / (64 * turns) * 64};
}

ALWAYS_INLINE void fetch_some(Ahead *a) {
    for (i64 until = min_(a->at + a->step, a->end); a->at < until; a->at += 64) {
        __builtin_prefetch(a->keys + a->at);
        __builtin_prefetch(a->values + a->at);
    }
}

// e^x for the difference of a score from the maximum, 0 below e^-60: added to a sum of at least 1
// it has no effect in fp32, and its products would be subnormal numbers, which are slow.
static inline float exp_or_zero(float x) { return x < -60.0f ? 0.0f : exp_(x); }

void store_head(const Pages *p, void *base, float *scales, i64 row, const float *x) {
    i64 dim = p->dim, half = dim / 2;
    if (p->format == FP32 || p->format == BF16) {
        store_row((char *)base + row * dim * element_size(p->format), p->format, dim, x);
        return;
    }
    float minimum = x[0], maximum = x[0];
    for (i64 i = 1; i < dim; i++) {
        minimum = x[i] < minimum ? x[i] : minimum;
        maximum = x[i] > maximum ? x[i] : maximum;
    }
    if (p->format == INT8) {
        float step = fmaxf(fmaxf(maximum, -minimum) / 127.0f, 1e-30f);
        int8_t *codes = (int8_t *)base + row * dim;
        for (i64 i = 0; i < dim; i++) codes[i] = (int8_t)(int)rintf(x[i] / step);
        scales[row] = step;
        return;
    }
    float step = fmaxf((maximum - minimum) / 15.0f, 1e-30f);
    uint8_t *codes = (uint8_t *)base + row * half;
    for (i64 i = 0; i < half; i++) {
        int low = (int)rintf((x[i] - minimum) / step);
        int high = (int)rintf((x[i + half] - minimum) / step);
        codes[i] = (uint8_t)(min_(low, 15) | min_(high, 15) << 4);
    }
    scales[2 * row] = step, scales[2 * row + 1] = minimum;
}

// out[8] = dot products of a query with eight keys. The loops over registers have explicit unroll
// pragmas, because some compilers otherwise keep the sums in memory.
static inline void score_octet(const float *q, const float *keys, i64 dim, float *out,
                               Ahead *ahead) {
    vec acc[OCTET];
    lane8 sums[OCTET];
    i64 c = 0;
#pragma GCC unroll 8
    for (int j = 0; j < OCTET; j++) acc[j] = (vec){0};
    for (; c + LANES <= dim; c += LANES) {
        vec x = *(const vec *)(q + c);
        fetch_some(ahead);
#pragma GCC unroll 8
        for (int j = 0; j < OCTET; j++) acc[j] += x * *(const vec *)(keys + j * dim + c);
    }
#pragma GCC unroll 8
    for (int j = 0; j < OCTET; j++) sums[j] = folded(acc[j]);
    if (c < dim)
#pragma GCC unroll 8
        for (int j = 0; j < OCTET; j++)
            sums[j] += *(const lane8 *)(q + c) * *(const lane8 *)(keys + j * dim + c);
    *(lane8 *)out = sums_of(sums);
}

// ALiBi: subtracts slope * distance from the scores of eight keys, of which the first is at
// `distance` from the query.
static inline void add_distances(float *scores, float slope, i64 distance) {
    for (int j = 0; j < OCTET; j++) scores[j] -= slope * (float)(distance - j);
}

// For ROWS rows, with weights [SPLIT] each and outputs `stride` apart: out[..VECS * LANES] = sum
// over j in [from, to) of weights[j] values[j]. An element's sum is independent of the other lanes
// and rows.
#define SUM_VALUES(NAME, VEC, VECS, ROWS)                                                          \
    static inline void NAME(const float *weights, const float *const *octets, i64 from, i64 to,    \
                            i64 dim, float *out, i64 stride, i64 column) {                         \
        VEC acc[ROWS][VECS];                                                                       \
        for (int r = 0; r < ROWS; r++)                                                             \
            for (int c = 0; c < VECS; c++) acc[r][c] = (VEC){0};                                   \
        for (i64 j = from; j < to; j++) {                                                          \
            const VEC *value = (const VEC *)(octets[j / OCTET] + (j % OCTET) * dim + column);      \
            for (int r = 0; r < ROWS; r++)                                                         \
                for (int c = 0; c < VECS; c++) acc[r][c] += weights[r * SPLIT + j] * value[c];     \
        }                                                                                          \
        for (int r = 0; r < ROWS; r++)                                                             \
            for (int c = 0; c < VECS; c++) ((VEC *)(out + r * stride + column))[c] = acc[r][c];    \
    }
SUM_VALUES(sum_4_of_1, vec, 4, 1)
SUM_VALUES(sum_4_of_2, vec, 4, 2)
SUM_VALUES(sum_4_of_3, vec, 4, 3)
SUM_VALUES(sum_1_of_1, vec, 1, 1)
SUM_VALUES(sum_octet, lane8, 1, 1)

#define MAX_SUMMED_ROWS 3  // maximum rows whose sums fit in registers

// out = sums of the values of a split, weighted for each of `rows` rows
static inline void sum_values(const float *weights, const float *const *octets, i64 from, i64 to,
                              i64 dim, float *out, i64 stride, i64 rows) {
    i64 c = 0;
    for (; c + 4 * LANES <= dim; c += 4 * LANES) {
        if (rows == 3) sum_4_of_3(weights, octets, from, to, dim, out, stride, c);
        else if (rows == 2) sum_4_of_2(weights, octets, from, to, dim, out, stride, c);
        else sum_4_of_1(weights, octets, from, to, dim, out, stride, c);
    }
    for (i64 r = 0; r < rows; r++, weights += SPLIT, out += stride) {
        i64 rest = c;
        for (; rest + LANES <= dim; rest += LANES)
            sum_1_of_1(weights, octets, from, to, dim, out, stride, rest);
        if (rest < dim) sum_octet(weights, octets, from, to, dim, out, stride, rest);
    }
}

// Softmax of one row without normalization: scores[from..to) become weights, part[0] the maximum
// score and part[1] the sum of the weights.
static inline void softmax_row(float *scores, i64 from, i64 to, float *part) {
    float top = -INFINITY;
    i64 start = from / LANES * LANES, end = (to + LANES - 1) / LANES * LANES;
    for (i64 j = start; j < from; j++) scores[j] = -INFINITY;
    for (i64 j = to; j < end; j++) scores[j] = -INFINITY;
#pragma omp simd reduction(max : top)
    for (i64 j = start; j < end; j++) top = scores[j] > top ? scores[j] : top;
    lane8 total = {0};
    for (i64 j = start; j < end; j += LANES) {
        float *x = scores + j;
#pragma omp simd
        for (int i = 0; i < LANES; i++) x[i] = exp_or_zero(x[i] - top);
        for (int i = 0; i < LANES; i += 8) total += *(const lane8 *)(x + i);
    }
    part[0] = top, part[1] = lane_sum(total);
}

void attend_split(const Pages *p, const QueryRows *x, i64 split, float *part) {
    const int32_t *table = x->table;
    const KeyRange *key_range = x->key_range;
    const float *q = x->q;
    i64 kv = x->kv_head, rows = x->rows;
    i64 dim = p->dim, begin = split * SPLIT, first = SPLIT, last = -1, furthest = 0;
    const float *octets[SPLIT / OCTET];
    float *values = x->scratch, *keys = values + SPLIT * dim, *scores = keys + OCTET * dim;
    for (i64 r = 0; r < rows; r++) {
        first = min_(first, max_(0, key_range[r].first - begin));
        last = max_(last, min_(SPLIT - 1, key_range[r].last - begin));
        furthest = max_(furthest, key_range[r].last);
    }
    for (i64 o = first / OCTET; o * OCTET <= last; o++) {
        i64 key = begin + o * OCTET;
        i64 next = min_(key + OCTETS_AHEAD * OCTET, furthest / OCTET * OCTET);
        Ahead ahead = octet_ahead(p, table, kv, next, max_(1, rows * dim / LANES));
        const float *k = load_octet(p, p->keys, p->key_scales, table, kv, key, keys);
        octets[o] =
            load_octet(p, p->values, p->value_scales, table, kv, key, values + o * OCTET * dim);
        for (i64 r = 0; r < rows; r++) {
            if (key_range[r].last < key || key_range[r].first >= key + OCTET) continue;
            float *to = scores + r * SPLIT + o * OCTET;
            score_octet(q + r * dim, k, dim, to, &ahead);
            if (x->slopes) add_distances(to, x->slopes[r % x->groups], key_range[r].last - key);
        }
    }
    clear_parts(part, rows, dim);
    // rows that see the same keys, such as the heads of a token, are summed together
    for (i64 r = 0, together; r < rows; r += together) {
        i64 from = max_(0, key_range[r].first - begin);
        i64 to = min_(SPLIT, key_range[r].last + 1 - begin);
        float *weights = scores + r * SPLIT, *out = part + r * part_size(dim);
        for (together = 1; together < MAX_SUMMED_ROWS && r + together < rows; together++)
            if (key_range[r + together].first != key_range[r].first ||
                key_range[r + together].last != key_range[r].last)
                break;
        if (from >= to) continue;
        for (i64 i = 0; i < together; i++)
            softmax_row(weights + i * SPLIT, from, to, out + i * part_size(dim));
        sum_values(weights, octets, from, to, dim, out + 2, part_size(dim), together);
    }
}

void clear_parts(float *part, i64 rows, i64 dim) {
    memset(part, 0, rows * part_size(dim) * sizeof(float));
    for (i64 r = 0; r < rows; r++) part[r * part_size(dim)] = -INFINITY;
}

void merge_split(float *state, const float *part, i64 rows, i64 dim) {
    for (i64 r = 0; r < rows; r++, state += part_size(dim), part += part_size(dim)) {
        if (part[0] == -INFINITY) continue;
        float top = state[0] > part[0] ? state[0] : part[0];
        float old = exp_or_zero(state[0] - top), new = exp_or_zero(part[0] - top);
        state[0] = top;
        state[1] = state[1] * old + part[1] * new;
        for (i64 c = 2; c < dim + 2; c += 8)
            *(lane8 *)(state + c) = *(lane8 *)(state + c) * old + *(const lane8 *)(part + c) * new;
    }
}

void finish_row(const float *state, i64 dim, float *out) {
    float inverse = 1.0f / state[1];
    for (i64 c = 0; c < dim; c += 8)
        *(lane8 *)(out + c) = *(const lane8 *)(state + 2 + c) * inverse;
}

// What all queries of a call share.
typedef struct {
    i64 heads, q_stride;  // q_stride: elements from token to token
    int dtype;            // of queries and outputs
    float scale;
    i64 window;           // 0: none
    const float *slopes;  // [heads]: ALiBi, or NULL
} Queries;

// The sequences of a call of paged_attention.
typedef struct {
    const void *q;                     // [tokens of all sequences][heads][dim]
    void *out;                         // result, [tokens][heads][dim], contiguous
    const int32_t *table;              // page tables, [num_sequences][table_width]
    const i64 *lengths, *key_lengths;  // tokens in q, and in the cache, of each [num_sequences]
    i64 table_width, num_sequences;
} PagedBatch;

typedef struct {
    i64 sequence, kv_head, token, tokens, position;  // first token in q, and its position
    i64 first_split, num_splits;
    float *parts;  // results of its splits, if these are separate tasks
} Block;

typedef struct {
    i64 block, split;
} Task;

// Loads the scaled queries of a block, and the keys that each row sees.
static void load_block(const Block *b, const Queries *s, const Pages *p, const void *q,
                       float *rows, KeyRange *key_range) {
    i64 groups = s->heads / p->kv_heads, dim = p->dim;
    for (i64 t = 0; t < b->tokens; t++) {
        i64 at = (b->token + t) * s->q_stride + b->kv_head * groups * dim;
        load_row((const char *)q + at * element_size(s->dtype), s->dtype, groups * dim,
                 rows + t * groups * dim);
        i64 position = b->position + t, first = s->window ? max_(0, position - s->window + 1) : 0;
        for (i64 g = 0; g < groups; g++) key_range[t * groups + g] = (KeyRange){first, position};
    }
    for (i64 i = 0; i < b->tokens * groups * dim; i++) rows[i] *= s->scale;
}

// Stores the normalized outputs of a block.
static void store_block(const Block *b, const Queries *s, const Pages *p, const float *state,
                        void *out, float *row) {
    i64 groups = s->heads / p->kv_heads, dim = p->dim;
    for (i64 r = 0; r < b->tokens * groups; r++) {
        i64 at = ((b->token + r / groups) * s->heads + b->kv_head * groups + r % groups) * dim;
        finish_row(state + r * part_size(dim), dim, row);
        store_row((char *)out + at * element_size(s->dtype), s->dtype, dim, row);
    }
}

// Divides all sequences into blocks; returns their number (only counts if `blocks` is NULL).
static i64 make_blocks(const Queries *s, const Pages *p, const PagedBatch *batch, Block *blocks) {
    const i64 *lengths = batch->lengths, *key_lengths = batch->key_lengths;
    i64 each = max_(1, BLOCK_ROWS / (s->heads / p->kv_heads)), count = 0, token = 0;
    for (i64 n = 0; n < batch->num_sequences; token += lengths[n++])
        for (i64 t = 0; t < lengths[n]; t += each)
            for (i64 kv = 0; kv < p->kv_heads; kv++, count++) {
                if (!blocks) continue;
                i64 tokens = min_(each, lengths[n] - t), position = key_lengths[n] - lengths[n] + t;
                i64 first = s->window ? max_(0, position - s->window + 1) / SPLIT : 0;
                i64 splits = (position + tokens - 1) / SPLIT - first + 1;
                blocks[count] = (Block){n, kv, token + t, tokens, position, first, splits, NULL};
            }
    return count;
}

// The query rows of a block, of which `rows` and `key_range` are loaded.
static QueryRows rows_of(const Block *b, const PagedBatch *batch, const Queries *s, i64 groups,
                         const float *rows, const KeyRange *key_range, float *scratch) {
    return (QueryRows){.table = batch->table + b->sequence * batch->table_width,
                       .kv_head = b->kv_head,
                       .rows = b->tokens * groups,
                       .q = rows,
                       .key_range = key_range,
                       .slopes = s->slopes ? s->slopes + b->kv_head * groups : NULL,
                       .groups = groups,
                       .scratch = scratch};
}

void paged_attention(const PagedBatch *batch, const Pages *p, const Queries *s) {
    i64 dim = p->dim, groups = s->heads / p->kv_heads;
    i64 maximum = max_(1, BLOCK_ROWS / groups) * groups;
    i64 count = make_blocks(s, p, batch, NULL), num_tasks = 0, workspace = 0;
    Block *blocks = malloc(max_(1, count) * sizeof(Block));
    make_blocks(s, p, batch, blocks);
    int apart = count < 4 * omp_get_max_threads();
    for (i64 b = 0; apart && b < count; b++) {
        num_tasks += blocks[b].num_splits;
        workspace += blocks[b].num_splits * blocks[b].tokens * groups * part_size(dim);
    }
    Task *tasks = malloc(max_(1, num_tasks) * sizeof(Task)), *task = tasks;
    float *parts = malloc(max_(1, workspace) * sizeof(float)), *next = parts;
    for (i64 b = 0; apart && b < count; b++) {
        blocks[b].parts = next;
        next += blocks[b].num_splits * blocks[b].tokens * groups * part_size(dim);
        for (i64 j = 0; j < blocks[b].num_splits; j++) *task++ = (Task){b, j};
    }
#pragma omp parallel
    {
        float *rows = floats(maximum * dim), *state = floats(maximum * part_size(dim));
        float *own = floats(maximum * part_size(dim));
        float *scratch = floats(split_scratch(maximum, dim));
        KeyRange *key_range = malloc(maximum * sizeof(KeyRange));
#pragma omp for schedule(dynamic, 1)
        for (i64 i = 0; i < num_tasks; i++) {
            const Block *b = blocks + tasks[i].block;
            i64 j = tasks[i].split;
            const QueryRows x = rows_of(b, batch, s, groups, rows, key_range, scratch);
            load_block(b, s, p, batch->q, rows, key_range);
            attend_split(p, &x, b->first_split + j, b->parts + j * x.rows * part_size(dim));
        }
#pragma omp for schedule(dynamic, 1)
        for (i64 i = 0; i < count; i++) {
            const Block *b = blocks + i;
            const QueryRows x = rows_of(b, batch, s, groups, rows, key_range, scratch);
            i64 n = x.rows;
            clear_parts(state, n, dim);
            if (!apart) load_block(b, s, p, batch->q, rows, key_range);
            for (i64 j = 0; j < b->num_splits; j++) {
                if (!apart) attend_split(p, &x, b->first_split + j, own);
                merge_split(state, apart ? b->parts + j * n * part_size(dim) : own, n, dim);
            }
            store_block(b, s, p, state, batch->out, rows);
        }
        free(rows), free(state), free(own), free(scratch), free(key_range);
    }
    free(blocks), free(tasks), free(parts);
}
