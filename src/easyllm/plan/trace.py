"""The whole decoder on tape, layer by layer."""

from dataclasses import dataclass

from easyllm.nn.config import LayerConfig, Learned, ModelConfig, Rope
from easyllm.plan.tape import FP32, INT64, Activation, Event, Product, Tape, Work, kept_bytes
from easyllm.plan.tape_attention import mix
from easyllm.plan.tape_feed_forward import feed_forward


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTrace:
    """One layer's events; `fed` are those inside its feed-forward, which may be computed again alone."""

    before: list[Event]
    fed: list[Event]
    after: list[Event]
    input: Activation
    feed_forward_input: Activation

    @property
    def events(self) -> list[Event]:
        return [*self.before, *self.fed, *self.after]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelTrace:
    """A forward pass: its layers, the head's product, and what is kept outside the layers."""

    layers: list[LayerTrace]
    head: Product
    shared_bytes: int


def trace_model(config: ModelConfig, work: Work) -> ModelTrace:
    """Follows `Decoder.forward` and the loss."""
    width = config.hidden_size
    x = Activation("x", work.tokens * width * FP32, work.input_grad)
    layers = []
    for layer in config.layers:
        trace, x = _trace_layer(layer, config, Tape(work), x)
        layers.append(trace)
    tape = Tape(work)
    if config.final_norm:
        x = tape.norm(config.norm, x, width, "hidden")
    return ModelTrace(
        layers=layers,
        head=_head(config, work, x),
        shared_bytes=kept_bytes(tape.events) + _tables(config, work) + _indices(config, work),
    )


def _trace_layer(
    layer: LayerConfig, config: ModelConfig, tape: Tape, x: Activation
) -> tuple[LayerTrace, Activation]:
    """A layer's events, and the residual stream behind it."""
    entered, width = x, config.hidden_size
    placement = layer.norm_placement
    pre = placement in ("pre", "sandwich")
    start = tape.norm(config.norm, x, width, "mixer_norm") if pre else x
    x = _add(tape, layer, config, x, mix(tape, layer.mixer, start, width), "mixed")
    start = tape.norm(config.norm, x, width, "feed_forward_norm") if pre else x
    before, tape.events = tape.events, []
    out = feed_forward(tape, layer.feed_forward, start, width)
    fed, tape.events = tape.events, []
    x = _add(tape, layer, config, x, out, "fed")
    trace = LayerTrace(
        before=before, fed=fed, after=tape.events, input=entered, feed_forward_input=start
    )
    return trace, Activation("x", x.nbytes, x.grad)


def _add(
    tape: Tape, layer: LayerConfig, config: ModelConfig, x: Activation, block: Activation, name: str
) -> Activation:
    """The residual stream with a block's output added: fp32, or behind a post-norm the dtype of the weights."""
    width = config.hidden_size
    if tape.work.dropout and block.grad:
        tape.keep(f"{name}.noise", block.nbytes)
    if layer.norm_placement == "sandwich":
        block = tape.norm(
            config.norm, Activation(f"{name}.out", block.nbytes, block.grad), width, f"{name}.post"
        )
    total = Activation(f"x+{name}", x.nbytes, x.grad or block.grad)
    if layer.norm_placement == "post":
        return tape.norm(config.norm, total, width, f"{name}.after")
    return total


def _head(config: ModelConfig, work: Work, hidden: Activation) -> Product:
    """Of the loss: logits, then ∂hidden and, where the head is trained, ∂weight."""
    rows, width = work.labelled, config.vocab_size
    trained = work.trains_all
    if config.num_labels is not None:
        rows, width, trained = len(work.lengths), config.num_labels, True
    flops = 2 * rows * width * config.hidden_size
    return Product("head", flops, flops * (trained + hidden.grad))


def _tables(config: ModelConfig, work: Work) -> int:
    """cos and sin of every rotation the model has, computed once a forward pass."""
    found = {
        (layer.mixer.position, layer.mixer.position.rotary_dim or layer.mixer.head_dim)
        for layer in config.layers
        if isinstance(layer.mixer.position, Rope)
    }
    return sum(work.tokens * width * FP32 for _, width in found)


def _indices(config: ModelConfig, work: Work) -> int:
    """Token ids, and positions where they are looked up, for the embeddings' gradients."""
    if not work.trains_all:
        return 0
    return work.tokens * INT64 * (1 + isinstance(config.embedding_position, Learned))
