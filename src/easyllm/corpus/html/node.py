"""The element type of the HTML parser."""

from typing import Any, TypeAlias

Node: TypeAlias = Any
"""A `DOMNode` of resiliparse, which comes without types."""

__all__ = ["Node"]
