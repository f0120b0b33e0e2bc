"""Pure tensor functions: each public one has its equation, a plain PyTorch reference and a visible dispatch."""
