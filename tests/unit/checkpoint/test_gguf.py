"""GGUF files: all block formats and kinds of metadata, and damaged files."""

import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from easyllm.checkpoint.gguf import MAX_ARRAY_DEPTH, GGUFFile
from easyllm.checkpoint.gguf_types import GGUF_TYPES
from easyllm.core.errors import CheckpointError
from gguf_files import text, u64, write_gguf

QUANTIZED_BY_THE_PACKAGE = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]


SCALES = {  # byte offsets of a block's fp16 scales
    "Q2_K": (80, 84),
    "Q3_K": (108, 110),
    "Q4_K": (0, 4),
    "Q5_K": (0, 4),
    "Q6_K": (208, 210),
}


STRING, ARRAY, U8, U32, I32, F32 = 8, 9, 0, 4, 5, 6


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def record(name: str, dims=(4,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + u32(len(dims)) + b"".join(map(u64, dims)) + u32(kind) + u64(offset)


def raw_gguf(pairs=(), records=(), *, magic=b"GGUF", version=3, counts=None, data=bytes(64)):
    num_tensors, num_pairs = counts or (len(records), len(pairs))
    head = magic + u32(version) + u64(num_tensors) + u64(num_pairs)
    head += b"".join(pairs) + b"".join(records)
    return head + bytes(-len(head) % 32) + data


def complaint(tmp_path: Path, content: bytes) -> str:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as caught:
            GGUFFile(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10 * 2**20
    assert "hostile.gguf" in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def random_blocks(kind: Kind, rows: int, width: int) -> np.ndarray:
    """Returns random bytes of a block format with fp16 scales of ordinary size."""
    rng = np.random.default_rng(7)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (rows * width // block, size), dtype=np.uint8)
    start, end = SCALES[kind.name]
    scales = rng.normal(size=(len(raw), (end - start) // 2)).astype(np.float16)
    raw[:, start:end] = scales.view(np.uint8)
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("name", [*QUANTIZED_BY_THE_PACKAGE, *SCALES])
def test_a_tensor_equals_the_reference_dequantization(tmp_path, name):
    kind = Kind[name]
    rows, width = 6, 512
    values = np.random.default_rng(3).normal(size=(rows, width)).astype(np.float32)
    raw = random_blocks(kind, rows, width) if name in SCALES else gguf.quantize(values, kind)
    before = np.ones(5, np.float32)
    file = GGUFFile(
        write_gguf(
            tmp_path / "x.gguf",
            tensors=[("before", before, None), ("w", raw, kind), ("after", before, None)],
        )
    )
    expected = gguf.dequantize(raw, kind).reshape(rows, width)
    loaded = file.load("w")
    assert loaded.dtype == torch.float32
    assert loaded.shape == (rows, width)
    assert np.isfinite(expected).all()
    assert np.array_equal(loaded.numpy(), expected)
    assert torch.equal(file.load("after"), torch.ones(5))
    assert file.tensors["w"].type_name == name


@pytest.mark.parametrize("name", ["F32", "Q8_0", "Q4_1", "Q6_K"])
def test_a_slice_equals_the_part_of_the_complete_tensor(tmp_path, name):
    kind = Kind[name]
    values = np.random.default_rng(3).normal(size=(6, 512)).astype(np.float32)
    raw = random_blocks(kind, 6, 512) if name in SCALES else gguf.quantize(values, kind)
    stack = raw.reshape(3, 2, -1)
    file = GGUFFile(write_gguf(tmp_path / "x.gguf", tensors=[("w", stack, kind)]))
    whole = file.load("w")
    assert whole.shape == (3, 2, 512)
    for part in range(3):
        assert torch.equal(file.load("w", part=part), whole[part])


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1", "BF16", "F16"])
def test_dequantized_values_are_close_to_the_original_values(tmp_path, name):
    values = np.random.default_rng(3).uniform(-1, 1, (4, 64)).astype(np.float32)
    raw = gguf.quantize(values, Kind[name])
    file = GGUFFile(write_gguf(tmp_path / "x.gguf", tensors=[("w", raw, Kind[name])]))
    assert np.abs(file.load("w").numpy() - values).max() < 0.15


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1"])
def test_non_finite_scales_match_the_reference(tmp_path, name):
    kind = Kind[name]
    raw = gguf.quantize(np.ones((1, 64), np.float32), kind)
    raw[0, :2] = np.array([np.inf], np.float16).view(np.uint8)
    file = GGUFFile(write_gguf(tmp_path / "x.gguf", tensors=[("w", raw, kind)]))
    with np.errstate(invalid="ignore"):
        expected = gguf.dequantize(raw, kind)
    assert np.array_equal(file.load("w").numpy(), expected, equal_nan=True)


def test_doubles_are_read(tmp_path):
    values = np.arange(6, dtype=np.float64).reshape(2, 3) / 7
    file = GGUFFile(write_gguf(tmp_path / "x.gguf", tensors=[("w", values, None)]))
    assert np.array_equal(file.load("w").numpy(), values.astype(np.float32))


def test_dimensions_are_in_row_major_order(tmp_path):
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    file = GGUFFile(write_gguf(tmp_path / "x.gguf", tensors=[("w", values, None)]))
    assert file.tensors["w"].shape == (2, 3, 4)
    assert np.array_equal(file.load("w").numpy(), values)


def test_a_tensor_is_read_in_the_requested_dtype(tmp_path):
    values = np.linspace(-1, 1, 64, dtype=np.float32)
    file = GGUFFile(write_gguf(tmp_path / "x.gguf", tensors=[("w", values, None)]))
    found = file.load("w", torch.bfloat16)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, torch.from_numpy(values).bfloat16())


def test_writing_to_a_loaded_tensor_does_not_change_the_file(tmp_path):
    path = write_gguf(tmp_path / "x.gguf", tensors=[("w", np.ones(8, np.float32), None)])
    GGUFFile(path).load("w").zero_()
    assert torch.equal(GGUFFile(path).load("w"), torch.ones(8))


def test_every_kind_of_scalar_is_read(tmp_path):
    values = {
        "uint8": 255,
        "int8": -128,
        "uint16": 65535,
        "int16": -32768,
        "uint32": 2**32 - 1,
        "int32": -(2**31),
        "uint64": 2**64 - 1,
        "int64": -(2**63),
        "float32": 0.5,
        "float64": 0.1,
        "bool": True,
        "string": "a 你好\n",
    }
    metadata = [(method, f"x.{method}", value) for method, value in values.items()]
    found = GGUFFile(write_gguf(tmp_path / "x.gguf", metadata)).metadata
    assert found.pop("general.architecture") == "llama"
    assert found == {f"x.{method}": value for method, value in values.items()}
    assert {key: type(value) for key, value in found.items()} == {
        f"x.{method}": type(value) for method, value in values.items()
    }


def test_arrays_and_arrays_of_arrays_are_read(tmp_path):
    values = {
        "numbers": [1, -2, 3],
        "floats": [0.5, 1.5],
        "flags": [True, False],
        "words": ["a", "", "你好"],
        "bytes": [0, 255],
        "nested": [[1, 2], [3]],
        "nested words": [["a"], ["b", "c"]],
        "deep": [[[1], [2, 3]], [[4]]],
    }
    metadata = [
        ("array", key, bytes(value) if key == "bytes" else value) for key, value in values.items()
    ]
    found = GGUFFile(write_gguf(tmp_path / "x.gguf", metadata)).metadata
    assert {key: found[key] for key in values} == values


def test_empty_strings_and_arrays_are_read(tmp_path):
    pairs = [
        text("s") + u32(STRING) + text(""),
        text("a") + u32(ARRAY) + u32(I32) + u64(0),
        text("t") + u32(ARRAY) + u32(STRING) + u64(0),
        text("n") + u32(ARRAY) + u32(ARRAY) + u64(0),
    ]
    (tmp_path / "x.gguf").write_bytes(raw_gguf(pairs))
    assert GGUFFile(tmp_path / "x.gguf").metadata == {"s": "", "a": [], "t": [], "n": []}


@pytest.mark.parametrize("alignment", [8, 64, 512])
def test_the_files_own_alignment_is_used(tmp_path, alignment):
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_custom_alignment(alignment)
    writer.add_tensor("a", np.arange(3, dtype=np.float32))
    writer.add_tensor("b", np.arange(5, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "x.gguf")
    assert file.load("b").tolist() == [0, 1, 2, 3, 4]
    assert all(place.offset % alignment == 0 for place in file.tensors.values())


def test_version_2_is_read(tmp_path):
    (tmp_path / "x.gguf").write_bytes(raw_gguf(records=[record("w")], version=2))
    assert GGUFFile(tmp_path / "x.gguf").load("w").tolist() == [0, 0, 0, 0]


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nothing\.gguf' does not exist"):
        GGUFFile(tmp_path / "nothing.gguf")
    with pytest.raises(CheckpointError, match="cannot read GGUF file"):
        GGUFFile(tmp_path)


def test_an_empty_file_is_named(tmp_path):
    assert "is empty; download or convert it again" in complaint(tmp_path, b"")


def test_a_wrong_magic_number_is_refused(tmp_path):
    assert "is not a GGUF file (it starts with b'PK" in complaint(tmp_path, b"PK\3\4" + bytes(64))


@pytest.mark.parametrize("version", [0, 1, 4, 77])
def test_an_unknown_version_is_refused(tmp_path, version):
    message = complaint(tmp_path, raw_gguf(version=version))
    assert f"version {version}, expected 2 or 3" in message


@pytest.mark.parametrize("version", [2 << 24, 3 << 24])
def test_a_big_endian_file_is_named_as_such(tmp_path, version):
    message = complaint(tmp_path, raw_gguf(version=version))
    assert "big-endian" in message
    assert "gguf-convert-endian" in message


@pytest.mark.parametrize("count", [2**20, 2**40, 2**64 - 1])
def test_counts_beyond_the_file_are_refused_before_allocating(tmp_path, count):
    assert "key-value pairs do not fit" in complaint(tmp_path, raw_gguf(counts=(0, count)))
    assert "tensors do not fit" in complaint(tmp_path, raw_gguf(counts=(count, 0)))
    for kind in (U8, F32, STRING, ARRAY):
        pair = text("k") + u32(ARRAY) + u32(kind) + u64(count)
        assert "array items do not fit" in complaint(tmp_path, raw_gguf([pair]))
    assert "a string of" in complaint(tmp_path, raw_gguf([text("k") + u32(STRING) + u64(count)]))
    assert "a string of" in complaint(tmp_path, raw_gguf([u64(count) + bytes(20)]))


@pytest.mark.parametrize("dims", [(2**20,), (2**62, 4), (2**64 - 1,) * 4])
def test_a_tensor_beyond_the_file_is_refused(tmp_path, dims):
    assert "tensor 'w' ends at byte" in complaint(tmp_path, raw_gguf(records=[record("w", dims)]))


@pytest.mark.parametrize("offset", [64, 2**40, 2**64 - 1])
def test_an_offset_beyond_the_file_is_refused(tmp_path, offset):
    assert "truncated" in complaint(tmp_path, raw_gguf(records=[record("w", offset=offset)]))


def test_arrays_nested_too_deeply_are_refused(tmp_path):
    def nested(depth: int) -> bytes:
        layers = (u32(ARRAY) + u64(1)) * (depth - 1)
        return text("k") + u32(ARRAY) + layers + u32(U8) + u64(1) + b"\7"

    (tmp_path / "x.gguf").write_bytes(raw_gguf([nested(MAX_ARRAY_DEPTH)]))
    assert GGUFFile(tmp_path / "x.gguf").metadata == {"k": [[[[7]]]]}
    for depth in (MAX_ARRAY_DEPTH + 1, 5000):
        assert "nested too deeply" in complaint(tmp_path, raw_gguf([nested(depth)]))


def test_duplicates_are_refused(tmp_path):
    records = [record("w"), record("w", offset=32)]
    assert "tensor 'w' occurs twice" in complaint(tmp_path, raw_gguf(records=records))
    pair = text("k") + u32(U32) + u32(1)
    assert "key 'k' occurs twice" in complaint(tmp_path, raw_gguf([pair, pair]))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (raw_gguf([text("k") + u32(99) + bytes(8)]), "value type 99 is unknown"),
        (raw_gguf(records=[record("w", kind=999)]), "unknown type 999"),
        (raw_gguf(records=[record("w", (1,) * 5)]), "5 dims, expected at most 4"),
        (raw_gguf(records=[record("w", (33,), kind=int(Kind.Q8_0))]), "not a multiple of 32"),
        (raw_gguf(records=[record("w", (0,), kind=int(Kind.Q8_0))]), "empty shape"),
        (raw_gguf(records=[record("w", (0, 2**63))]), "empty shape"),
        (raw_gguf([text(b"\xff\xfe") + u32(U8) + b"\1"]), "utf-8"),
        (raw_gguf([text("general.alignment") + u32(U32) + u32(0)]), "alignment 0"),
        (raw_gguf([text("general.alignment") + u32(U32) + u32(24)]), "alignment 24"),
        (raw_gguf([text("general.alignment") + u32(STRING) + text("x")]), "alignment 'x'"),
    ],
)
def test_invalid_content_is_named(tmp_path, content, words):
    assert words in complaint(tmp_path, content)


def test_an_unsupported_type_is_named_when_it_is_requested(tmp_path):
    path = write_gguf(
        tmp_path / "x.gguf",
        tensors=[("whole", np.arange(4, dtype=np.int32), None), ("w", np.ones(4, "f4"), None)],
    )
    file = GGUFFile(path)
    assert torch.equal(file.load("w"), torch.ones(4))
    with pytest.raises(CheckpointError, match=r"x\.gguf: tensor 'whole' has the type I32"):
        file.load("whole")


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Path, bytes]:
    """A folder to write to, and the bytes of a small valid file."""
    folder = tmp_path_factory.mktemp("gguf")
    values = np.random.default_rng(0).normal(size=(2, 256)).astype(np.float32)
    metadata = [
        ("uint8", "u8", 3),
        ("float32", "f32", 0.5),
        ("bool", "flag", True),
        ("string", "name", "héllo"),
        ("array", "numbers", [1, 2, 3]),
        ("array", "words", ["a", "bc"]),
        ("array", "nested", [[1, 2], [3]]),
    ]
    tensors = [("f", values[0, :7], None)]
    tensors += [
        (name, gguf.quantize(values, Kind[name]), Kind[name]) for name in ("BF16", "Q8_0", "Q4_1")
    ]
    tensors.append(("Q6_K", random_blocks(Kind.Q6_K, 2, 256), Kind.Q6_K))
    return folder, write_gguf(folder / "valid.gguf", metadata, tensors).read_bytes()


def open_whole(folder: Path, content: bytes) -> bool:
    """Returns whether the bytes can be read completely; otherwise the error must name the file."""
    path = folder / "damaged.gguf"
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    try:
        file = GGUFFile(path)
        with np.errstate(all="ignore"):
            for name, place in file.tensors.items():
                assert file.load(name).shape == place.shape
    except CheckpointError as error:
        unsupported_reason = str(error)
    else:
        return True
    assert "damaged.gguf" in unsupported_reason
    return False


def test_a_file_truncated_anywhere_is_refused(small):
    folder, content = small
    ends = max(p.offset + p.num_bytes for p in GGUFFile(folder / "valid.gguf").tensors.values())
    assert open_whole(folder, content[:ends])
    header = min(p.offset for p in GGUFFile(folder / "valid.gguf").tensors.values())
    for length in [*range(0, header, 3), header, ends - 1]:
        assert not open_whole(folder, content[:length])


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused(small, data):
    folder, content = small
    header = min(p.offset for p in GGUFFile(folder / "valid.gguf").tensors.values())
    damaged = bytearray(content)
    place = st.integers(0, header - 1)
    for at in data.draw(st.lists(place, max_size=4)):
        damaged[at] = data.draw(st.one_of(st.integers(0, 40), st.integers(0, 255)))
    for at in data.draw(st.lists(place, max_size=2)):
        number = data.draw(st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]))
        damaged[at : at + 8] = u64(number)
    if data.draw(st.booleans()):
        damaged = damaged[: data.draw(st.integers(0, len(damaged)))]
    tracemalloc.start()
    try:
        open_whole(folder, bytes(damaged))
        assert tracemalloc.get_traced_memory()[1] < 32 * 2**20
    finally:
        tracemalloc.stop()


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=200))
def test_random_bytes_after_the_magic_number_are_read_or_refused(small, content):
    open_whole(small[0], b"GGUF" + u32(3) + content)


def test_the_table_of_types_is_that_of_the_package():
    theirs = {
        kind.value: (kind.name, *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGML_QUANT_SIZES
    }
    assert {
        number: (type.name, type.weights, type.num_bytes) for number, type in GGUF_TYPES.items()
    } == theirs


def test_opening_a_file_does_not_import_the_package(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(raw_gguf(records=[record("a")]))
    code = (
        "import sys; from pathlib import Path; from easyllm.checkpoint.gguf import GGUFFile\n"
        "assert GGUFFile(Path(sys.argv[1])).load('a').tolist() == [0, 0, 0, 0]\n"
        "assert 'gguf' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)
