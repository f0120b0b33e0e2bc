// One decoding step of a pre-norm decoder with RMS norms, RoPE, grouped-query attention over a
// paged KV cache and SiLU-gated feed-forward layers: from token ids to logits in one parallel
// region.
//
// Terms
//   row      a token of the batch
//   phase    a step that must be complete before the next one starts (a barrier)
//   piece    a part of a phase that one thread processes
//   task     attention of one row and KV head over one split (64 keys, see paged.h)
//   panel    the outputs that linear_panel computes in one call (see matrix.h)
//   part     partial result of attention over one split (see paged.h)
//
// Data layout: activations are [rows][width] in fp32; weights are Matrix, the KV cache is Pages. A
// thread's arrays and the shared ones are consecutive in one workspace, without sharing cache
// lines.
//
// Threads take the pieces of a phase dynamically, and the phase ends when all pieces are done. A
// thread that the system has preempted delays the others by its current piece only, not at every
// phase. The result of a piece is bitwise independent of the thread. There are few rows: a single
// row is normalized by every thread separately, which is cheaper than waiting for another thread.
#include <omp.h>
#include <sched.h>

#include "matrix.h"
#include "paged.h"

typedef struct {
    Matrix q, k, v, o, gate, up, down;
    const float *mixer_norm, *feed_forward_norm;  // [hidden]
    const float *q_norm, *k_norm;                 // [dim] or NULL
    const float *cosine, *sine;                   // [positions][pairs], NULL without RoPE
    i64 heads, kv_heads, dim, pairs, window;
    float scale, eps, head_eps;
} Layer;

typedef struct {
    Matrix embedding, head;
    const float *final_norm;
    const Layer *layers;
    i64 num_layers, hidden;
    float embedding_scale, eps;
} Model;

// Rows are tokens: `positions` are those of RoPE, and a row's slot in its sequence is
// key_lengths - 1. Several rows can be consecutive tokens of one sequence; each sees the keys up to
// its own.
typedef struct {
    i64 rows;
    const i64 *token_ids, *positions, *key_lengths;
    const int32_t *table;
    i64 table_width;
    const Pages *pages;  // one per layer
    float *logits;       // [rows][vocabulary]
} Batch;

typedef struct {
    i64 next, done;  // pieces taken, pieces finished
    char padding[48];  // padding to a separate cache line
} Phase;

// Activations shared by all threads; x is the residual stream.
typedef struct {
    float *x, *q, *k, *v, *parts;
    Rows normed, mixed, fed;
    Phase *phases;
} Shared;

typedef struct {
    int threads;
    Phase *phase;        // the current one
    Rows normed, mixed;  // private copies, if there is one row
    float *row, *state, *scratch;
    float *gate, *up;  // [rows][GROUP]: intermediate results of a piece, private to the thread
} Thread;

#if defined(__x86_64__) || defined(__i386__)
#define RELAX() __builtin_ia32_pause()
#else
#define RELAX() ((void)0)
#endif
#define SPINS_BEFORE_YIELD 2000  // spins before a waiting thread yields its core
#define PIECES 4       // pieces of a phase per thread
#define PHASES_PER_LAYER 9

// Takes the next piece [*from, *to) of the current phase; returns 0 if there is none.
static int take_piece(Thread *t, i64 total, i64 *from, i64 *to) {
    i64 size = max_(1, total / (PIECES * t->threads));
    *from = __atomic_fetch_add(&t->phase->next, size, __ATOMIC_RELAXED);
    *to = min_(total, *from + size);
    return *from < total;
}

static void piece_done(Thread *t, i64 count) {
    __atomic_fetch_add(&t->phase->done, count, __ATOMIC_RELEASE);
}

// Waits until all pieces of the current phase are done.
static void end_phase(Thread *t, i64 total) {
    for (i64 turn = 0; __atomic_load_n(&t->phase->done, __ATOMIC_ACQUIRE) < total; turn++) {
        if (turn < SPINS_BEFORE_YIELD) RELAX();
        else sched_yield();
    }
    t->phase++;
}

// Loops over the indices of the pieces that this thread takes; must be followed by end_phase.
#define EACH(INDEX, TOTAL)                                                            \
    for (i64 from_, to_; take_piece(t, TOTAL, &from_, &to_); piece_done(t, to_ - from_)) \
        for (i64 INDEX = from_; INDEX < to_; INDEX++)

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

static i64 first_split(const Layer *l, i64 length) {
    return l->window ? max_(0, length - l->window) / SPLIT : 0;
}

static i64 num_splits(const Layer *l, i64 length) {
    return (length - 1) / SPLIT + 1 - first_split(l, length);
}

static i64 num_tasks(const Layer *l, const Batch *b, i64 rows) {
    i64 tasks = 0;
    for (i64 s = 0; s < rows; s++) tasks += l->kv_heads * num_splits(l, b->key_lengths[s]);
    return tasks;
}

// Lays out the arrays of the workspace from `at` on; returns its end.
static char *lay_out(const Model *m, const Batch *b, char *at, int threads, Shared *shared,
                     Thread *own) {
    i64 width = 0, kv_width = 0, inner = 0, parts = 0, state = 0, scratch = 0;
    i64 rows = b->rows, D = m->hidden;
    shared->phases = (Phase *)at;
    at += (m->num_layers * PHASES_PER_LAYER + 3) * sizeof(Phase);
    for (i64 n = 0; n < m->num_layers; n++) {
        const Layer *l = m->layers + n;
        i64 groups = l->heads / l->kv_heads, part = groups * part_size(l->dim);
        width = max_(width, l->heads * l->dim), kv_width = max_(kv_width, l->kv_heads * l->dim);
        inner = max_(inner, l->down.inputs), parts = max_(parts, num_tasks(l, b, rows) * part);
        state = max_(state, part), scratch = max_(scratch, split_scratch(groups, l->dim));
    }
    shared->x = take(&at, rows * D);
    shared->q = take(&at, rows * width);
    shared->k = take(&at, rows * kv_width), shared->v = take(&at, rows * kv_width);
    shared->parts = take(&at, parts);
    shared->normed = take_rows(&at, rows, D);
    shared->mixed = take_rows(&at, rows, width), shared->fed = take_rows(&at, rows, inner);
    for (int i = 0; i < threads; i++) {
        own[i].normed = take_rows(&at, 1, D), own[i].mixed = take_rows(&at, 1, width);
        own[i].row = take(&at, max_(D, width));
        own[i].gate = take(&at, rows * GROUP), own[i].up = take(&at, rows * GROUP);
        own[i].state = take(&at, state), own[i].scratch = take(&at, scratch);
    }
    return at;
}

static void rms_norm(const float *x, const float *w, i64 width, float eps, float *y) {
    lane8 squares = {0};
    float sum = 0;
    i64 i = 0;
    for (; i + 8 <= width; i += 8) squares += *(const lane8 *)(x + i) * *(const lane8 *)(x + i);
    for (int j = 0; j < 8; j++) sum += squares[j];
    for (; i < width; i++) sum += x[i] * x[i];
    float inverse = 1.0f / sqrtf(sum / width + eps);
#pragma omp simd
    for (i64 j = 0; j < width; j++) y[j] = x[j] * inverse * w[j];
}

// Prepares a row for its products with `next`: quantizes or packs it.
static void prepare_row(const Matrix *next, const Batch *b, const Rows *rows, i64 row) {
    if (is_quantized(next)) quantize_row(rows, row, rows->values + row * rows->inputs);
    else pack_values(rows, row, b->rows, 0, rows->inputs);
}

static void norm_row(const float *x, const float *w, float eps, const Matrix *next, const Batch *b,
                     const Rows *rows, i64 row) {
    rms_norm(x, w, rows->inputs, eps, rows->values + row * rows->inputs);
    prepare_row(next, b, rows, row);
}

// Normalizes all rows for their products with `next`. A single row is normalized by every thread
// separately; several rows are divided among the threads.
static const Rows *normed(const Model *m, const Batch *b, const Shared *sh, Thread *t,
                          const float *w, float eps, const Matrix *next) {
    if (b->rows == 1) {
        norm_row(sh->x, w, eps, next, b, &t->normed, 0);
        return &t->normed;
    }
    EACH(s, b->rows) norm_row(sh->x + s * m->hidden, w, eps, next, b, &sh->normed, s);
    end_phase(t, b->rows);
    return &sh->normed;
}

// Computes one panel of out = x W^T.
static void project_panel(const Matrix *w, i64 panel, const Batch *b, const Rows *x, float *out) {
    linear_panel(w, panel, x, b->rows, out + panel * panel_outputs(b->rows), w->outputs);
}

// Query, key and value projections.
static void project_heads(const Layer *l, const Batch *b, const Shared *sh, Thread *t,
                          const Rows *x) {
    i64 q_panels = panels_of(&l->q, b->rows), k_panels = panels_of(&l->k, b->rows);
    i64 all = q_panels + k_panels + panels_of(&l->v, b->rows);
    EACH(i, all) {
        if (i < q_panels) project_panel(&l->q, i, b, x, sh->q);
        else if (i < q_panels + k_panels) project_panel(&l->k, i - q_panels, b, x, sh->k);
        else project_panel(&l->v, i - q_panels - k_panels, b, x, sh->v);
    }
    end_phase(t, all);
}

// QK-norm (if there is one) and RoPE of one head of one row, in place.
static void rotate_head(const Layer *l, i64 position, const float *norm, float scale, float *x,
                        float *scratch) {
    if (norm) {
        rms_norm(x, norm, l->dim, l->head_eps, scratch);
        memcpy(x, scratch, l->dim * sizeof(float));
    }
    if (l->cosine) {
        const float *c = l->cosine + position * l->pairs, *s = l->sine + position * l->pairs;
#pragma omp simd
        for (i64 i = 0; i < l->pairs; i++) {
            float first = x[i], second = x[l->pairs + i];
            x[i] = first * c[i] - second * s[i];
            x[l->pairs + i] = second * c[i] + first * s[i];
        }
    }
    for (i64 i = 0; i < l->dim; i++) x[i] *= scale;
}

// Rotates queries and keys, and stores keys and values to the KV cache.
static void rotate_and_store(const Layer *l, const Batch *b, const Pages *p, const Shared *sh,
                             Thread *t) {
    i64 groups = l->heads / l->kv_heads;
    EACH(i, b->rows * l->kv_heads) {
        i64 s = i / l->kv_heads, kv = i % l->kv_heads, position = b->positions[s];
        float *k = sh->k + i * l->dim, *v = sh->v + i * l->dim, *q = sh->q + i * groups * l->dim;
        for (i64 g = 0; g < groups; g++)
            rotate_head(l, position, l->q_norm, l->scale, q + g * l->dim, t->row);
        rotate_head(l, position, l->k_norm, 1.0f, k, t->row);
        i64 row = page_row(p, b->table + s * b->table_width, kv, b->key_lengths[s] - 1);
        store_head(p, (void *)p->keys, (float *)p->key_scales, row, k);
        store_head(p, (void *)p->values, (float *)p->value_scales, row, v);
    }
    end_phase(t, b->rows * l->kv_heads);
}

// Computes the tasks [begin, end) of all (row, KV head, split) in this order.
static void attend_tasks(const Layer *l, const Batch *b, const Pages *p, const Shared *sh,
                         Thread *t, i64 begin, i64 end) {
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
                                    .scratch = t->scratch};
            for (i64 j = max_(0, begin - task); j < min_(splits, end - task); j++)
                attend_split(p, &rows, first + j, sh->parts + (task + j) * size);
        }
    }
}

static void attend(const Layer *l, const Batch *b, const Pages *p, const Shared *sh, Thread *t) {
    i64 all = num_tasks(l, b, b->rows), from, to;
    for (; take_piece(t, all, &from, &to); piece_done(t, to - from))
        attend_tasks(l, b, p, sh, t, from, to);
    end_phase(t, all);
}

// Merges the splits of one row into its attention output.
static void merge_row(const Layer *l, const Batch *b, const Shared *sh, Thread *t, i64 s,
                      const Rows *to, i64 row) {
    i64 groups = l->heads / l->kv_heads, size = groups * part_size(l->dim);
    i64 splits = num_splits(l, b->key_lengths[s]);
    const float *part = sh->parts + num_tasks(l, b, s) * size;
    float *out = to->values + row * to->inputs;
    for (i64 kv = 0; kv < l->kv_heads; kv++) {
        clear_parts(t->state, groups, l->dim);
        for (i64 j = 0; j < splits; j++, part += size) merge_split(t->state, part, groups, l->dim);
        for (i64 g = 0; g < groups; g++, out += l->dim)
            finish_row(t->state + g * part_size(l->dim), l->dim, out);
    }
    prepare_row(&l->o, b, to, row);
}

static const Rows *merged(const Layer *l, const Batch *b, const Shared *sh, Thread *t) {
    i64 width = l->heads * l->dim, groups = groups_of(width);
    if (b->rows == 1) {
        t->mixed.inputs = width, t->mixed.groups = groups;
        merge_row(l, b, sh, t, 0, &t->mixed, 0);
        return &t->mixed;
    }
    Rows mixed = sh->mixed;
    mixed.inputs = width, mixed.groups = groups;
    EACH(s, b->rows) merge_row(l, b, sh, t, s, &mixed, s);
    end_phase(t, b->rows);
    t->mixed = mixed;
    return &t->mixed;
}

// Adds the products of rows with W to the residual stream x.
static void add_product(const Matrix *w, const Batch *b, const Shared *sh, Thread *t,
                        const Rows *rows) {
    i64 D = w->outputs, panels = panels_of(w, b->rows), width = panel_outputs(b->rows);
    EACH(i, panels) {
        linear_panel(w, i, rows, b->rows, t->gate, GROUP);
        i64 count = min_(width, D - i * width);
        for (i64 s = 0; s < b->rows; s++) {
            float *x = sh->x + s * D + i * width, *delta = t->gate + s * GROUP;
#pragma omp simd
            for (i64 c = 0; c < count; c++) x[c] += delta[c];
        }
    }
    end_phase(t, panels);
}

// fed = silu(gate x) up x, in complete groups of 32, so that a thread can quantize its own results.
static void gated(const Layer *l, const Batch *b, Thread *t, const Rows *x, const Rows *fed) {
    i64 width = panel_outputs(b->rows), panels = panels_of(&l->gate, b->rows);
    EACH(g, fed->groups) {
        i64 from = g * GROUP, count = min_(GROUP, fed->inputs - from);
        for (i64 at = 0, i = from / width; at < GROUP && i < panels; at += width, i++) {
            linear_panel(&l->gate, i, x, b->rows, t->gate + at, GROUP);
            linear_panel(&l->up, i, x, b->rows, t->up + at, GROUP);
        }
        for (i64 s = 0; s < b->rows; s++) {
            const float *gate = t->gate + s * GROUP, *up = t->up + s * GROUP;
            float out[GROUP] = {0};
#pragma omp simd
            for (i64 i = 0; i < count; i++) out[i] = gate[i] * sigmoid_(gate[i]) * up[i];
            memcpy(fed->values + s * fed->inputs + from, out, count * sizeof(float));
            i64 at = s * fed->groups + g;
            if (is_quantized(&l->down))
                quantize_group(out, fed->codes + at * GROUP, fed->terms + at * TERMS);
            else pack_values(fed, s, b->rows, from, count);
        }
    }
    end_phase(t, fed->groups);
}

static void run_layer(const Model *m, const Layer *l, const Batch *b, const Pages *p,
                      const Shared *sh, Thread *t) {
    project_heads(l, b, sh, t, normed(m, b, sh, t, l->mixer_norm, l->eps, &l->q));
    rotate_and_store(l, b, p, sh, t);
    attend(l, b, p, sh, t);
    add_product(&l->o, b, sh, t, merged(l, b, sh, t));
    Rows fed = sh->fed;
    fed.inputs = l->down.inputs, fed.groups = groups_of(fed.inputs);
    gated(l, b, t, normed(m, b, sh, t, l->feed_forward_norm, l->eps, &l->gate), &fed);
    add_product(&l->down, b, sh, t, &fed);
}

static void embed(const Model *m, const Batch *b, const Shared *sh, Thread *t) {
    EACH(s, b->rows) {
        float *x = sh->x + s * m->hidden;
        matrix_row(&m->embedding, b->token_ids[s], x);
        for (i64 i = 0; i < m->hidden; i++) x[i] *= m->embedding_scale;
    }
    end_phase(t, b->rows);
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
    memset(shared.phases, 0, (m->num_layers * PHASES_PER_LAYER + 3) * sizeof(Phase));
#pragma omp parallel num_threads(threads)
    {
        Thread *t = own + omp_get_thread_num();
        t->threads = omp_get_num_threads(), t->phase = shared.phases;
        begin_panels(b->rows);
        embed(m, b, &shared, t);
        for (i64 n = 0; n < m->num_layers; n++)
            run_layer(m, m->layers + n, b, b->pages + n, &shared, t);
        const Rows *x = normed(m, b, &shared, t, m->final_norm, m->eps, &m->head);
        EACH(i, panels_of(&m->head, b->rows)) project_panel(&m->head, i, b, x, b->logits);
        end_panels(b->rows);
    }
    free(own);
}
