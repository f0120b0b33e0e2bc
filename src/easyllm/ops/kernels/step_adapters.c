// LoRA updates of the compiled decoding step: y += scale * B (A x) for the rows of each adapter.
//
// Terms
//   row, panel, update, group   as in step.h
//   block                       8 consecutive outputs, as in matrix.h
//   inner                       A x, [rank] values of a row
//
// Data layout: as in step.h; A and B are dense matrices of matrix.h, inner is
// [matrix][rows][max_rank] in fp32.
//
// A row's update is computed by the same products as a single row of a dense matrix (dense.c), so
// its bits do not depend on the other rows. Rows are grouped by adapter, so A and B are read from
// memory once per step.
#include "step.h"

// out[0 .. OUTPUTS) = products of one row with a block of a dense matrix
static void row_block(const Matrix *w, i64 block, const float *x, float *out) {
    const Rows row = {.values = (float *)x, .inputs = w->inputs};
    dense_block(w, block, &row, 1, out, OUTPUTS);
}

void updates_down(Thread *t, Projections p, const Rows *x) {
    const Model *m = t->m;
    const Batch *b = t->b;
    if (!p.updates || !b->num_groups) return;
    i64 blocks = m->max_rank / OUTPUTS, all = p.count * b->num_groups * blocks;
    EACH(i, all) {
        i64 block = i % blocks, g = i / blocks % b->num_groups, index = i / blocks / b->num_groups;
        const Matrix *w = &p.updates[index * m->num_adapters + b->group_adapters[g]].down;
        if (block >= blocks_of(w)) continue;
        for (i64 j = b->group_starts[g]; j < b->group_starts[g + 1]; j++) {
            i64 row = b->group_rows[j];
            float *inner = t->sh->inner + (index * b->rows + row) * m->max_rank + block * OUTPUTS;
            row_block(w, block, x->values + row * x->inputs, inner);
            round_values(t, inner, min_(OUTPUTS, w->outputs - block * OUTPUTS));
        }
    }
    end_phase(t, all);
}

void updates_up(const Thread *t, Projections p, i64 index, i64 panel, float *out, i64 out_stride) {
    const Model *m = t->m;
    const Batch *b = t->b;
    if (!p.updates) return;
    const float *inner = t->sh->inner + index * b->rows * m->max_rank;
    i64 blocks = panel_outputs(b->rows) / OUTPUTS, first = panel * blocks;
    for (i64 g = 0; g < b->num_groups; g++) {
        const Update *u = p.updates + index * m->num_adapters + b->group_adapters[g];
        for (i64 block = first; block < min_(first + blocks, blocks_of(&u->up)); block++) {
            i64 width = min_(OUTPUTS, u->up.outputs - block * OUTPUTS);
            for (i64 j = b->group_starts[g]; j < b->group_starts[g + 1]; j++) {
                i64 row = b->group_rows[j];
                float delta[OUTPUTS], *y = out + row * out_stride + (block - first) * OUTPUTS;
                row_block(&u->up, block, inner + row * m->max_rank, delta);
                round_values(t, delta, width);
                add_update(delta, u->scale, width, m->rounds, y);
            }
        }
    }
}
