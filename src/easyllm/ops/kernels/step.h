// The compiled decoding step: its model and batch, and how threads share a step's work.
//
// Terms
//   row      a token of the batch
//   phase    a part of the step that must be complete before the next one starts (a barrier)
//   piece    a part of a phase that one thread processes
//   task     attention of one row and KV head over one split (64 keys, see paged.h)
//   panel    the outputs that linear_panel computes in one call (see matrix.h)
//   part     partial result of attention over one split (see paged.h)
//   update   the low-rank change B A that an adapter makes to a matrix (see low_rank.h)
//   group    the rows of a batch that use one adapter
//
// Data layout: activations are [rows][width] in fp32; weights are Matrix, the KV cache is Pages. A
// thread's arrays and the shared ones are consecutive in one workspace, without sharing cache
// lines.
//
// Threads take the pieces of a phase dynamically, and the phase ends when all pieces are done. A
// thread that the system has preempted delays the others by its current piece only, not at every
// phase. The result of a piece is bitwise independent of the thread. There are few rows: a single
// row is normalized by every thread separately, which is cheaper than waiting for another thread.
//
// All arithmetic is fp32. With `rounds`, results that the PyTorch decoder stores in bf16 are
// rounded to bf16, so that both compute the same bits (deterministic mode).
#pragma once
#include <omp.h>
#include <sched.h>

#include "low_rank.h"
#include "paged.h"

enum { Q, K, V, O, GATE, UP, DOWN, MATRICES };  // matrices of a layer, in the order of use

typedef struct {
    Matrix matrices[MATRICES];
    const Update *updates;                        // [MATRICES][num_adapters], or NULL
    const float *mixer_norm, *feed_forward_norm;  // [hidden]
    const float *q_norm, *k_norm;                 // [dim] or NULL
    const float *cosine, *sine;                   // [positions][pairs], NULL without RoPE
    const float *slopes;                          // [heads], NULL without ALiBi
    i64 heads, kv_heads, dim, pairs, window;
    float scale, eps, head_eps;
} Layer;

typedef struct {
    Matrix embedding, head;
    const Update *head_updates;  // [num_adapters], or NULL
    const float *final_norm;
    const Layer *layers;
    i64 num_layers, hidden;
    i64 num_adapters, max_rank;  // max_rank: the highest rank of an update, padded to OUTPUTS
    float embedding_scale, eps;
    int rounds;
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
    // Rows that use an adapter, group by group: group g has adapter group_adapters[g] and the rows
    // group_rows[group_starts[g] .. group_starts[g + 1])
    i64 num_groups;
    const i64 *group_adapters, *group_starts, *group_rows;
} Batch;

typedef struct {
    i64 next, done;  // pieces taken, pieces finished
    char padding[48];  // padding to a separate cache line
} Phase;

// Activations shared by all threads; x is the residual stream.
typedef struct {
    float *x, *q, *k, *v, *parts;
    float *inner;  // A x of the matrices with one input: [matrix][rows][max_rank]
    Rows normed, mixed, fed;
    Phase *phases;
} Shared;

// A thread, with the step that it takes part in.
typedef struct {
    const Model *m;
    const Batch *b;
    const Shared *sh;
    int threads;
    Phase *phase;        // the current one
    Rows normed, mixed;  // private copies, if there is one row
    float *row, *state, *scratch;
    float *gate, *up;  // [rows][GROUP]: intermediate results of a piece, private to the thread
} Thread;

// Matrices that share an input.
typedef struct {
    const Matrix *matrices;
    const Update *updates;  // theirs, [count][num_adapters], or NULL
    i64 count;
} Projections;

#if defined(__x86_64__) || defined(__i386__)
#define RELAX() __builtin_ia32_pause()
#else
#define RELAX() ((void)0)
#endif
#define SPINS_BEFORE_YIELD 2000  // spins before a waiting thread yields its core
#define PIECES 4                 // pieces of a phase per thread

// Takes the next piece [*from, *to) of the current phase; returns 0 if there is none.
static inline int take_piece(Thread *t, i64 total, i64 *from, i64 *to) {
    i64 size = max_(1, total / (PIECES * t->threads));
    *from = __atomic_fetch_add(&t->phase->next, size, __ATOMIC_RELAXED);
    *to = min_(total, *from + size);
    return *from < total;
}

static inline void piece_done(Thread *t, i64 count) {
    __atomic_fetch_add(&t->phase->done, count, __ATOMIC_RELEASE);
}

// Waits until all pieces of the current phase are done.
static inline void end_phase(Thread *t, i64 total) {
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

// The matrices [first, first + count) of a layer.
static inline Projections projections_of(const Thread *t, const Layer *l, int first, int count) {
    const Update *updates = l->updates ? l->updates + first * t->m->num_adapters : NULL;
    return (Projections){l->matrices + first, updates, count};
}

static inline void round_values(const Thread *t, float *x, i64 count) {
    if (t->m->rounds) round_to_bf16(x, count);
}

// Prepares a row of activations for its products with `next`: quantizes it for quantized matrices,
// and packs it for others.
static inline void prepare_row(const Thread *t, Projections next, const Rows *rows, i64 row) {
    int quantized = 0, dense = 0;
    for (i64 i = 0; i < next.count; i++)
        *(is_quantized(next.matrices + i) ? &quantized : &dense) = 1;
    if (quantized) quantize_row(rows, row, rows->values + row * rows->inputs);
    if (dense) pack_values(rows, row, t->b->rows, 0, rows->inputs);
}

// step_attention.c: attention of all rows, from projected q, k and v to outputs that are prepared
// for the output projection.
i64 num_tasks(const Layer *l, const Batch *b, i64 rows);
void rotate_and_store(Thread *t, const Layer *l, const Pages *p);
void attend(Thread *t, const Layer *l, const Pages *p);
const Rows *merged(Thread *t, const Layer *l);

// step_adapters.c: prefetches B of one panel of matrix `index` of `p`, before the panel is computed
void fetch_up(const Thread *t, Projections p, i64 index, i64 panel);

// step_adapters.c: inner = A x of the updates of `p`, whose input is x. A phase of its own; nothing
// if no row uses an adapter.
void updates_down(Thread *t, Projections p, const Rows *x);

// step_adapters.c: out += scale * B inner for one panel of matrix `index` of `p`; out_stride:
// floats from row to row
void updates_up(const Thread *t, Projections p, i64 index, i64 panel, float *out, i64 out_stride);
