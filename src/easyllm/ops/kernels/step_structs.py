"""Structs of the compiled decoding step, as step.h declares them."""

import ctypes

from easyllm.ops.kernels.structs import FLOAT, INT, LONG, POINTER, LowRankUpdate, Matrix, Pages

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
"""Matrices of a layer, in the order of `StepLayer.matrices`."""
OUTPUTS = 8
"""Outputs of a block; ranks are padded to a multiple."""


class StepLayer(ctypes.Structure):
    """A decoder layer of the compiled step: `Layer` in step.h.

    Attributes:
        matrices: projections of attention and of the feed-forward layer, in the order of
            `MATRICES`.
        updates: `LowRankUpdate` of each matrix and adapter, [matrices, adapters], or None.
        mixer_norm: weight of the norm before attention, [hidden], fp32.
        feed_forward_norm: weight of the norm before the feed-forward layer, [hidden], fp32.
        q_norm, k_norm: weights of the norms of queries and keys, [d], fp32, or None.
        cosine, sine: RoPE tables, [positions, pairs], fp32, or None.
        slopes: ALiBi slopes, [H], fp32, or None.
        heads, kv_heads: query heads H and KV heads K.
        dim: head dimension d.
        pairs: rotated pairs of a head.
        window: most recent keys that a query sees; 0 for all.
        scale: factor of the scores.
        eps, head_eps: `eps` of the layer's norms, and of the norms of queries and keys.
    """

    _fields_ = [
        ("matrices", Matrix * len(MATRICES)),
        ("updates", ctypes.POINTER(LowRankUpdate)),
        *((name, POINTER) for name in ("mixer_norm", "feed_forward_norm", "q_norm", "k_norm")),
        *((name, POINTER) for name in ("cosine", "sine", "slopes")),
        *((name, LONG) for name in ("heads", "kv_heads", "dim", "pairs", "window")),
        *((name, FLOAT) for name in ("scale", "eps", "head_eps")),
    ]


class StepModel(ctypes.Structure):
    """The model of the compiled step: `Model` in step.h.

    Attributes:
        embedding: [vocabulary, hidden].
        head: output head, [vocabulary, hidden].
        head_updates: `LowRankUpdate` of the head and each adapter, [adapters], or None.
        final_norm: weight of the last norm, [hidden], fp32.
        layers: array of `num_layers` layers.
        num_layers: number of layers.
        hidden: hidden size.
        num_adapters: number of adapters.
        max_rank: the highest rank of an update, padded to a multiple of `OUTPUTS`.
        embedding_scale: factor of the embeddings.
        eps: `eps` of the last norm.
        rounds: whether activations are rounded to bf16 where the decoder stores them in bf16.
    """

    _fields_ = [
        *((name, Matrix) for name in ("embedding", "head")),
        ("head_updates", ctypes.POINTER(LowRankUpdate)),
        ("final_norm", POINTER),
        ("layers", ctypes.POINTER(StepLayer)),
        *((name, LONG) for name in ("num_layers", "hidden", "num_adapters", "max_rank")),
        *((name, FLOAT) for name in ("embedding_scale", "eps")),
        ("rounds", INT),
    ]


class StepBatch(ctypes.Structure):
    """The rows of a call of `decode_step`: `Batch` in step.h.

    Attributes:
        rows: number of rows (tokens) R.
        token_ids: [R], int64.
        positions: RoPE positions, [R], int64.
        key_lengths: keys that each row sees, its own included, [R], int64.
        table: page tables, [R, table_width], int32.
        table_width: pages of a row of the table.
        pages: array of `Pages`, one per layer.
        logits: result, [R, vocabulary], fp32.
        num_groups: number of adapters that rows use.
        group_adapters: adapter of each group, [num_groups], int64.
        group_starts: first row of each group in `group_rows`, [num_groups + 1], int64.
        group_rows: rows that use an adapter, group by group, int64.
    """

    _fields_ = [
        ("rows", LONG),
        *((name, ctypes.POINTER(LONG)) for name in ("token_ids", "positions", "key_lengths")),
        ("table", POINTER),
        ("table_width", LONG),
        ("pages", ctypes.POINTER(Pages)),
        ("logits", POINTER),
        ("num_groups", LONG),
        *((n, ctypes.POINTER(LONG)) for n in ("group_adapters", "group_starts", "group_rows")),
    ]
