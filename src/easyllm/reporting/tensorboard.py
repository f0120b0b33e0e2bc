"""Writes scalar event files for TensorBoard, without depending on it.

A file is a sequence of TFRecords, each with one `Event` in protobuf's wire format. The field
numbers are those of TensorBoard's event.proto and summary.proto:

record   length uint64 · crc(length) uint32 · event · crc(event) uint32            little-endian
Event    1 wall_time double · 2 step int64 · 3 file_version string · 5 summary · 7 session_log
Summary  1 value, repeated: { 1 tag string · 2 simple_value float }
"""

import math
import struct
import time
from collections.abc import Mapping
from pathlib import Path

from easyllm.core.atomic import output_errors

FILE_VERSION = b"brain.Event:2"
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types
SESSION_START = 1


class TensorBoardWriter:
    """Appends scalars to a new event file in `folder`; every write is flushed.

    Args:
        folder: created if missing; event files of earlier runs in it stay.
        after_step: makes TensorBoard discard the values of later steps in earlier files, which a
            run that resumes from a checkpoint of this step needs. None leaves them alone.

    Raises:
        OutputError: the file cannot be written.

    Example:
        writer = TensorBoardWriter(run / "tensorboard")
        writer.write(1, time.time(), {"train/loss_nats": 2.31})
    """

    def __init__(self, folder: Path, *, after_step: int | None = None) -> None:
        now = time.time_ns()  # readers process the files in the order of their names
        self.path = folder / f"events.out.tfevents.{now}.easyllm"
        with output_errors(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("xb")
        self._append(_event(now / 1e9, 0, _field(3, FILE_VERSION)))
        if after_step is not None:
            start = _field(7, _tag(1, VARINT) + _varint(SESSION_START))
            self._append(_event(now / 1e9, after_step + 1, start))

    def write(self, step: int, wall_time: float, values: Mapping[str, float]) -> None:
        """Appends the values of one step, which are stored as fp32.

        Args:
            step: the step, at least 0.
            wall_time: seconds since the Unix epoch.
            values: the scalars by name; the part before a `/` groups the charts.

        Raises:
            OutputError: the file cannot be written.
        """
        scalars = (
            _field(1, _field(1, name.encode("utf-8")) + _tag(2, FIXED32) + _fp32(value))
            for name, value in values.items()
        )
        self._append(_event(wall_time, step, _field(5, b"".join(scalars))))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _append(self, event: bytes) -> None:
        with output_errors(self.path):
            self._file.write(frame(event))
            self._file.flush()


def frame(record: bytes) -> bytes:
    """Returns `record` framed as a TFRecord."""
    length = struct.pack("<Q", len(record))
    return length + _masked_crc(length) + record + _masked_crc(record)


def crc32c(data: bytes) -> int:
    """Returns the CRC-32C (Castagnoli) of `data`, see RFC 3720, appendix B.4.

    >>> hex(crc32c(b"123456789"))
    '0xe3069283'
    """
    value = 0xFFFFFFFF
    for byte in data:
        value = _TABLE[(value ^ byte) & 0xFF] ^ (value >> 8)
    return value ^ 0xFFFFFFFF


def _table_entry(value: int) -> int:
    for _ in range(8):
        value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)  # the polynomial, bits reversed
    return value


_TABLE = tuple(map(_table_entry, range(256)))


def _masked_crc(data: bytes) -> bytes:
    """Returns TFRecord's masked CRC; a plain CRC of data that contains CRCs is weak."""
    value = crc32c(data)
    rotated = (value >> 15 | value << 17) & 0xFFFFFFFF
    return struct.pack("<I", (rotated + 0xA282EAD8) & 0xFFFFFFFF)


def _event(wall_time: float, step: int, what: bytes) -> bytes:
    return _tag(1, FIXED64) + struct.pack("<d", wall_time) + _tag(2, VARINT) + _varint(step) + what


def _field(number: int, content: bytes) -> bytes:
    return _tag(number, BYTES) + _varint(len(content)) + content


def _tag(number: int, wire_type: int) -> bytes:
    return _varint(number << 3 | wire_type)


def _varint(value: int) -> bytes:
    """Encodes a base-128 varint, low bits first; all bytes but the last have the high bit set."""
    assert value >= 0, "steps, sizes and field numbers are not negative"
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _fp32(value: float) -> bytes:
    try:
        return struct.pack("<f", value)
    except OverflowError:  # beyond fp32
        return struct.pack("<f", math.copysign(math.inf, value))
