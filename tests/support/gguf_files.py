"""Small GGUF files, written by the gguf package."""

import struct
from pathlib import Path

from gguf import GGUFWriter


def write_gguf(path: Path, metadata=(), tensors=()) -> Path:
    """Writes metadata given as (method, key, value) and tensors given as (name, array, type)."""
    writer = GGUFWriter(path, "llama")
    for method, key, value in metadata:
        getattr(writer, f"add_{method}")(key, value)
    for name, array, kind in tensors:
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return u64(len(raw)) + raw
