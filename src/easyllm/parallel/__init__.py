"""Distributed training outside the model: data parallel, ZeRO, FSDP2 and tensor parallel.

`parallelize` changes a decoder in place and returns a `Parallel`, which says which part of each
trainable parameter this rank updates. Nothing here is needed by, or changes, a run of one process.
"""
