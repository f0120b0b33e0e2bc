"""Cost traces: the matrix products (GEMMs) and the saved activations of a forward pass.

Each part has a method `cost(trace, x)` next to its `forward(x)`. It takes and returns an
`Activation`, a tensor with only a name, a size and whether it has a gradient, and records in the
trace what `forward` would do. FLOPs and activation memory come from the same trace, so they cannot
disagree about what runs. `plan/` sums traces; tests compare them with real models.

A multiply-add counts as 2 FLOPs. The matrix product y = x Wᵀ costs 2·rows·in·out; its backward pass
costs the same for ∂W if W is trained, and the same for ∂x if x has a gradient.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import nn

from easyllm.nn.pairs import Counting

Part = Literal["attention", "scores", "feed_forward", "router", "head", "adapters"]
LinearPart = Literal["attention", "feed_forward", "router"]
FP32, INT64 = 4, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearShape:
    """The shape of a linear layer, or of one that all experts of a decoder layer have.

    Attributes:
        name: the module's name (`q_proj`).
        copies: number of copies in the decoder layer (its experts).
    """

    name: str
    part: LinearPart
    in_features: int
    out_features: int
    copies: int = 1

    @property
    def weights(self) -> int:
        """Number of elements in the matrices of all copies."""
        return self.copies * self.in_features * self.out_features

    @property
    def rank(self) -> int:
        """Maximum rank of the matrix."""
        return min(self.in_features, self.out_features)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The batch of a training step, and what is trained.

    Attributes:
        lengths: number of tokens of each packed sequence.
        labelled: number of tokens with a loss, which are the inputs of the head.
        itemsize: bytes per element of the dtype of the matrix products.
        counting: which pairs of tokens count as FLOPs of attention.
        input_grad: whether the input of the first layer has a gradient, as it does if the embedding
            is trained.
        dropout: whether dropout is applied to the outputs of mixers and feed-forwards.
        trains_all: whether the weights themselves are trained, not only adapters.
        keys_grad: whether some keys and values of every layer are trained (prefix tuning).
        prefixes: number of tokens of each sequence that the encoder of an encoder–decoder reads. If
            it is None, every token counts in both stacks, which is more than is computed.
    """

    lengths: tuple[int, ...]
    labelled: int
    itemsize: int = 2
    counting: Counting = "causal"
    input_grad: bool = True
    dropout: bool = False
    trains_all: bool = True
    keys_grad: bool = False
    prefixes: tuple[int, ...] | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens of all sequences."""
        return sum(self.lengths)

    @property
    def pairs(self) -> int:
        """Number of token pairs within each sequence, summed, including masked pairs."""
        return sum(n * n for n in self.lengths)


@dataclass(frozen=True, slots=True)
class Activation:
    """A tensor of the forward pass: its name (unique in a layer), size and need for a gradient."""

    name: str
    nbytes: int
    grad: bool


@dataclass(frozen=True, slots=True)
class Scores:
    """Inputs and sizes of the attention scores, for position modules; `flops` are those of q kᵀ."""

    q: Activation
    k: Activation
    v: Activation
    heads: int
    dim: int
    flops: int


@dataclass(frozen=True, slots=True)
class Gemm:
    """A matrix product (GEMM), with the FLOPs of its forward and backward pass."""

    part: Part
    forward: int
    backward: int


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A tensor that autograd saves for the backward pass."""

    name: str
    nbytes: int


Event = Gemm | SavedTensor


class AdapterCost(Protocol):
    """An adapter as a cost trace sees it (`nn.linear.LinearAdapter` is the full protocol)."""

    def cost(
        self, trace: "CostTrace", linear: LinearShape, x: Activation, rows: int, name: str
    ) -> None:
        """Records the adapter's matrix products and saved tensors, apart from the layer's own."""


class LinearCost(Protocol):
    """A linear layer as a cost trace sees it: `nn.linear.Linear`."""

    in_features: int
    out_features: int

    @property
    def adapter(self) -> AdapterCost | None:
        """The layer's adapter, or None."""


class CostTrace:
    """Records the matrix products and saved tensors of a layer's parts, in order."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.events: list[Event] = []

    def of(self, part: nn.Module, *arguments: object, **options: object) -> Activation:
        """Records the cost of `part` by calling `part.cost(self, ...)`, and returns its output.

        Raises:
            NotImplementedError: the part has no method `cost`.
        """
        cost = getattr(part, "cost", None)
        if cost is None:
            raise NotImplementedError(
                f"{type(part).__name__} has no method cost(trace, ...) next to its forward"
            )
        made = cost(self, *arguments, **options)
        assert isinstance(made, Activation)
        return made

    def made(self, name: str, width: int, *, grad: bool, rows: int | None = None) -> Activation:
        """Returns a new activation [rows, width] in the dtype of the weights.

        Args:
            rows: number of rows; by default one per token.
        """
        rows = self.work.tokens if rows is None else rows
        return Activation(name, rows * width * self.work.itemsize, grad)

    def dropped(self, x: Activation, name: str) -> Activation:
        """Returns `x` after dropout, whose noise autograd saves, as an adapter's input `name`."""
        if x.grad:
            self.keep(f"{name}.noise", x.nbytes)
        return Activation(f"{name}.dropped", x.nbytes, x.grad)

    def keep(self, name: str, nbytes: int) -> None:
        """Records that autograd saves a tensor of `nbytes` bytes."""
        self.events.append(SavedTensor(name, nbytes))

    def keep_all(self, *tensors: Activation) -> None:
        """Records that autograd saves the given activations."""
        for tensor in tensors:
            self.keep(tensor.name, tensor.nbytes)

    def product(self, part: Part, forward: int, backward: int) -> None:
        """Records a matrix product with the FLOPs of its forward and backward pass."""
        self.events.append(Gemm(part, forward, backward))

    def linear(
        self,
        layer: LinearCost,
        name: str,
        x: Activation,
        *,
        part: LinearPart,
        rows: int | None = None,
        copies: int = 1,
        prefix: str = "",
    ) -> Activation:
        """Records `Linear.forward`: the matrix product, then the adapter if there is one.

        Args:
            layer: the linear layer.
            name: the module's name in its parent.
            rows: number of rows of `x`; by default one per token.
            copies: number of equal modules that share the rows (experts).
            prefix: prefix of tensor names, if a layer has several modules of this name.
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
            # a parameter takes no activation memory, but recomputation must run up to here
            self.keep(f"{tensor}.weight", 0)
        self.product(part, flops, flops * (work.trains_all + x.grad))
        if layer.adapter is not None:
            layer.adapter.cost(self, shape, x, rows, tensor)
        grad = x.grad or work.trains_all or layer.adapter is not None
        return self.made(tensor, shape.out_features, grad=grad, rows=rows)

    def cast_bytes(self, elements: int) -> int:
        """Returns the bytes of an fp32 tensor cast to the dtype of the matrix products.

        This is 0 if that dtype is fp32.
        """
        return 0 if self.work.itemsize == FP32 else self.work.itemsize * elements


def saved_bytes(events: Iterable[Event]) -> int:
    """Returns the total bytes of the saved tensors, each counted once."""
    return sum(
        {event.name: event.nbytes for event in events if isinstance(event, SavedTensor)}.values()
    )


def recomputed_gemms(events: list[Event]) -> list[Gemm]:
    """Returns the matrix products that run again when a block is recomputed.

    Recomputation stops as soon as the last saved tensor is available.
    """
    last = max((i for i, event in enumerate(events) if isinstance(event, SavedTensor)), default=-1)
    return [event for event in events[: last + 1] if isinstance(event, Gemm)]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTrace:
    """The events of one layer.

    Attributes:
        before: events before the feed-forward.
        fed: events of the feed-forward, which selective gradient checkpointing recomputes.
        after: events after the feed-forward.
        input: input of the layer.
        feed_forward_input: input of the feed-forward.
    """

    before: list[Event]
    fed: list[Event]
    after: list[Event]
    input: Activation
    feed_forward_input: Activation

    @property
    def events(self) -> list[Event]:
        """All events of the layer, in order."""
        return [*self.before, *self.fed, *self.after]
