"""What a part's forward pass costs, stated next to it: the products it runs, and what autograd keeps of it.

Every part has a method `cost(trace, x)` next to its `forward(x)`: it takes and gives an `Activation`, a tensor of which only
name, size and whether it has a gradient are known, and notes in the trace what `forward` would do. One trace gives both
FLOPs and activations, so that the two cannot disagree on what runs. `plan/` sums traces; tests hold them against real models.

FLOPs count a multiply-add as 2. A product y = x Wᵀ costs 2·rows·in·out; its backward pass as much again for ∂W where W is
trained, and as much for ∂x where x has a gradient.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import nn

from easyllm.nn.pairs import Counting

if TYPE_CHECKING:
    from easyllm.nn.linear import Linear

Part = Literal["attention", "scores", "feed_forward", "router", "head", "adapters"]
LinearPart = Literal["attention", "feed_forward", "router"]
FP32, INT64 = 4, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearShape:
    """A linear of a layer, or one that all experts of the layer have alike.

    Attributes:
        name: as the module is called (`q_proj`).
        copies: how many of it the layer holds (its experts).
    """

    name: str
    part: LinearPart
    in_features: int
    out_features: int
    copies: int = 1

    @property
    def weights(self) -> int:
        """Elements of all copies' matrices."""
        return self.copies * self.in_features * self.out_features

    @property
    def rank(self) -> int:
        """The largest the matrix can have."""
        return min(self.in_features, self.out_features)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What passes through a model, and what of it is trained.

    Attributes:
        lengths: tokens of each packed sequence.
        labelled: tokens that carry a loss, and so pass the head.
        itemsize: bytes of an element of the dtype that products run in.
        counting: which pairs of tokens the products of attention count.
        input_grad: whether what enters the first layer's products has a gradient, as it has when an embedding is trained.
        dropout: whether the outputs of mixers and feed-forwards are dropped out.
        trains_all: whether the weights themselves are trained, not adapters alone.
    """

    lengths: tuple[int, ...]
    labelled: int
    itemsize: int = 2
    counting: Counting = "causal"
    input_grad: bool = True
    dropout: bool = False
    trains_all: bool = True

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def pairs(self) -> int:
        """All pairs of tokens of a sequence, masked ones too."""
        return sum(n * n for n in self.lengths)


@dataclass(frozen=True, slots=True)
class Activation:
    """A tensor of the forward pass: a name (one name is one tensor of a layer), its bytes, whether it has a gradient."""

    name: str
    nbytes: int
    grad: bool


@dataclass(frozen=True, slots=True)
class Scores:
    """Attention's products as positions see them: queries, keys, values, heads of `dim`, FLOPs of q kᵀ."""

    q: Activation
    k: Activation
    v: Activation
    heads: int
    dim: int
    flops: int


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


class CostTrace:
    """Takes down what the parts of a layer do, in order."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.events: list[Event] = []

    def of(self, part: nn.Module, *arguments: object, **options: object) -> Activation:
        """`part.cost(self, ...)`.

        Raises:
            NotImplementedError: the part does not state its cost.
        """
        cost = getattr(part, "cost", None)
        if cost is None:
            raise NotImplementedError(f"{type(part).__name__} states no cost next to its forward")
        made = cost(self, *arguments, **options)
        assert isinstance(made, Activation)
        return made

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
        """A matrix product of so many FLOPs."""
        self.events.append(Product(part, forward, backward))

    def linear(
        self,
        layer: "Linear",
        name: str,
        x: Activation,
        *,
        part: LinearPart,
        rows: int | None = None,
        copies: int = 1,
        prefix: str = "",
    ) -> Activation:
        """`Linear.forward`: the product, then the adapter where there is one.

        Args:
            name: as the module is called in its parent; prefix: of its tensors, where a layer has several of the name.
            copies: modules alike that share the rows (experts).
        """
        work = self.work
        rows = work.tokens if rows is None else rows
        shape = LinearShape(
            name=name,
            part=part,
            in_features=layer.in_features,
            out_features=layer.out_features,
            copies=copies,
        )
        flops = 2 * rows * shape.in_features * shape.out_features
        tensor = prefix + name
        if work.trains_all:
            self.keep_all(x)
        elif x.grad:
            # a parameter: no memory of its own, but an end to recomputation
            self.keep(f"{tensor}.weight", 0)
        self.product(part, flops, flops * (work.trains_all + x.grad))
        if layer.adapter is not None:
            layer.adapter.cost(self, shape, x, rows, tensor)
        grad = x.grad or work.trains_all or layer.adapter is not None
        return self.made(tensor, shape.out_features, grad=grad, rows=rows)

    def cast_bytes(self, elements: int) -> int:
        """Of a copy of fp32 numbers in the dtype that products run in; none where that is fp32."""
        return 0 if self.work.itemsize == FP32 else self.work.itemsize * elements


def kept_bytes(events: Iterable[Event]) -> int:
    """Bytes of the tensors kept, each counted once."""
    return sum({event.name: event.nbytes for event in events if isinstance(event, Kept)}.values())


def computed_again(events: list[Event]) -> list[Product]:
    """Products that run again when a block is recomputed: it stops as soon as the last tensor it kept is there."""
    last = max((i for i, event in enumerate(events) if isinstance(event, Kept)), default=-1)
    return [event for event in events[: last + 1] if isinstance(event, Product)]


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
