// Paged KV cache, and the part of attention that all callers share.
//
// Terms
//   K, d      KV heads and head dimension
//   page      keys (or values) of page_size consecutive tokens of a sequence
//   table     page table of a sequence: table[i] is the page of its tokens from i * page_size on
//   slot      position of a token in its sequence
//   split     64 keys with fixed positions, over which a partial softmax is computed
//   octet     8 consecutive keys, loaded together; they are in one page
//   part      partial result of a query row for one split (see part_size)
//
// Data layout: a page is [K][page_size][d] in fp32, bf16, int8 (one scale per token and head) or
// int4 (scale and minimum; dim i in the low nibble of byte i, dim i + d/2 in the high nibble).
//
// The bounds of the splits depend only on the positions of the keys, and splits are merged in
// order, so attention is batch-invariant: a query's result is bitwise independent of the rest of
// the call.
#pragma once
#include "cpu.h"

#define SPLIT 64
#define OCTET 8

typedef struct {
    const void *keys, *values;
    const float *key_scales, *value_scales;
    i64 kv_heads, page_size, dim;  // page_size and dim are multiples of 8
    int format;
} Pages;

// Returns the row of p->keys and p->values, in units of dim elements, of the sequence's token at
// `slot`.
static inline i64 page_row(const Pages *p, const int32_t *table, i64 kv_head, i64 slot) {
    return ((i64)table[slot / p->page_size] * p->kv_heads + kv_head) * p->page_size +
           slot % p->page_size;
}

// Stores one head's key (or value) to a row of `base`, in the format of the pages.
void store_head(const Pages *pages, void *base, float *scales, i64 row, const float *x);

// Range of keys that a query row sees, both ends included.
typedef struct {
    i64 first, last;
} KeyRange;

// Floats of a row's partial result: maximum score, sum of exponentials, unnormalized output [dim].
static inline i64 part_size(i64 dim) { return dim + 2; }

// Floats of scratch memory that attend_split needs.
static inline i64 split_scratch(i64 rows, i64 dim) { return (SPLIT + OCTET) * dim + rows * SPLIT; }

// Query rows that share a sequence and a KV head.
typedef struct {
    const int32_t *table;       // page table of the sequence
    i64 kv_head, rows;
    const float *q;             // [rows][dim], already scaled
    const KeyRange *key_range;  // [rows]
    const float *slopes;        // [groups] of the KV head: ALiBi, or NULL
    i64 groups;                 // query heads per KV head; row r is of head r % groups
    float *scratch;             // split_scratch floats
} QueryRows;

// part[rows][dim + 2] = attention of the query rows over the keys of one split
ONE_COPY void attend_split(const Pages *pages, const QueryRows *x, i64 split, float *part);

// Initializes partial results: maximum -inf, sums zero.
void clear_parts(float *part, i64 rows, i64 dim);

// Merges the next split's part into state[rows][dim + 2] (online softmax).
ONE_COPY void merge_split(float *state, const float *part, i64 rows, i64 dim);

// out[dim] = normalized output of one row
ONE_COPY void finish_row(const float *state, i64 dim, float *out);
