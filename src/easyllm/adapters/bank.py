"""Several named adapters on one linear, selected per sequence (`ForwardContext.adapters`)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from easyllm.adapters.adapter import Adapter
from easyllm.core.errors import ConfigError
from easyllm.nn.linear import BaseLinear, KnownProduct
from easyllm.ops.low_rank import add_low_rank_updates, supports_low_rank


class AdapterBank(Adapter):
    """The named adapters of one linear.

    Rows are grouped by adapter. Rows without an adapter, and rows whose adapter does not target
    this linear, get the base layer's output.
    """

    selected_by_row = True

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []  # adapter names may be any text, unlike module names
        self.held = nn.ModuleList()

    def add(self, name: str, adapter: Adapter) -> None:
        """Adds an adapter under a name."""
        self.names.append(name)
        self.held.append(adapter)

    def remove(self, name: str) -> None:
        """Removes the adapter with this name."""
        place = self.names.index(name)
        del self.names[place], self.held[place]

    @property
    def batch_invariant(self) -> bool:  # type: ignore[override]
        """Whether all adapters of the bank are batch-invariant."""
        return all(bool(adapter.batch_invariant) for adapter in self.held)

    @property
    def passes_input_unchanged(self) -> bool:  # type: ignore[override]
        """Whether all adapters of the bank call `base` once, with their input itself."""
        return all(bool(adapter.passes_input_unchanged) for adapter in self.held)

    def forward(self, x: Tensor, base: BaseLinear) -> Tensor:
        """Returns the output [T, out] for `x: [T, in]`, each row with its own adapter.

        Adapters that pass their input on share one product of the base for all rows.

        Raises:
            ConfigError: the forward context does not select an adapter per sequence.
        """
        rows_of = None if base.context is None else base.context.adapters
        if rows_of is None:
            raise self._unnamed()
        groups = [(self._named(name), rows) for name, rows in rows_of.groups]
        if len(groups) == 1:
            adapter = groups[0][0]
            return base(x) if adapter is None else adapter(x, base)
        if all(adapter is None or adapter.passes_input_unchanged for adapter, _ in groups):
            changed = [(adapter, rows) for adapter, rows in groups if adapter is not None]
            return _added(x, base(x), changed, base)
        out = x.new_empty(len(x), base.layer.out_features)
        for adapter, rows in groups:
            part = _rows(x, rows)
            out = _with_rows(out, rows, base(part) if adapter is None else adapter(part, base))
        return out

    def loss_factors(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Not supported by a bank, whose rows have different weights.

        Raises:
            ConfigError: always.
        """
        raise self._unnamed()

    def _unnamed(self) -> ConfigError:
        return ConfigError(
            f"the model has named adapters ({', '.join(self.names)}); select one for each sequence"
        )

    def _named(self, name: str) -> Adapter | None:
        """The adapter with this name; None if it does not change the layer."""
        for known, adapter in zip(self.names, self.held, strict=True):
            if known == name:
                return adapter  # type: ignore[return-value]
        return None


def _added(
    x: Tensor,
    out: Tensor,
    groups: Sequence[tuple[Adapter, Tensor | None]],
    base: BaseLinear,
) -> Tensor:
    """Returns the base's output `out` for `x`, changed by the adapter of each group of rows."""
    updates = [adapter.low_rank() for adapter, _ in groups]
    known = [update for update in updates if update is not None]
    if groups and len(known) == len(groups) and supports_low_rank(x, out):
        indices = [rows for _, rows in groups if rows is not None]
        starts = torch.tensor([0, *map(len, indices)]).cumsum(0)
        add_low_rank_updates(x, out, known, starts, torch.cat(indices))
        return out
    for adapter, rows in groups:
        part, y = _rows(x, rows), _rows(out, rows)
        product = KnownProduct(base.layer, base.context, base.widened, x=part, y=y)
        out = _with_rows(out, rows, adapter(part, product))
    return out


def _rows(x: Tensor, rows: Tensor | None) -> Tensor:
    assert rows is not None, "several adapters share the rows"
    return x.index_select(0, rows)


def _with_rows(out: Tensor, rows: Tensor | None, y: Tensor) -> Tensor:
    """Returns `out` with other values of some rows, in place if no gradient is needed."""
    assert rows is not None, "several adapters share the rows"
    if torch.is_grad_enabled():
        return out.index_copy(0, rows, y)
    return out.index_copy_(0, rows, y)


__all__ = ["AdapterBank"]
