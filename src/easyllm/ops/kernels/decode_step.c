// One decoding step of a pre-norm decoder with RMS norms, RoPE, grouped-query attention over a
// paged KV cache and SiLU-gated feed-forward layers: from token ids to logits in one parallel
// region.
//
// Terms
//   row, phase, piece, panel, update   as in step.h
//   projections                        matrices that share an input, and their updates
//
// Data layout: as in step.h; activations are [rows][width] in fp32.
#include "step.h"

#define PHASES_PER_LAYER 13
#define OTHER_PHASES 4   // embedding, norm, and two of the head
#define MOST_TOGETHER 3  // matrices that share an input

static i64 num_phases(const Model *m) { return m->num_layers * PHASES_PER_LAYER + OTHER_PHASES; }

// Takes `count` floats from the workspace.
static float *take(char **at, i64 count) {
    float *here = (float *)*at;
    *at += (count * (i64)sizeof(float) + 127) / 64 * 64;  // no two arrays share a cache line
    return here;
}

static Rows take_rows(char **at, i64 rows, i64 inputs) {
    i64 groups = groups_of(inputs), workspace = padded_rows(rows) * groups;
    float *values = take(at, rows * inputs), *terms = take(at, workspace * TERMS);
    float *packed = ROWS_PER_REGISTER == 1 ? values : take(at, packed_size(rows, inputs));
    return (Rows){values, packed, (int8_t *)take(at, workspace * GROUP / 4), terms, inputs, groups};
}

// Lays out the arrays of the workspace from `at` on; returns its end.
static char *lay_out(const Model *m, const Batch *b, char *at, int threads, Shared *shared,
                     Thread *own) {
    i64 width = 0, kv_width = 0, inner = 0, parts = 0, state = 0, scratch = 0;
    i64 rows = b->rows, D = m->hidden;
    shared->phases = (Phase *)at;
    at += num_phases(m) * sizeof(Phase);
    for (i64 n = 0; n < m->num_layers; n++) {
        const Layer *l = m->layers + n;
        i64 groups = l->heads / l->kv_heads, part = groups * part_size(l->dim);
        width = max_(width, l->heads * l->dim), kv_width = max_(kv_width, l->kv_heads * l->dim);
        inner = max_(inner, l->matrices[DOWN].inputs);
        parts = max_(parts, num_tasks(l, b, rows) * part);
        state = max_(state, part), scratch = max_(scratch, split_scratch(groups, l->dim));
    }
    shared->x = take(&at, rows * D);
    shared->q = take(&at, rows * width);
    shared->k = take(&at, rows * kv_width), shared->v = take(&at, rows * kv_width);
    shared->parts = take(&at, parts);
    shared->inner = take(&at, b->num_groups ? MOST_TOGETHER * rows * m->max_rank : 0);
    shared->normed = take_rows(&at, rows, D);
    shared->mixed = take_rows(&at, rows, width), shared->fed = take_rows(&at, rows, inner);
    for (int i = 0; i < threads; i++) {
        own[i].m = m, own[i].b = b, own[i].sh = shared;
        own[i].normed = take_rows(&at, 1, D), own[i].mixed = take_rows(&at, 1, width);
        own[i].row = take(&at, max_(D, width));
        own[i].gate = take(&at, rows * GROUP), own[i].up = take(&at, rows * GROUP);
        own[i].state = take(&at, state), own[i].scratch = take(&at, scratch);
    }
    return at;
}

static void norm_row(const Thread *t, const float *x, const float *w, float eps, Projections next,
                     const Rows *rows, i64 row) {
    float *y = rows->values + row * rows->inputs;
    rms_norm_row(x, w, rows->inputs, eps, y);
    round_values(t, y, rows->inputs);
    prepare_row(t, next, rows, row);
}

// Normalizes all rows for their products with `next`. A single row is normalized by every thread
// separately; several rows are divided among the threads.
static const Rows *normed(Thread *t, const float *w, float eps, Projections next) {
    const float *x = t->sh->x;
    i64 rows = t->b->rows;
    if (rows == 1) {
        norm_row(t, x, w, eps, next, &t->normed, 0);
        return &t->normed;
    }
    EACH(s, rows) norm_row(t, x + s * t->m->hidden, w, eps, next, &t->sh->normed, s);
    end_phase(t, rows);
    return &t->sh->normed;
}

// Computes one panel of out = x W^T for matrix `index` of `p`, with the updates of adapters;
// out_stride: floats from row to row
static void project_panel(const Thread *t, Projections p, i64 index, i64 panel, const Rows *x,
                          float *out, i64 out_stride) {
    const Matrix *w = p.matrices + index;
    i64 rows = t->b->rows, width = panel_outputs(rows);
    fetch_up(t, p, index, panel);
    linear_panel(w, panel, x, rows, out, out_stride);
    for (i64 s = 0; t->m->rounds && s < rows; s++)
        round_to_bf16(out + s * out_stride, min_(width, w->outputs - panel * width));
    updates_up(t, p, index, panel, out, out_stride);
}

// out[i] = x W^T for each matrix i of `p`
static void project(Thread *t, Projections p, const Rows *x, float *const *out) {
    i64 rows = t->b->rows, all = 0;
    updates_down(t, p, x);
    for (i64 index = 0; index < p.count; index++) all += panels_of(p.matrices + index, rows);
    EACH(i, all) {
        i64 index = 0, panel = i;
        for (i64 panels; panel >= (panels = panels_of(p.matrices + index, rows)); index++)
            panel -= panels;
        project_panel(t, p, index, panel, x, out[index] + panel * panel_outputs(rows),
                      p.matrices[index].outputs);
    }
    end_phase(t, all);
}

// Adds the products of rows with the only matrix of `p` to the residual stream x.
static void add_product(Thread *t, Projections p, const Rows *rows) {
    i64 num_rows = t->b->rows, D = p.matrices->outputs;
    i64 panels = panels_of(p.matrices, num_rows), width = panel_outputs(num_rows);
    updates_down(t, p, rows);
    EACH(i, panels) {
        project_panel(t, p, 0, i, rows, t->gate, GROUP);
        i64 count = min_(width, D - i * width);
        for (i64 s = 0; s < num_rows; s++) {
            float *x = t->sh->x + s * D + i * width, *delta = t->gate + s * GROUP;
#pragma omp simd
            for (i64 c = 0; c < count; c++) x[c] += delta[c];
        }
    }
    end_phase(t, panels);
}

// fed = silu(gate x) up x, in complete groups of 32, so that a thread can quantize its own results
// for `next`.
static void gated(Thread *t, Projections p, const Rows *x, const Rows *fed, Projections next) {
    i64 rows = t->b->rows, width = panel_outputs(rows), panels = panels_of(p.matrices, rows);
    updates_down(t, p, x);
    EACH(g, fed->groups) {
        i64 from = g * GROUP, count = min_(GROUP, fed->inputs - from);
        for (i64 at = 0, i = from / width; at < GROUP && i < panels; at += width, i++) {
            project_panel(t, p, 0, i, x, t->gate + at, GROUP);
            project_panel(t, p, 1, i, x, t->up + at, GROUP);
        }
        for (i64 s = 0; s < rows; s++) {
            float out[GROUP] = {0};
            silu_gate_values(t->gate + s * GROUP, t->up + s * GROUP, count, out);
            round_values(t, out, count);
            memcpy(fed->values + s * fed->inputs + from, out, count * sizeof(float));
            i64 at = s * fed->groups + g;
            if (is_quantized(next.matrices))
                quantize_group(out, fed->codes + at * GROUP, fed->terms + at * TERMS);
            else pack_values(fed, s, rows, from, count);
        }
    }
    end_phase(t, fed->groups);
}

static void run_layer(Thread *t, const Layer *l, const Pages *p) {
    const Projections heads = projections_of(t, l, Q, 3), out = projections_of(t, l, O, 1);
    const Projections inner = projections_of(t, l, GATE, 2), down = projections_of(t, l, DOWN, 1);
    float *const to[] = {t->sh->q, t->sh->k, t->sh->v};
    project(t, heads, normed(t, l->mixer_norm, l->eps, heads), to);
    rotate_and_store(t, l, p);
    attend(t, l, p);
    add_product(t, out, merged(t, l));
    Rows fed = t->sh->fed;
    fed.inputs = down.matrices->inputs, fed.groups = groups_of(fed.inputs);
    gated(t, inner, normed(t, l->feed_forward_norm, l->eps, inner), &fed, down);
    add_product(t, down, &fed);
}

static void embed(Thread *t) {
    const Model *m = t->m;
    EACH(s, t->b->rows) {
        float *x = t->sh->x + s * m->hidden;
        matrix_row(&m->embedding, t->b->token_ids[s], x);
        round_values(t, x, m->hidden);
        for (i64 i = 0; i < m->hidden; i++) x[i] *= m->embedding_scale;
    }
    end_phase(t, t->b->rows);
}

i64 decode_step_bytes(const Model *m, const Batch *b) {
    int threads = omp_get_max_threads();
    Shared shared;
    Thread *own = malloc(threads * sizeof(Thread));
    char *end = lay_out(m, b, (char *)0 + 64, threads, &shared, own);
    free(own);
    return end - (char *)0;
}

// memory: workspace of decode_step_bytes, aligned to a cache line
void decode_step(const Model *m, const Batch *b, char *memory) {
    int threads = omp_get_max_threads();
    Thread *own = malloc(threads * sizeof(Thread));
    Shared shared;
    lay_out(m, b, memory, threads, &shared, own);
    memset(shared.phases, 0, num_phases(m) * sizeof(Phase));
#pragma omp parallel num_threads(threads)
    {
        Thread *t = own + omp_get_thread_num();
        const Projections head = {&m->head, m->head_updates, 1};
        t->threads = omp_get_num_threads(), t->phase = shared.phases;
        begin_panels(b->rows);
        embed(t);
        for (i64 n = 0; n < m->num_layers; n++) run_layer(t, m->layers + n, b->pages + n);
        project(t, head, normed(t, m->final_norm, m->eps, head), &b->logits);
        end_panels(b->rows);
    }
    free(own);
}
