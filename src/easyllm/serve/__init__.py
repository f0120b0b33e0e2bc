"""An OpenAI-compatible server and its chat page."""

from easyllm.serve.app import create_app, serve

__all__ = ["create_app", "serve"]
