"""Detection of hooks on modules."""

from torch import nn


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks, so that its computation must not be fused with others."""
    forward = module._forward_hooks or module._forward_pre_hooks
    return bool(forward or module._backward_hooks or module._backward_pre_hooks)
