"""Checkpoints: safetensors folders in the Hugging Face layout, GGUF files, and parameter names."""
