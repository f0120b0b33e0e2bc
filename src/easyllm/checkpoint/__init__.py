"""Weights on disk: safetensors folders in the Hugging Face layout, GGUF files, names in both directions."""
