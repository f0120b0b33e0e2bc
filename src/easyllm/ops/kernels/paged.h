// Keys and values in pages, and the part of attention that every caller shares.
//
// A page holds the keys (values) of page_size tokens, [K][page_size][d]; table[i] is the page of a sequence's tokens
// i * page_size and on. Pages are fp32, bf16, int8 (a scale a token and head) or int4 (scale and minimum; dim i in the
// low nibble of byte i, dim i + d/2 in the high one).
//
// The softmax is computed over splits of 64 keys, whose bounds depend on the keys' positions alone, and the splits are
// merged in order: a query's result has the same bits whatever else is computed in the same call.
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

// the row of pages->keys and ->values (in units of dim elements) where a sequence's token at `slot` lies
static inline i64 page_row(const Pages *p, const int32_t *table, i64 kv_head, i64 slot) {
    return ((i64)table[slot / p->page_size] * p->kv_heads + kv_head) * p->page_size + slot % p->page_size;
}

// stores one head's key (or value) at a row of `base`, in the pages' format
void store_head(const Pages *pages, void *base, float *scales, i64 row, const float *x);

// A query row of one head: which keys it sees, first to last.
typedef struct {
    i64 first, last;
} Sight;

// floats of a row's partial result: largest score, sum of exponentials, unnormalised output
static inline i64 part_size(i64 dim) { return dim + 2; }

// floats of scratch that attend_split needs
static inline i64 split_scratch(i64 rows, i64 dim) { return (SPLIT + OCTET) * dim + rows * SPLIT; }

// part[rows][dim + 2] = attention of q[rows][dim], scaled already, over the keys of one split
void attend_split(const Pages *pages, const int32_t *table, i64 kv_head, i64 split, i64 rows, const float *q,
                  const Sight *sight, float *part, float *scratch);

void clear_parts(float *part, i64 rows, i64 dim);

// state[rows][dim + 2] takes in the next split's part
void merge_split(float *state, const float *part, i64 rows, i64 dim);

// out[dim] = the output of one row
void finish_row(const float *state, i64 dim, float *out);
