"""Retrieval: documents to chunks, an index of vectors and terms, fusion, answers with citations."""
