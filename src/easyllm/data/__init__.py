"""From files to packed batches: rows, conversations, packing, loading."""
