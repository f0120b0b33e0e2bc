"""What feed-forwards run and keep: `nn/feed_forward`, `nn/glu`, `nn/moe` and `ops/activation`."""

from easyllm.nn.config import FeedForward, GLUConfig, MLPConfig, MoEConfig
from easyllm.plan.linears import dense_linears, router_linear, shared_gate_linear
from easyllm.plan.tape import FP32, INT64, Activation, Tape

_KEEP_RESULT = ("relu", "sigmoid")
"""Activations whose derivative is a function of their result, which is therefore what autograd keeps."""


def feed_forward(tape: Tape, config: FeedForward, x: Activation, width: int) -> Activation:
    """A feed-forward's output."""
    if isinstance(config, MoEConfig):
        return _mixture(tape, config, x, width)
    return _dense(tape, config, x, width)


def _dense(
    tape: Tape,
    config: GLUConfig | MLPConfig,
    x: Activation,
    width: int,
    *,
    rows: int | None = None,
    copies: int = 1,
    prefix: str = "",
) -> Activation:
    linears = dense_linears(config, width, copies=copies)
    inner = [
        tape.linear(linear, x, rows=rows, prefix=prefix)
        for name, linear in linears.items()
        if name != "down_proj"
    ]
    act = Activation(f"{prefix}act", inner[0].nbytes, any(h.grad for h in inner))
    if act.grad:
        _keep_activation(tape, config, inner, act, prefix)
    return tape.linear(linears["down_proj"], act, rows=rows, prefix=prefix)


def _keep_activation(
    tape: Tape,
    config: GLUConfig | MLPConfig,
    inner: list[Activation],
    act: Activation,
    prefix: str,
) -> None:
    result_kept = config.activation in _KEEP_RESULT
    if isinstance(config, MLPConfig):
        tape.keep_all(act if result_kept else inner[0])
    elif config.activation == "silu":  # recomputes the rest
        tape.keep_all(*inner)
    else:
        if not result_kept:
            tape.keep_all(inner[0])
        tape.keep_all(Activation(f"{prefix}gate.act", act.nbytes, grad=True), inner[1])


def _mixture(tape: Tape, config: MoEConfig, x: Activation, width: int) -> Activation:
    """The router in fp32, rows sorted by expert through their experts, brought back, weighed and added up."""
    work, tokens = tape.work, tape.work.tokens
    wide = Activation(x.name if work.itemsize == FP32 else "x.wide", tokens * width * FP32, x.grad)
    logits = tape.linear(router_linear(config, width), wide)
    rows = _routed_rows(config, tokens)
    if logits.grad:
        _keep_routing(tape, config, width, rows)
    parts = tape.made("parts", width, grad=x.grad, rows=rows)
    out = _dense(
        tape, config.expert, parts, width, rows=rows, copies=config.num_experts, prefix="expert."
    )
    if out.grad:
        choices = tokens * config.experts_per_token
        tape.keep("scale", choices * work.itemsize)
        tape.keep("place", choices * INT64)
        if logits.grad:
            tape.keep_all(tape.made("returned", width, grad=True, rows=choices))
    if config.shared is not None:
        _shared_expert(tape, config, config.shared, x, width)
    return tape.made("fed", width, grad=out.grad)


def _routed_rows(config: MoEConfig, tokens: int) -> int:
    """Rows all experts take together; with a capacity at most so many."""
    rows = tokens * config.experts_per_token
    if config.capacity_factor is None:
        return rows
    capacity = max(1, int(rows / config.num_experts * config.capacity_factor))
    return min(rows, config.num_experts * capacity)


def _keep_routing(tape: Tape, config: MoEConfig, width: int, rows: int) -> None:
    """Probabilities, chosen experts, the order of rows."""
    work, k = tape.work, config.experts_per_token
    tokens = work.tokens
    if work.itemsize != FP32:
        tape.keep("router.weight.wide", config.num_experts * width * FP32)
    if config.routing == "softmax_topk":
        tape.keep("probabilities", tokens * config.num_experts * FP32)
        if config.normalise:
            tape.keep("chosen weights", tokens * (k + 1) * FP32)
    else:
        tape.keep("chosen weights", tokens * k * FP32)
    tape.keep("chosen", tokens * k * INT64)
    tape.keep("dropped", tokens * k)
    tape.keep("order", rows * INT64)


def _shared_expert(
    tape: Tape, config: MoEConfig, shared: GLUConfig, x: Activation, width: int
) -> None:
    out = _dense(tape, shared, x, width, prefix="shared.")
    if not config.shared_gate:
        return
    gate = tape.linear(shared_gate_linear(width), x)
    if gate.grad:
        tape.keep_all(out)
    if out.grad:
        tape.keep_all(Activation("shared.sigmoid", gate.nbytes, gate.grad))
