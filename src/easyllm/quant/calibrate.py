"""Calibration: text through the model a layer at a time, with statistics of each linear's inputs.

The hidden states of all sequences are kept between layers, and only one layer runs at a time: a
layer's statistics are those of inputs that come from the layers before it as they are now, so an
already quantized layer passes its errors on.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from easyllm.core.errors import ConfigError
from easyllm.nn.context import ForwardContext
from easyllm.nn.decoder import Decoder, DecoderLayer
from easyllm.nn.linear import Linear
from easyllm.quant.statistics import Statistics

BATCH_TOKENS = 2048
"""Tokens that run through a layer at once."""


class LayerWalk:
    """The hidden states of the calibration sequences in front of one layer after another.

    Args:
        model: the model, without adapters; its embedding is used at once.
        sequences: the token ids of each sequence, [n].

    Attributes:
        hidden: for each batch of sequences, the residual stream [T, D] fp32.
    """

    @torch.no_grad()
    def __init__(self, model: Decoder, sequences: Sequence[Tensor]) -> None:
        if not sequences:
            raise ConfigError("calibration needs text, got none; give a file with some")
        self.contexts, self.hidden = list[ForwardContext](), list[Tensor]()
        for batch in _batches(sequences):
            ids = torch.cat([sequence.to(model.device) for sequence in batch])
            context = ForwardContext.packed([len(s) for s in batch], device=model.device)
            self.contexts.append(context)
            self.hidden.append(model.embed(ids, context))

    @torch.no_grad()
    def statistics(
        self, layer: DecoderLayer, names: Collection[str], *, gram: bool
    ) -> dict[str, Statistics]:
        """Runs all batches through a layer; returns the statistics of its linears' inputs.

        Linears with the same input share one `Statistics`.

        Args:
            layer: the next layer.
            names: the names of linears in the layer.
            gram: whether Σ x xᵀ is wanted.
        """
        linears = {n: m for n, m in layer.named_modules() if isinstance(m, Linear) and n in names}
        with _observed(linears, gram=gram) as found:
            for x, context in zip(self.hidden, self.contexts, strict=True):
                layer(x, context)
        return found

    @torch.no_grad()
    def advance(self, layer: DecoderLayer) -> None:
        """Replaces the hidden states by the layer's outputs."""
        for i, context in enumerate(self.contexts):
            x, added = layer(self.hidden[i], context)
            self.hidden[i] = x if added is None else x + added


def _batches(sequences: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    batch, tokens = list[Tensor](), 0
    for sequence in sequences:
        if batch and tokens + len(sequence) > BATCH_TOKENS:
            yield batch
            batch, tokens = [], 0
        batch.append(sequence)
        tokens += len(sequence)
    yield batch


class _Observer:
    """Adds the inputs of linears to statistics.

    Args:
        gram: whether Σ x xᵀ is wanted.

    Attributes:
        found: the statistics by name; linears that are called with the same input share them.
    """

    def __init__(self, *, gram: bool) -> None:
        self.gram, self.found = gram, dict[str, Statistics]()
        self._last: tuple[Tensor, Statistics] | None = None

    def add(self, name: str, x: Tensor) -> None:
        """Adds the input `x: [..., K]` of a call, unless the last call had the same one."""
        if self._last is not None and x is self._last[0]:
            self.found[name] = self._last[1]
            return
        if name not in self.found:
            self.found[name] = Statistics.empty(x.shape[-1], gram=self.gram, device=x.device)
        self.found[name].add(x)
        self._last = x, self.found[name]


@contextmanager
def _observed(linears: Mapping[str, Linear], *, gram: bool) -> Iterator[dict[str, Statistics]]:
    """Adds the inputs of all calls to statistics; linears without a call have those of no rows."""
    observer = _Observer(gram=gram)
    handles = [
        linear.register_forward_pre_hook(
            lambda _module, inputs, name=name: observer.add(name, inputs[0])
        )
        for name, linear in linears.items()
    ]
    try:
        yield observer.found
    finally:
        for handle in handles:
            handle.remove()
    for name, linear in linears.items():
        if name not in observer.found:
            device = linear.storage.device
            observer.found[name] = Statistics.empty(linear.in_features, gram=gram, device=device)


@torch.no_grad()
def importance_matrix(
    model: Decoder,
    sequences: Sequence[Tensor],
    *,
    done: Callable[[int], object] = lambda _: None,
) -> dict[str, Tensor]:
    """Returns the mean square of each input [K] of every linear in the layers, by full name.

    A linear that no token reached is left out.

    Args:
        model: the model.
        sequences: token ids of the calibration text.
        done: called with the number of each finished layer.
    """
    walk, found = LayerWalk(model, sequences), dict[str, Tensor]()
    for number, layer in enumerate(model.layers):
        assert isinstance(layer, DecoderLayer)
        names = [name for name, module in layer.named_modules() if isinstance(module, Linear)]
        for name, its in walk.statistics(layer, names, gram=False).items():
            if its.rows:
                found[f"layers.{number}.{name}"] = its.square_sum / its.rows
        if number + 1 < len(model.layers):
            walk.advance(layer)
        done(number)
    return found


__all__ = ["LayerWalk", "importance_matrix"]
