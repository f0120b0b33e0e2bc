"""Factors per channel between a layer's norm or linear and the linears that read its output.

Dividing the output channels of a module by factors s and multiplying the columns of the linears
that read them by s leaves the function as it is. AWQ and SmoothQuant choose s so that quantization
loses less. It is possible where nothing but linears reads the output:

    norm before attention → q, k, v        v → o (each value head feeds its group of query heads)
    norm before feed-forward → gate, up    up → down (the gate's activation is another factor)
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from easyllm.nn.attention import Attention
from easyllm.nn.decoder import DecoderLayer
from easyllm.nn.feed_forward import MLP
from easyllm.nn.glu import GLU
from easyllm.nn.linear import Linear
from easyllm.nn.linear_attention import LinearAttention
from easyllm.nn.moe import MoE
from easyllm.nn.norm import LayerNorm, OffsetRMSNorm, RMSNorm

Source = RMSNorm | LayerNorm | Linear


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleGroup:
    """A module, and all linears that read its output.

    Attributes:
        name: the module's name in its layer.
        source: the norm or linear whose output channels [S] can be divided.
        linears: the readers to quantize, by their names in the layer.
        others: further readers, which stay in full precision (routers).
        heads: (number of value heads, query heads each of them feeds, width of a head) where the
            readers' K inputs repeat the source's channels; None where S = K.
    """

    name: str
    source: Source
    linears: dict[str, Linear]
    others: tuple[Linear, ...] = ()
    heads: tuple[int, int, int] | None = None

    def gather(self, inputs: Tensor, *, most: bool = False) -> Tensor:
        """Returns values per channel [S] of values per input [K], whose channels may repeat.

        Args:
            inputs: [K].
            most: whether the largest of the inputs that a channel feeds counts, not their mean.
        """
        if self.heads is None:
            return inputs
        count, repeats, width = self.heads
        each = inputs.view(count, repeats, width)
        return (each.amax(1) if most else each.mean(1)).flatten()

    def spread(self, channels: Tensor) -> Tensor:
        """Returns values per channel [S] as values per input [K]."""
        if self.heads is None:
            return channels
        count, repeats, width = self.heads
        return channels.view(count, 1, width).expand(-1, repeats, -1).flatten()

    @torch.no_grad()
    def fold(self, factors: Tensor) -> None:
        """Divides the source's channels by `factors: [S]` and multiplies the readers' columns."""
        divide(self.source, factors)
        columns = self.spread(factors)
        for linear in (*self.linears.values(), *self.others):
            weight = linear.weight
            weight.copy_((weight.float() * columns).to(weight.dtype))


@torch.no_grad()
def divide(source: Source, factors: Tensor) -> None:
    """Divides the output channels [S] of a norm or a dense linear by `factors: [S]`."""
    weight = source.weight
    wide = weight.float()
    if isinstance(source, Linear):
        weight.copy_((wide / factors[:, None]).to(weight.dtype))
    elif isinstance(source, OffsetRMSNorm):
        weight.copy_(((1 + wide) / factors - 1).to(weight.dtype))
    else:
        weight.copy_((wide / factors).to(weight.dtype))
    bias = getattr(source, "bias", None)
    if bias is not None:
        bias.copy_((bias.float() / factors).to(bias.dtype))


def scale_groups(layer: DecoderLayer) -> Iterator[ScaleGroup]:
    """Yields the groups of a layer, in the order of the forward pass."""
    mixer = layer.mixer
    if isinstance(mixer, Attention | LinearAttention):
        if isinstance(layer.mixer_norm, RMSNorm | LayerNorm):
            read = {
                f"mixer.{name}": getattr(mixer, name) for name in ("q_proj", "k_proj", "v_proj")
            }
            yield ScaleGroup(name="mixer_norm", source=layer.mixer_norm, linears=read)
        yield ScaleGroup(
            name="mixer.v_proj",
            source=mixer.v_proj,
            linears={"mixer.o_proj": mixer.o_proj},
            heads=_heads(mixer),
        )
    yield from _feed_forward_groups(layer)


def _heads(mixer: Attention | LinearAttention) -> tuple[int, int, int] | None:
    if isinstance(mixer, LinearAttention):
        return None
    config = mixer.config
    repeats = config.num_heads // config.num_kv_heads
    return None if repeats == 1 else (config.num_kv_heads, repeats, config.head_dim)


def _feed_forward_groups(layer: DecoderLayer) -> Iterator[ScaleGroup]:
    block = layer.feed_forward
    parts: dict[str, nn.Module] = {"feed_forward": block}
    others: tuple[Linear, ...] = ()
    if isinstance(block, MoE):
        parts = {f"feed_forward.experts.{i}": expert for i, expert in enumerate(block.experts)}
        if block.shared is not None:
            parts["feed_forward.shared"] = block.shared
        others = tuple(gate for gate in (block.router, block.shared_gate) if gate is not None)
    first = {
        f"{name}.{leaf}": getattr(part, leaf)
        for name, part in parts.items()
        for leaf in ("gate_proj", "up_proj")
        if hasattr(part, leaf)
    }
    norm = layer.feed_forward_norm
    if isinstance(norm, RMSNorm | LayerNorm):
        yield ScaleGroup(name="feed_forward_norm", source=norm, linears=first, others=others)
    for name, part in parts.items():
        if isinstance(part, GLU) or (isinstance(part, MLP) and _is_homogeneous(part)):
            yield ScaleGroup(
                name=f"{name}.up_proj",
                source=part.up_proj,
                linears={f"{name}.down_proj": part.down_proj},
            )


def _is_homogeneous(block: MLP) -> bool:
    """Whether act(x / s) = act(x) / s for s > 0."""
    return block.config.activation == "relu"


__all__ = ["ScaleGroup", "divide", "scale_groups"]
