"""Several named adapters on one linear, selected per sequence (`ForwardContext.adapters`)."""

import torch
from torch import Tensor, nn

from easyllm.adapters.adapter import Adapter
from easyllm.core.errors import ConfigError
from easyllm.nn.linear import BaseLinear


class AdapterBank(Adapter):
    """The named adapters of one linear.

    Rows are grouped by adapter. Rows without an adapter, and rows whose adapter does not target
    this linear, get the base layer's output.
    """

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

    def forward(self, x: Tensor, base: BaseLinear) -> Tensor:
        """Returns the output [T, out] for `x: [T, in]`, each row with its own adapter.

        Raises:
            ConfigError: the forward context does not select an adapter per sequence.
        """
        rows_of = None if base.context is None else base.context.adapters
        if rows_of is None:
            raise self._unnamed()
        parts = rows_of.rows()
        if len(parts) == 1:
            return self._part(parts[0][0], x, base)
        out: Tensor | None = None
        for name, rows in parts:
            assert rows is not None, "several adapters share the rows"
            y = self._part(name, x.index_select(0, rows), base)
            out = y.new_empty(len(x), y.shape[1]) if out is None else out
            out = (
                out.index_copy(0, rows, y)
                if torch.is_grad_enabled()
                else out.index_copy_(0, rows, y)
            )
        assert out is not None, "there are rows"
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

    def _part(self, name: str, x: Tensor, base: BaseLinear) -> Tensor:
        if name not in self.names:
            return base(x)
        y: Tensor = self.held[self.names.index(name)](x, base)
        return y


__all__ = ["AdapterBank"]
