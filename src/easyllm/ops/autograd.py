"""The context argument of `torch.autograd.Function`."""

from typing import Any, TypeAlias

Context: TypeAlias = Any
"""`ctx` of forward and backward: torch sets attributes on it that no type declares."""

__all__ = ["Context"]
