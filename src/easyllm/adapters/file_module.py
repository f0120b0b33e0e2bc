"""An adapted linear in an adapter file, before its method reads it."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from easyllm.core.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class FileModule:
    """An adapted linear as stored in a file.

    Attributes:
        name: its name in the file, without peft's prefix (`model.layers.0.self_attn.q_proj`).
        tensors: its tensors, keyed by the suffix after that name.
    """

    name: str
    tensors: Mapping[str, Tensor]

    def unexpected(self, expected: str) -> CheckpointError:
        """Returns the error for tensors other than the expected ones."""
        return CheckpointError(
            f"{self.name} has {', '.join(sorted(self.tensors))} in the adapter's file, "
            f"expected {expected}; copy the adapter again"
        )


__all__ = ["FileModule"]
