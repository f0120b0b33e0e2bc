"""OpenAI-compatible HTTP server and chat page."""

from easyllm.serve.app import create_app, serve

__all__ = ["create_app", "serve"]
