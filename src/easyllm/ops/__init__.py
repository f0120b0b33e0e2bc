"""Pure tensor functions: each has its equation, a PyTorch reference and an explicit dispatch."""
