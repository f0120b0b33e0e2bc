"""What is kept about this machine, and how it corrects a plan."""

import sys

import pytest

from easyllm.pipeline.calibrate_plan import compare
from easyllm.plan.calibration import Calibration, keep_calibration, read_calibration
from easyllm.plan.process import COMPILER_BYTES, process_bytes


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EASYLLM_CACHE", str(tmp_path))


def test_measurements_are_kept_together_until_they_are_replaced():
    assert read_calibration() == Calibration()
    keep_calibration(read_bytes_per_s=1e10)
    keep_calibration(step_factor=1.5)
    found = read_calibration()
    assert (found.read_bytes_per_s, found.step_factor) == (1e10, 1.5)
    assert found.measured


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"machine": "another", "step_factor": 2}'])
def test_a_damaged_record_and_that_of_another_machine_are_not_used(tmp_path, text):
    (tmp_path / "planner.json").write_text(text)
    assert read_calibration() == Calibration()


def test_steps_correct_the_buffers_and_the_utilisation():
    """The first of three steps, which also warms up, is left out of their time: 19.5 s."""
    results = {
        "predicted_bytes": {"process": 300, "weights": 100, "optimizer": 200},
        "measured_bytes": {"weights": 100, "optimizer": 200},
        "uncorrected_peak_bytes": 1000,
        "peak_rss_bytes": 1200,
        "predicted_seconds": 10.0,
        "predicted_utilisation": 0.4,
    }
    found = compare(results, [30.0, 6.0, 7.0])
    assert found.kept.step_factor == pytest.approx(600 / 400)
    assert found.kept.utilisation == pytest.approx(0.4 * 10 / 19.5)
    errors = {each.name: each.error for each in found.memory}
    assert errors["weights"] == 0
    assert errors["whole process"] == pytest.approx(1000 / 1200 - 1)
    assert read_calibration() == found.kept


def test_a_peak_while_weights_are_read_says_nothing_of_a_step():
    results = {
        "predicted_bytes": {"process": 300, "weights": 100, "optimizer": 200, "peak": "load"},
        "measured_bytes": {"weights": 100, "optimizer": 200},
        "uncorrected_peak_bytes": 1000,
        "peak_rss_bytes": 1200,
        "predicted_seconds": 10.0,
        "predicted_utilisation": 0.4,
    }
    keep_calibration(step_factor=1.25)
    kept = compare(results, [30.0, 6.0, 7.0]).kept
    assert kept.step_factor == 1.25
    assert kept.utilisation == pytest.approx(0.4 * 10 / 19.5)


def test_the_process_is_measured():
    assert 50 * 2**20 < process_bytes() < 8 * 2**30


def test_the_compiler_is_counted_where_activations_are_recomputed(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    more = process_bytes(recomputes=True) - process_bytes()
    assert more == pytest.approx(COMPILER_BYTES, abs=20 * 2**20)
    monkeypatch.setitem(sys.modules, "torch._dynamo", object())
    assert process_bytes(recomputes=True) - process_bytes() < 20 * 2**20
