"""Data files of every format as rows, each with its location."""
