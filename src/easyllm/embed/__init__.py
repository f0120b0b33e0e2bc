"""Embeddings of words and texts: skip-gram vectors, sentence encoders, decoders as encoders."""
