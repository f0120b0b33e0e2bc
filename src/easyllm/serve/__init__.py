"""OpenAI-compatible HTTP server and chat page.

Exports are imported lazily: the limits, from which the command line makes its flags, do not load
Starlette.
"""

from typing import TYPE_CHECKING

from easyllm.core.lazy import lazy_exports

if TYPE_CHECKING:
    from easyllm.serve.app import create_app
    from easyllm.serve.run import serve

__all__ = ["create_app", "serve"]

__getattr__ = lazy_exports(
    __name__, {"create_app": "easyllm.serve.app", "serve": "easyllm.serve.run"}
)
