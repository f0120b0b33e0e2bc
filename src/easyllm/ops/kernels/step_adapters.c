// LoRA updates of the compiled decoding step: y += scale * B (A x) for the rows of each adapter.
//
// Terms
//   row, panel, update, group   as in step.h
//   block, inner                as in low_rank.h
//
// Data layout: as in step.h and low_rank.h; inner is [matrix][rows][max_rank] in fp32.
//
// Rows are grouped by adapter, so A and B are read from memory once per step.
#include "step.h"

#define ROWS_AT_ONCE 16  // rows of a group that are passed to low_rank_up

void fetch_up(const Thread *t, Projections p, i64 index, i64 panel) {
    if (!p.updates) return;
    for (i64 g = 0; g < t->b->num_groups; g++) {
        const Matrix *w = &p.updates[index * t->m->num_adapters + t->b->group_adapters[g]].up;
        i64 row = w->inputs * element_size(w->format), width = panel_outputs(t->b->rows);
        i64 outputs = max_(0, min_(width, w->outputs - panel * width));
        fetch((const char *)w->data + panel * width * row, outputs * row);
    }
}

void updates_down(Thread *t, Projections p, const Rows *x) {
    const Model *m = t->m;
    const Batch *b = t->b;
    if (!p.updates || !b->num_groups) return;
    i64 blocks = m->max_rank / OUTPUTS, all = p.count * b->num_groups * blocks;
    EACH(i, all) {
        i64 block = i % blocks, g = i / blocks % b->num_groups, index = i / blocks / b->num_groups;
        const Update *u = &p.updates[index * m->num_adapters + b->group_adapters[g]];
        if (block >= blocks_of(&u->down)) continue;
        float *inner = t->sh->inner + index * b->rows * m->max_rank + block * OUTPUTS;
        for (i64 j = b->group_starts[g]; j < b->group_starts[g + 1]; j++) {
            i64 row = b->group_rows[j];
            low_rank_down(u, block, x->values + row * x->inputs, m->rounds,
                          inner + row * m->max_rank);
        }
    }
    end_phase(t, all);
}

void updates_up(const Thread *t, Projections p, i64 index, i64 panel, float *out, i64 out_stride) {
    const Model *m = t->m;
    const Batch *b = t->b;
    if (!p.updates) return;
    const float *all = t->sh->inner + index * b->rows * m->max_rank, *inner[ROWS_AT_ONCE];
    float *y[ROWS_AT_ONCE];
    i64 blocks = panel_outputs(b->rows) / OUTPUTS, first = panel * blocks;
    for (i64 g = 0; g < b->num_groups; g++) {
        const Update *u = p.updates + index * m->num_adapters + b->group_adapters[g];
        i64 last = min_(first + blocks, blocks_of(&u->up));
        for (i64 j = b->group_starts[g], end = b->group_starts[g + 1]; j < end; j += ROWS_AT_ONCE) {
            i64 count = min_(ROWS_AT_ONCE, end - j);
            for (i64 i = 0; i < count; i++) {
                i64 row = b->group_rows[j + i];
                inner[i] = all + row * m->max_rank, y[i] = out + row * out_stride;
            }
            for (i64 block = first; block < last; block++) {
                low_rank_up(u, block, count, inner, m->rounds, y);
                for (i64 i = 0; i < count; i++) y[i] += OUTPUTS;
            }
        }
    }
}
