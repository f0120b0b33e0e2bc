"""What mixers run and keep: `nn/attention`, `nn/linear_attention` and the functions of `ops/` they call."""

from easyllm.nn.config import (
    Alibi,
    AttentionConfig,
    LinearAttentionConfig,
    ReRope,
    Rope,
    Shaw,
    StreamingRope,
    T5Bias,
)
from easyllm.plan.linears import mixer_linears
from easyllm.plan.pairs import visible_pairs
from easyllm.plan.tape import FP32, INT64, Activation, Tape

CHUNK = 64
"""Tokens that causal linear attention takes at a time (`ops.linear_attention.cumulative`)."""


def mix(
    tape: Tape, mixer: AttentionConfig | LinearAttentionConfig, x: Activation, width: int
) -> Activation:
    """A mixer's output."""
    linears = mixer_linears(mixer, width)
    q, k, v = (tape.linear(linears[name], x) for name in ("q_proj", "k_proj", "v_proj"))
    if isinstance(mixer, LinearAttentionConfig):
        out = _linear_attention(tape, mixer, q, k, v)
    else:
        out = _softmax_attention(tape, mixer, q, k, v)
    return tape.linear(linears["o_proj"], out)


def _softmax_attention(
    tape: Tape, mixer: AttentionConfig, q: Activation, k: Activation, v: Activation
) -> Activation:
    q, k = (
        _turned(tape, mixer, x, heads)
        for x, heads in ((q, mixer.num_heads), (k, mixer.num_kv_heads))
    )
    tokens, width = tape.work.tokens, mixer.num_heads * mixer.head_dim
    if mixer.logn_length is not None and q.grad:
        tape.keep("logn", tokens * tape.work.itemsize)
        q = Activation("q.scaled", q.nbytes, grad=True)
    out = tape.made("mixed", width, grad=q.grad or k.grad or v.grad)
    explicit = mixer.softcap is not None or isinstance(
        mixer.position, Shaw | ReRope | StreamingRope
    )
    trained_bias = isinstance(mixer.position, T5Bias) and tape.work.trains_all
    if out.grad and (explicit or trained_bias):
        _keep_products_written_out(tape, mixer, q, k)
    elif out.grad:
        tape.keep_all(q, k, v, out)
        tape.keep("log_normaliser", tokens * mixer.num_heads * FP32)
        if _kernel_fits(mixer):
            tape.keep("starts", (len(tape.work.lengths) + 1) * INT64)
        else:
            out = _keep_masks(tape, mixer, out)
    _score_products(tape, mixer, q, k, v)
    return out


def _turned(tape: Tape, mixer: AttentionConfig, x: Activation, heads: int) -> Activation:
    """Queries or keys, normalised and turned; the tables of angles are the model's, not a layer's."""
    if mixer.qk_norm is not None:
        rows = tape.work.tokens * heads
        x = tape.norm(mixer.qk_norm, x, mixer.head_dim, f"{x.name}.normed", rows=rows)
    if isinstance(mixer.position, Rope):
        x = Activation(f"{x.name}.turned", x.nbytes, x.grad)
    return x


def _kernel_fits(mixer: AttentionConfig) -> bool:
    """Whether training runs the C kernel (or on a GPU SDPA's, which keeps the same)."""
    plain = mixer.softcap is None and not isinstance(mixer.position, Alibi | T5Bias)
    return plain and not mixer.num_sinks and (mixer.causal or mixer.window is None)


def _keep_masks(tape: Tape, mixer: AttentionConfig, out: Activation) -> Activation:
    """SDPA with a mask of numbers, a sequence at a time, whose outputs are then joined."""
    heads = mixer.num_heads if isinstance(mixer.position, Alibi | T5Bias) else 1
    pairs = sum(n * n for n in tape.work.lengths)
    tape.keep("mask", heads * pairs * tape.work.itemsize)
    if len(tape.work.lengths) == 1:
        return out
    return Activation("mixed.joined", out.nbytes, out.grad)


def _keep_products_written_out(
    tape: Tape, mixer: AttentionConfig, q: Activation, k: Activation
) -> None:
    """Queries, keys, values and weights in fp32, and what the kind of positions adds."""
    tokens, heads, dim = tape.work.tokens, mixer.num_heads, mixer.head_dim
    pairs = sum(n * n for n in tape.work.lengths)
    wide = tokens * heads * dim * FP32
    trained, position = tape.work.trains_all, mixer.position
    tape.keep("weights", heads * pairs * FP32)
    if k.grad or (trained and isinstance(position, Shaw)):
        tape.keep(q.name if tape.work.itemsize == FP32 else "q.wide", wide)
    if q.grad:
        tape.keep("k.repeated", wide)
    if q.grad or k.grad:
        tape.keep("v.repeated", wide)
        tape.keep("visible", pairs)
        if mixer.softcap is not None:
            tape.keep("capped", heads * pairs * FP32)
    if isinstance(position, T5Bias):
        tape.keep("buckets", pairs * INT64)
    if isinstance(position, Shaw):
        tables = q.grad + (position.values and (q.grad or k.grad))
        tape.keep("vectors", tables * pairs * dim * FP32)
        tape.keep("rows of vectors", trained * (1 + position.values) * pairs * INT64)
    if isinstance(position, ReRope | StreamingRope):
        tape.keep("rectified", 4 * wide)


def _score_products(
    tape: Tape, mixer: AttentionConfig, q: Activation, k: Activation, v: Activation
) -> None:
    """q kᵀ and weights · v, with what relative vectors and rectified positions add."""
    pairs = sum(visible_pairs(mixer, n, tape.work.counting) for n in tape.work.lengths)
    unit = 2 * pairs * mixer.num_heads * mixer.head_dim
    position, trained = mixer.position, tape.work.trains_all
    scores = q.grad or k.grad
    tape.product("scores", unit, unit * (q.grad + k.grad))
    tape.product("scores", unit, unit * (scores + v.grad))
    if isinstance(position, ReRope | StreamingRope):
        tape.product("scores", unit, unit * (q.grad + k.grad))
    if isinstance(position, Shaw):
        tape.product("scores", unit, unit * (q.grad + trained))
        if position.values:
            tape.product("scores", unit, unit * (scores + trained))


def _linear_attention(
    tape: Tape, mixer: LinearAttentionConfig, q: Activation, k: Activation, v: Activation
) -> Activation:
    heads, dim = mixer.num_heads, mixer.head_dim
    features = dim + (mixer.features == "cosine")
    sequences = [_chunks(n) if mixer.causal else [n] for n in tape.work.lengths]
    query = q.grad or k.grad  # a query is divided by a total of keys
    state = k.grad or v.grad
    out = tape.made("mixed", heads * dim, grad=query or state)
    if out.grad:
        _keep_features(tape, mixer, features, sequences)
    for chunks in sequences:
        for number, rows in enumerate(chunks):
            first, last = mixer.causal and number == 0, mixer.causal and number == len(chunks) - 1
            unit = 2 * heads * rows * features * dim
            tape.product("scores", unit, unit * (query + (state and not first)))  # q S
            tape.product("scores", unit, unit * (k.grad + v.grad) * (not last))  # k vᵀ, added to S
            if mixer.causal:
                pairs = rows * rows if tape.work.counting == "full" else rows * (rows + 1) // 2
                inside = 2 * heads * pairs
                tape.product("scores", inside * features, inside * features * (query + k.grad))
                tape.product("scores", inside * dim, inside * dim * (query + state))
    return out


def _chunks(length: int) -> list[int]:
    return [min(CHUNK, length - start) for start in range(0, length, CHUNK)]


def _keep_features(
    tape: Tape, mixer: LinearAttentionConfig, features: int, sequences: list[list[int]]
) -> None:
    """In fp32: queries, keys, their features, totals and values; pairs inside chunks and states between them. (Right for
    causal attention; without a causal mask, and of the cosine features, a few per cent less is kept.)"""
    tokens, heads, dim = tape.work.tokens, mixer.num_heads, mixer.head_dim
    by_pair = mixer.features != "softmax"  # how the normaliser is formed
    copies = 5 + by_pair + isinstance(mixer.position, Rope)
    tape.keep("features", tokens * heads * (copies * features + dim + by_pair) * FP32)
    chunks = [rows for chunks in sequences for rows in chunks]
    tape.keep("states", heads * len(chunks) * features * dim * FP32)
    if mixer.causal:
        tape.keep("inside", heads * sum(rows * rows for rows in chunks) * FP32)
