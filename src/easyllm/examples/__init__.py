"""Rows to samples: conversations, preferences, labels; chat template and loss mask."""
