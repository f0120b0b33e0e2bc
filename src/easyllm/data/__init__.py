"""Data pipeline from files to packed batches: rows, conversations, sequence packing, loading."""
