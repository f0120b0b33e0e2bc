"""Profiles of devices: the table, near names, files; durations and sizes as words."""

import json

import pytest

from easyllm.core.errors import ConfigError
from easyllm.plan.budget import budget, optimum, parse_count, parse_duration, parse_size
from easyllm.plan.hardware import HARDWARE, find_hardware, parse_gpus, read_profile, with_options


@pytest.mark.parametrize("name", ["A100-80GB", "a100-80gb", "A100 80GB"])
def test_names_are_found_however_they_are_written(name):
    assert find_hardware(name) is HARDWARE["A100-80GB"]


def test_dense_rates_are_in_the_table():
    """Not the sparse rates that data sheets print first."""
    assert HARDWARE["A100-80GB"].flops_per_s == 312e12
    assert HARDWARE["H100-80GB"].flops_per_s == pytest.approx(989.4e12)


def test_a_unique_beginning_is_enough():
    assert find_hardware("H200") is HARDWARE["H200-141GB"]


def test_an_unknown_device_is_refused_with_near_names():
    with pytest.raises(ConfigError, match=r"did you mean A100-40GB, A100-80GB\?.*--profile FILE"):
        find_hardware("A100")
    with pytest.raises(ConfigError, match="known are V100-16GB"):
        find_hardware("abacus")


def test_numbers_of_devices():
    assert parse_gpus("8xH100-80GB") == (8, "H100-80GB")
    assert parse_gpus("H100-80GB") == (1, "H100-80GB")
    assert parse_gpus("4") == (4, None)
    for text in ("0xH100", "", "8x"):
        with pytest.raises(ConfigError):
            parse_gpus(text)


def test_a_profile_is_read_from_a_file(tmp_path):
    path = tmp_path / "own.json"
    values = {"flops_per_s": 1e14, "memory_gb": 16, "read_bytes_per_s": 5e11}
    path.write_text(json.dumps(values | {"name": "own", "price_per_hour": 2}))
    found = read_profile(path)
    assert (found.memory_bytes, found.price_per_hour) == (16 * 2**30, 2.0)
    path.write_text(json.dumps({"flops_per_s": 1e14}))
    with pytest.raises(ConfigError, match="memory_gb"):
        read_profile(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_profile(tmp_path / "none.json")


def test_a_price_is_that_of_all_hours():
    found = with_options(HARDWARE["A100-80GB"], utilisation=0.5, price=2.0)
    run = budget(312e12 * 0.5 * 3600 * 8, 1e9, found, 8)
    assert run.seconds == pytest.approx(3600)
    assert run.price == pytest.approx(16)
    with pytest.raises(ConfigError, match="share of the peak"):
        with_options(found, utilisation=1.5)


def test_compute_optimal_models_use_all_flops():
    found = optimum(5.88e23)  # Chinchilla: 70B parameters, 1.4T tokens
    assert found.parameters == pytest.approx(70e9, rel=0.01)
    assert found.tokens == pytest.approx(1.4e12, rel=0.01)


def test_words_for_counts_durations_and_sizes():
    assert parse_count("300e9", "x") == parse_count("300B", "x") == 3e11
    assert parse_duration("1h30m", "x") == parse_duration("90min", "x") == 5400
    assert parse_size("24GB", "x") == 24 * 10**9
    assert parse_size("24 GiB", "x") == 24 * 2**30
    wrong = ((parse_count, "many"), (parse_duration, "4"), (parse_size, "GB"), (parse_size, "24"))
    for parse, text in wrong:
        with pytest.raises(ConfigError, match="x "):
            parse(text, "x")
