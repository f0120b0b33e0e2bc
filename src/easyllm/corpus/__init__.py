"""Raw text to token shards: sources, cleaning, deduplication, mixtures."""
