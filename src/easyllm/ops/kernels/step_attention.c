// Attention of the compiled decoding step.
//
// Terms
//   row, task          as in step.h
//   split, slot, part  as in paged.h
//   groups             query heads per KV head
//
// Data layout: as in step.h; q is [rows][heads][dim], k and v are [rows][kv_heads][dim], and parts
// of a row are consecutive, [kv_heads][splits][groups][part].
#include "step.h"

static i64 first_split(const Layer *l, i64 length) {
    return l->window ? max_(0, length - l->window) / SPLIT : 0;
}

static i64 num_splits(const Layer *l, i64 length) {
    return (length - 1) / SPLIT + 1 - first_split(l, length);
}

i64 num_tasks(const Layer *l, const Batch *b, i64 rows) {
    i64 tasks = 0;
    for (i64 s = 0; s < rows; s++) tasks += l->kv_heads * num_splits(l, b->key_lengths[s]);
    return tasks;
}

// QK-norm (if there is one) and RoPE of one head of one row, in place.
static void rotate_head(const Thread *t, const Layer *l, i64 position, const float *norm,
                        float scale, float *x) {
    if (norm) {
        rms_norm_row(x, norm, l->dim, l->head_eps, t->row);
        memcpy(x, t->row, l->dim * sizeof(float));
        round_values(t, x, l->dim);
    }
    if (l->cosine) {
        const float *c = l->cosine + position * l->pairs, *s = l->sine + position * l->pairs;
        rotate_head_pairs(x, c, s, l->pairs, 1.0f, x);
        round_values(t, x, l->dim);
    }
    for (i64 i = 0; i < l->dim; i++) x[i] *= scale;
}

// Rotates queries and keys, and stores keys and values to the KV cache.
void rotate_and_store(Thread *t, const Layer *l, const Pages *p) {
    const Batch *b = t->b;
    const Shared *sh = t->sh;
    i64 groups = l->heads / l->kv_heads, dim = l->dim;
    EACH(i, b->rows * l->kv_heads) {
        i64 s = i / l->kv_heads, kv = i % l->kv_heads, position = b->positions[s];
        float *k = sh->k + i * dim, *v = sh->v + i * dim, *q = sh->q + i * groups * dim;
        for (i64 g = 0; g < groups; g++)
            rotate_head(t, l, position, l->q_norm, l->scale, q + g * dim);
        rotate_head(t, l, position, l->k_norm, 1.0f, k);
        i64 row = page_row(p, b->table + s * b->table_width, kv, b->key_lengths[s] - 1);
        store_head(p, (void *)p->keys, (float *)p->key_scales, row, k);
        store_head(p, (void *)p->values, (float *)p->value_scales, row, v);
    }
    end_phase(t, b->rows * l->kv_heads);
}

// Computes the tasks [begin, end) of all (row, KV head, split) in this order.
static void attend_tasks(const Thread *t, const Layer *l, const Pages *p, i64 begin, i64 end) {
    const Batch *b = t->b;
    const Shared *sh = t->sh;
    i64 groups = l->heads / l->kv_heads, size = groups * part_size(l->dim), task = 0;
    for (i64 s = 0; s < b->rows && task < end; s++) {
        i64 length = b->key_lengths[s], splits = num_splits(l, length);
        i64 first = first_split(l, length);
        KeyRange key_range[groups];
        for (i64 g = 0; g < groups; g++)
            key_range[g] = (KeyRange){l->window ? max_(0, length - l->window) : 0, length - 1};
        for (i64 kv = 0; kv < l->kv_heads; kv++, task += splits) {
            const QueryRows rows = {.table = b->table + s * b->table_width,
                                    .kv_head = kv,
                                    .rows = groups,
                                    .q = sh->q + (s * l->heads + kv * groups) * l->dim,
                                    .key_range = key_range,
                                    .slopes = l->slopes ? l->slopes + kv * groups : NULL,
                                    .groups = groups,
                                    .scratch = t->scratch};
            for (i64 j = max_(0, begin - task); j < min_(splits, end - task); j++)
                attend_split(p, &rows, first + j, sh->parts + (task + j) * size);
        }
    }
}

void attend(Thread *t, const Layer *l, const Pages *p) {
    i64 all = num_tasks(l, t->b, t->b->rows), from, to;
    for (; take_piece(t, all, &from, &to); piece_done(t, to - from))
        attend_tasks(t, l, p, from, to);
    end_phase(t, all);
}

// Merges the splits of row s into its attention output, which is row `row` of `to`.
static void merge_row(const Thread *t, const Layer *l, i64 s, const Rows *to, i64 row) {
    i64 groups = l->heads / l->kv_heads, size = groups * part_size(l->dim);
    i64 splits = num_splits(l, t->b->key_lengths[s]);
    const float *part = t->sh->parts + num_tasks(l, t->b, s) * size;
    float *values = to->values + row * to->inputs, *out = values;
    for (i64 kv = 0; kv < l->kv_heads; kv++) {
        clear_parts(t->state, groups, l->dim);
        for (i64 j = 0; j < splits; j++, part += size) merge_split(t->state, part, groups, l->dim);
        for (i64 g = 0; g < groups; g++, out += l->dim)
            finish_row(t->state + g * part_size(l->dim), l->dim, out);
    }
    round_values(t, values, to->inputs);
    prepare_row(t, projections_of(t, l, O, 1), to, row);
}

const Rows *merged(Thread *t, const Layer *l) {
    i64 width = l->heads * l->dim, groups = groups_of(width), rows = t->b->rows;
    if (rows == 1) {
        t->mixed.inputs = width, t->mixed.groups = groups;
        merge_row(t, l, 0, &t->mixed, 0);
        return &t->mixed;
    }
    Rows mixed = t->sh->mixed;
    mixed.inputs = width, mixed.groups = groups;
    EACH(s, rows) merge_row(t, l, s, &mixed, s);
    end_phase(t, rows);
    t->mixed = mixed;
    return &t->mixed;
}
