"""A forward pass without tensors: the products it runs, and what autograd keeps of it until the backward pass.

One tape gives both FLOPs and activations, so that the two cannot disagree on what runs. It mirrors `nn/` and `ops/`: a
change there that runs another product or keeps another tensor is a change here (tests hold it against real models).

FLOPs count a multiply-add as 2. A product y = x Wᵀ costs 2·rows·in·out; its backward pass as much again for ∂W where W is
trained, and as much for ∂x where x has a gradient.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from easyllm.adapters.lora import LoRAConfig
from easyllm.nn.config import LayerNormConfig, Norm
from easyllm.plan.linears import LinearShape, is_adapted
from easyllm.plan.pairs import Counting

Part = Literal["attention", "scores", "feed_forward", "router", "head", "adapters"]
FP32, INT64 = 4, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What passes through a model, and what of the model is trained.

    Attributes:
        lengths: tokens of each packed sequence.
        labelled: tokens that carry a loss, and so pass the head.
        itemsize: bytes of an element of the dtype that products run in.
        counting: which pairs of tokens the products of attention count.
        lora: adapters, trained instead of the model.
        input_grad: whether what enters the first layer's products has a gradient, as it has when an embedding is trained.
        dropout: whether the outputs of mixers and feed-forwards are dropped out.
    """

    lengths: tuple[int, ...]
    labelled: int
    itemsize: int = 2
    counting: Counting = "causal"
    lora: LoRAConfig | None = None
    input_grad: bool = True
    dropout: bool = False

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def trains_all(self) -> bool:
        return self.lora is None


@dataclass(frozen=True, slots=True)
class Activation:
    """A tensor of the forward pass: a name (one name is one tensor of a layer), its bytes, whether it has a gradient."""

    name: str
    nbytes: int
    grad: bool


@dataclass(frozen=True, slots=True)
class Product:
    """A matrix product: FLOPs of the forward and of the backward pass."""

    part: Part
    forward: int
    backward: int


@dataclass(frozen=True, slots=True)
class Kept:
    """A tensor autograd keeps for the backward pass."""

    name: str
    nbytes: int


Event = Product | Kept


class Tape:
    """Takes down what the blocks of a layer do, in order."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.events: list[Event] = []

    def made(self, name: str, width: int, *, grad: bool, rows: int | None = None) -> Activation:
        """A new [rows, width] in the dtype of the weights; by default a row a token."""
        rows = self.work.tokens if rows is None else rows
        return Activation(name, rows * width * self.work.itemsize, grad)

    def keep(self, name: str, nbytes: int) -> None:
        """Autograd keeps a tensor that is used for nothing else."""
        self.events.append(Kept(name, nbytes))

    def keep_all(self, *tensors: Activation) -> None:
        """Autograd keeps these."""
        for tensor in tensors:
            self.keep(tensor.name, tensor.nbytes)

    def product(self, part: Part, forward: int, backward: int) -> None:
        self.events.append(Product(part, forward, backward))

    def linear(
        self, linear: LinearShape, x: Activation, *, rows: int | None = None, prefix: str = ""
    ) -> Activation:
        """`Linear.forward`: the product, then the adapter where there is one."""
        work = self.work
        rows = work.tokens if rows is None else rows
        flops = 2 * rows * linear.in_features * linear.out_features
        name = prefix + linear.name
        if work.trains_all:
            self.keep_all(x)
        elif x.grad:
            self.keep(
                f"{name}.weight", 0
            )  # a parameter: no memory of its own, but an end to recomputation
        self.product(linear.part, flops, flops * (work.trains_all + x.grad))
        if is_adapted(linear, work.lora):
            self._adapter(linear, x, rows, name)
        grad = x.grad or work.trains_all or is_adapted(linear, work.lora)
        return self.made(name, linear.out_features, grad=grad, rows=rows)

    def _adapter(self, linear: LinearShape, x: Activation, rows: int, name: str) -> None:
        """`LoRA.forward`: x Aᵀ, then Bᵀ added to the base's output; A and B are cast to the dtype of x."""
        work, lora = self.work, self.work.lora
        assert lora is not None, "an adapted linear has adapters"
        if lora.dropout:
            if x.grad:
                self.keep(f"{name}.noise", x.nbytes)
            x = Activation(f"{name}.dropped", x.nbytes, x.grad)
        down = 2 * rows * linear.in_features * lora.rank
        up = 2 * rows * lora.rank * linear.out_features
        cast = 0 if work.itemsize == FP32 else work.itemsize * lora.rank * linear.copies
        self.keep_all(x)
        if x.grad:
            self.keep(f"{name}.lora_A", cast * linear.in_features)
        self.product("adapters", down, down * (1 + x.grad))
        self.keep(f"{name}.inner", rows * lora.rank * work.itemsize)
        self.keep(f"{name}.lora_B", cast * linear.out_features)
        self.product("adapters", up, 2 * up)

    def norm(
        self, norm: Norm, x: Activation, width: int, name: str, *, rows: int | None = None
    ) -> Activation:
        """A norm over `width`, read in fp32, handed on in the dtype of the weights."""
        work = self.work
        rows = work.tokens if rows is None else rows
        if not x.grad:
            return self.made(name, width, grad=False, rows=rows)
        if isinstance(norm, LayerNormConfig):
            self.keep(
                x.name if x.nbytes == rows * width * FP32 else f"{name}.wide", rows * width * FP32
            )
            self.keep(f"{name}.statistics", 2 * rows * FP32)
            if work.itemsize != FP32:
                self.keep(f"{name}.weights", (1 + norm.bias) * width * FP32)
        else:
            self.keep_all(x)
            self.keep(f"{name}.inverse", rows * FP32)
            if norm.unit_offset:
                self.keep(f"{name}.weight", width * FP32)
        return self.made(name, width, grad=True, rows=rows)


def kept_bytes(events: Iterable[Event]) -> int:
    """Bytes of the tensors kept, each counted once."""
    return sum({event.name: event.nbytes for event in events if isinstance(event, Kept)}.values())


def computed_again(events: list[Event]) -> list[Product]:
    """Products that run again when a block is recomputed: it stops as soon as the last tensor it kept is there."""
    last = max((i for i, event in enumerate(events) if isinstance(event, Kept)), default=-1)
    return [event for event in events[: last + 1] if isinstance(event, Product)]
