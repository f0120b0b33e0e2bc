"""Several adapters in one linear's slot: each row goes through the one its sequence names (`ForwardContext.adapters`)."""

import torch
from torch import Tensor, nn

from easyllm.adapters.adapter import Adapter
from easyllm.core.errors import ConfigError
from easyllm.nn.linear import BaseProduct


class AdapterBank(Adapter):
    """Adapters of one linear by name.

    Rows are sorted by adapter; those of the base, and of adapters that do not hold this linear, get the base's product.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []  # any text, which names of modules are not
        self.held = nn.ModuleList()

    def add(self, name: str, adapter: Adapter) -> None:
        """Holds one more adapter."""
        self.names.append(name)
        self.held.append(adapter)

    def remove(self, name: str) -> None:
        """Lets an adapter go."""
        place = self.names.index(name)
        del self.names[place], self.held[place]

    @property
    def batch_invariant(self) -> bool:  # type: ignore[override]
        return all(bool(adapter.batch_invariant) for adapter in self.held)

    def forward(self, x: Tensor, base: BaseProduct) -> Tensor:
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

    def loss_product(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        raise self._unnamed()

    def _unnamed(self) -> ConfigError:
        return ConfigError(
            f"the model holds the adapters {', '.join(self.names)} by name; say which one each sequence uses"
        )

    def _part(self, name: str, x: Tensor, base: BaseProduct) -> Tensor:
        if name not in self.names:
            return base(x)
        y: Tensor = self.held[self.names.index(name)](x, base)
        return y


__all__ = ["AdapterBank"]
