"""Samples and token shards to packed batches, in a seeded order."""
