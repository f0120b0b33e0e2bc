"""Hooks on modules."""

from torch import nn


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody expects to be told when the module is called: then what it computes is not to be fused with others."""
    forward = module._forward_hooks or module._forward_pre_hooks
    return bool(forward or module._backward_hooks or module._backward_pre_hooks)
