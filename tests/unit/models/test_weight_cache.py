"""The weight cache: the same weights as without it, never stale ones, and never an error."""

import errno
import os
import shutil
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from easyllm.adapters import save_adapter
from easyllm.core.errors import ConfigError
from easyllm.models import (
    ContextConfig,
    hf_module_name,
    load,
    load_model,
    open_source,
    save_model,
    weight_cache,
)
from easyllm.models.weight_cache import WEIGHTS_FILE, weights_folder
from easyllm.ops.kernels import kernels_for
from easyllm.pipeline.relayout import to_gguf
from easyllm.quant import FORMATS, schemes
from tiny_models import build_tiny
from trained_adapters import METHODS, attached

IDS = [5, 9, 300, 17, 2, 2, 41]
HOLDER = """
import sys, time
from pathlib import Path
from easyllm.core.folder_lock import locked_folder
with locked_folder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache that also stores small models, and ones that were written just now."""
    kernels_for(torch.zeros(1))  # found or built in the usual cache folder
    monkeypatch.setenv("EASYLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("EASYLLM_WEIGHT_CACHE_GB", "1")
    monkeypatch.setattr(weight_cache, "MIN_BYTES", 0)
    monkeypatch.setattr(weight_cache, "SETTLED_S", 0)
    return tmp_path / "cache" / "weights"


@pytest.fixture
def folder(tmp_path):
    return save_model(build_tiny(), tmp_path / "model")


def entries():
    return sorted(weights_folder().glob(f"*/{WEIGHTS_FILE}")) if weights_folder().exists() else []


def quantized(source, **options):
    return load_model(source, **{"dtype": "float32", "quantize": "int4", **options})


def assert_equal(model, other):
    here, there = model.state_dict(), other.state_dict()
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)
    assert all(here[name].dtype == there[name].dtype for name in here)
    assert model.dtype == other.dtype
    assert torch.equal(model.logits(IDS), other.logits(IDS))


@pytest.fixture
def quantizing_fails(monkeypatch):
    """Lets a test fail if it quantizes a weight."""

    def fail(*_):
        raise AssertionError("a weight was quantized")

    def turn_on():
        monkeypatch.setattr(load, "quantize_weight", fail)

    return turn_on


@pytest.mark.parametrize(
    ("scheme", "dtype", "tied"),
    [
        *((scheme, None, True) for scheme in schemes()),
        *(("int4", dtype, tied) for dtype in ("float32", "bfloat16") for tied in (True, False)),
        ("nf4", "bfloat16", False),
    ],
)
def test_cached_weights_are_equal_and_not_quantized_again(
    tmp_path, quantizing_fails, scheme, dtype, tied
):
    model = build_tiny(tie_word_embeddings=tied, attention_bias=True)
    folder = save_model(model, tmp_path / "model")
    without = quantized(folder, dtype=dtype, quantize=scheme, weight_cache=False)
    assert entries() == []
    first = quantized(folder, dtype=dtype, quantize=scheme)
    assert len(entries()) == 1
    quantizing_fails()
    second = quantized(folder, dtype=dtype, quantize=scheme)
    assert_equal(first, without)
    assert_equal(second, without)
    assert not second.training
    assert not any(parameter.requires_grad for parameter in second.parameters())
    assert second.packed_formats() == without.packed_formats()


def test_every_scheme_is_cached():
    assert all(FORMATS[name].from_buffers is not None for name in schemes())


def test_a_change_of_the_loaded_model_does_not_change_the_cache(folder):
    quantized(folder)
    changed = quantized(folder)
    for tensor in changed.state_dict().values():
        tensor.zero_()
    assert_equal(quantized(folder), quantized(folder, weight_cache=False))


def test_a_file_replaced_with_the_size_and_date_of_the_old_one_is_read(tmp_path, folder):
    quantized(folder)
    weights = folder / "model.safetensors"
    before = weights.stat()
    other = save_model(build_tiny(seed=1), tmp_path / "other") / "model.safetensors"
    weights.write_bytes(other.read_bytes())
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert weights.stat().st_size == before.st_size
    assert weights.stat().st_mtime_ns == before.st_mtime_ns
    assert_equal(quantized(folder), quantized(folder, weight_cache=False))


def test_an_edited_configuration_is_read(folder):
    quantized(folder)
    config = folder / "config.json"
    config.write_text(config.read_text().replace("1e-05", "1e-02"))
    assert quantized(folder).norm.eps == 1e-2
    assert_equal(quantized(folder), quantized(folder, weight_cache=False))


def test_a_model_that_was_changed_just_now_is_not_stored(folder, monkeypatch):
    monkeypatch.setattr(weight_cache, "SETTLED_S", 60)
    quantized(folder)
    assert entries() == []


def test_a_model_that_is_changed_while_it_is_read_is_not_stored(folder, monkeypatch):
    real = load.quantize_weight

    def touch(*arguments):
        os.utime(folder / "model.safetensors")
        return real(*arguments)

    monkeypatch.setattr(load, "quantize_weight", touch)
    quantized(folder)
    assert entries() == []


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_a_file_that_is_replaced_after_it_was_opened_is_not_stored(tmp_path, tiny_tokenizer, kind):
    folder, other = (
        save_model(build_tiny(seed=seed), tmp_path / f"{seed}", tokenizer=tiny_tokenizer)
        for seed in (0, 1)
    )
    source, new = folder / "model.safetensors", other / "model.safetensors"
    if kind == "gguf":
        source, new = (to_gguf(each, tmp_path / f"{each.name}.gguf") for each in (folder, other))
    opened = open_source(folder if kind == "folder" else source)
    os.replace(new, source)
    opened.model(torch.float32, torch.device("cpu"), quantize="int4")
    assert entries() == []
    again = folder if kind == "folder" else source
    assert_equal(quantized(again), quantized(again, weight_cache=False))
    assert len(entries()) == 1


def test_models_that_differ_in_anything_have_their_own_entries(folder):
    quantized(folder)
    quantized(folder, dtype="bfloat16")
    quantized(folder, quantize="int8")
    quantized(folder, context=ContextConfig(method="yarn", factor=2))
    assert len(entries()) == 4
    quantized(folder)
    assert len(entries()) == 4


def test_changed_code_has_its_own_entries(folder, monkeypatch):
    quantized(folder)
    monkeypatch.setattr(weight_cache, "_code_state", lambda: "another version")
    quantized(folder)
    assert len(entries()) == 2


def test_the_code_of_every_format_is_part_of_the_key():
    package = weight_cache.CODE_FOLDERS
    for name in schemes():
        modules = {
            FORMATS[name].quantize.__module__,
            type(FORMATS[name].quantize(torch.ones(8, 64), name)).__module__,
        }
        assert {module.split(".")[1] for module in modules} <= set(package)


@pytest.mark.parametrize("method", ["lora", "pissa", "dora"])
def test_adapters_change_a_model_from_the_cache_as_any_other(tmp_path, folder, method):
    model = attached(build_tiny(), METHODS[method])
    names = hf_module_name(model)
    save_adapter(model, tmp_path / "adapter", module_name=names, base=str(folder))
    without = quantized(folder, adapter=tmp_path / "adapter", weight_cache=False).logits(IDS)
    for _ in range(2):
        assert torch.equal(quantized(folder, adapter=tmp_path / "adapter").logits(IDS), without)
    assert not torch.equal(quantized(folder).logits(IDS), without)


def test_full_weights_and_files_of_quantized_weights_are_not_stored(tmp_path, folder):
    load_model(folder)
    with pytest.raises(ConfigError):
        load_model(folder, quantize="gguf")
    with pytest.raises(ConfigError):
        load_model(folder, quantize="int5")
    assert entries() == []


@pytest.mark.parametrize("damage", ["a byte", "the end", "everything"])
def test_a_damaged_file_is_replaced_with_a_warning(folder, caplog, quantizing_fails, damage):
    first = quantized(folder)
    (path,) = entries()
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    damaged = {"a byte": data, "the end": data[:-100], "everything": b""}[damage]
    path.unlink()  # the first model still maps the file
    path.write_bytes(damaged)
    again = quantized(folder)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "quantized again" in caplog.text
    assert_equal(again, first)
    quantizing_fails()
    assert_equal(quantized(folder), first)


def test_a_file_with_other_tensors_is_replaced(folder, caplog):
    first = quantized(folder)
    (path,) = entries()
    path.unlink()
    weight_cache.write_mapped(path, {"norm.weight": torch.ones(32)})
    assert_equal(quantized(folder), first)
    assert "damaged" in caplog.text
    assert_equal(quantized(folder), first)


def test_only_the_user_can_read_the_files(folder, cache):
    before = os.umask(0)
    try:
        quantized(folder)
    finally:
        os.umask(before)
    (path,) = entries()
    modes = [stat.S_IMODE(each.stat().st_mode) for each in (cache, path.parent, path)]
    assert modes == [0o700, 0o700, 0o600]


def test_a_model_loads_where_the_cache_cannot_be_written(tmp_path, folder, caplog):
    (tmp_path / "cache").write_text("a file, not a folder")
    without = quantized(folder, weight_cache=False)
    assert_equal(quantized(folder), without)
    assert caplog.records == []


def test_a_cache_that_can_only_be_read_is_used(folder, monkeypatch, quantizing_fails, caplog):
    def fail(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    first = quantized(folder)
    monkeypatch.setattr(weight_cache.os, "utime", fail)
    quantizing_fails()
    assert_equal(quantized(folder), first)
    assert caplog.records == []


def test_a_full_disk_leaves_nothing_behind(folder, cache, monkeypatch, caplog):
    def fill(path, _):
        path.write_bytes(bytes(100))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weight_cache, "write_mapped", fill)
    without = quantized(folder, weight_cache=False)
    assert_equal(quantized(folder), without)
    assert list(cache.iterdir()) == []
    assert caplog.records == []


def test_nothing_is_written_where_too_little_space_is_left(folder, monkeypatch):
    usage = shutil.disk_usage(folder)._replace(free=10_000)
    monkeypatch.setattr(weight_cache.shutil, "disk_usage", lambda _: usage)
    quantized(folder)
    assert entries() == []


@pytest.mark.parametrize(("limit", "count"), [("0", 0), ("-1", 0), ("1e-6", 0), ("0.5", 1)])
def test_the_variable_limits_the_size(folder, monkeypatch, limit, count):
    monkeypatch.setenv("EASYLLM_WEIGHT_CACHE_GB", limit)
    quantized(folder)
    assert len(entries()) == count


def test_a_limit_that_is_no_number_turns_the_cache_off(folder, monkeypatch, caplog):
    monkeypatch.setenv("EASYLLM_WEIGHT_CACHE_GB", "many")
    quantized(folder)
    assert entries() == []
    assert "EASYLLM_WEIGHT_CACHE_GB='many' is not a number" in caplog.text


def test_the_entry_that_was_used_longest_ago_is_removed(folder, monkeypatch):
    for age, scheme in ((300, "int8"), (200, "int4")):
        quantized(folder, quantize=scheme)
        (newest,) = [
            path for path in entries() if path.stat().st_mtime > path.stat().st_ctime - 100
        ]
        then = newest.stat().st_mtime - age
        os.utime(newest, (then, then))
    by_age = sorted(entries(), key=lambda path: path.stat().st_mtime)
    quantized(folder, quantize="int8")  # used again: the newest now
    size = sum(path.stat().st_size for path in entries())
    monkeypatch.setenv("EASYLLM_WEIGHT_CACHE_GB", str(size * 1.4 / 1e9))
    quantized(folder, quantize="nf4")
    assert len(entries()) == 2
    assert by_age[0] in entries()
    assert by_age[1] not in entries()
    assert not by_age[1].parent.exists()


def test_what_a_killed_process_left_is_removed_when_it_is_old(folder, cache):
    for name in ("fresh", "old"):
        (cache / name).mkdir(parents=True)
        (cache / name / ".weights.safetensors.12345678.partial").write_bytes(bytes(10))
    os.utime(cache / "old", (1e9, 1e9))
    quantized(folder)
    assert (cache / "fresh").exists()
    assert not (cache / "old").exists()


def test_several_threads_store_one_entry(folder):
    with ThreadPoolExecutor(6) as pool:
        models = list(pool.map(lambda _: quantized(folder), range(12)))
    without = quantized(folder, weight_cache=False)
    for model in models:
        assert_equal(model, without)
    (path,) = entries()
    assert list(path.parent.iterdir()) == [path]


def test_nothing_is_written_while_another_process_writes_the_entry(folder):
    first = quantized(folder)
    (path,) = entries()
    path.unlink()
    command = [sys.executable, "-c", HOLDER, str(path.parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        assert_equal(quantized(folder), first)
        assert entries() == []
        process.kill()
    quantized(folder)
    assert entries() == [path]


def test_a_model_that_was_just_stored_is_mapped(folder):
    assert quantized(folder).maps_weights
    assert quantized(folder).maps_weights
    assert not quantized(folder, weight_cache=False).maps_weights


@pytest.mark.parametrize("scheme", ["nf4", "llm.int8"])
def test_a_model_from_the_cache_is_saved_like_any_other(tmp_path, folder, scheme):
    quantized(folder, quantize=scheme)
    model = quantized(folder, quantize=scheme)
    without = quantized(folder, quantize=scheme, weight_cache=False)
    here, there = (save_model(m, tmp_path / n) for m, n in ((model, "here"), (without, "there")))
    name = "model.safetensors"
    assert (here / name).read_bytes() == (there / name).read_bytes()
    assert_equal(load_model(here), load_model(there))


def test_removing_the_cache_does_not_disturb_a_loaded_model(folder, cache):
    quantized(folder)
    model = quantized(folder)
    before = model.logits(IDS)
    shutil.rmtree(cache)
    assert torch.equal(model.logits(IDS), before)
