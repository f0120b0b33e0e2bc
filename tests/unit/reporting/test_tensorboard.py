"""TensorBoard itself reads the event files we write."""

import math
import struct
import warnings

import pytest

from easyllm.core.errors import OutputError
from easyllm.reporting.tensorboard import TensorBoardWriter, crc32c, frame

VALUES = {"train/loss_nats": 2.3125, "train/grad_norm": 0.1, "评测/困惑度": 12.5}


def read(folder):
    """Returns the scalars in a folder of event files: name → [(step, wall time, value)]."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TensorBoard's own, about its dependencies
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        accumulator.Reload()
        names = accumulator.Tags()["scalars"]
        return {n: [(e.step, e.wall_time, e.value) for e in accumulator.Scalars(n)] for n in names}


def fp32(value):
    return struct.unpack("<f", struct.pack("<f", value))[0]


def test_names_steps_times_and_values_read_back_equal(tmp_path):
    writer = TensorBoardWriter(tmp_path)
    for step in (0, 1, 127, 128, 300, 2**40):  # varints of one and of several bytes
        writer.write(step, 1.7e9 + step / 8, VALUES)
    writer.close()
    expected = [(s, 1.7e9 + s / 8) for s in (0, 1, 127, 128, 300, 2**40)]
    assert read(tmp_path) == {
        name: [(*place, fp32(value)) for place in expected] for name, value in VALUES.items()
    }


def test_values_can_be_seen_before_the_file_is_closed(tmp_path):
    writer = TensorBoardWriter(tmp_path)
    writer.write(5, 1.0, {"a": 1.5})
    assert read(tmp_path) == {"a": [(5, 1.0, 1.5)]}
    writer.close()


def test_values_not_representable_in_fp32_are_written_as_nan_or_infinity(tmp_path):
    writer = TensorBoardWriter(tmp_path)
    writer.write(1, 1.0, {"nan": math.nan, "up": math.inf, "large": 1e300, "negative": -1e300})
    writer.close()
    found = {name: points[0][2] for name, points in read(tmp_path).items()}
    assert math.isnan(found.pop("nan"))
    assert found == {"up": math.inf, "large": math.inf, "negative": -math.inf}


def test_a_resumed_run_replaces_the_steps_after_its_checkpoint(tmp_path):
    first = TensorBoardWriter(tmp_path)
    for step in range(1, 8):
        first.write(step, float(step), {"a": float(step)})
    first.close()
    second = TensorBoardWriter(tmp_path, after_step=4)
    for step in (5, 6):
        second.write(step, 100.0 + step, {"a": 10.0 * step})
    second.close()
    steps = [(step, value) for step, _, value in read(tmp_path)["a"]]
    assert steps == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 50.0), (6, 60.0)]


def test_the_checksum_is_the_castagnoli_crc():
    assert crc32c(b"") == 0
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, appendix B.4
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E


def test_a_record_has_the_framing_that_tensorboard_expects():
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    for record in (b"", b"x", bytes(range(256)) * 3):
        framed = frame(record)
        assert struct.unpack("<QI", framed[:12]) == (len(record), masked_crc32c(framed[:8]))
        assert framed[12:-4] == record
        assert struct.unpack("<I", framed[-4:])[0] == masked_crc32c(record)


def test_a_folder_that_cannot_be_created_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        TensorBoardWriter(tmp_path / "file" / "events")
