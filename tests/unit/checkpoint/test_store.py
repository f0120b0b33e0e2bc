"""Checkpoint folders: shards, damaged files, mismatched tensors, invalid configurations."""

import json
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from easyllm.checkpoint.keymap import Fused, KeyMap, Rename, renames
from easyllm.checkpoint.store import (
    INDEX,
    WEIGHTS,
    TensorFolder,
    open_safetensors,
    read_tensors,
    write_model_weights,
    write_tensors,
)
from easyllm.core.errors import CheckpointError
from easyllm.models import load_model
from easyllm.models.families import FAMILIES
from easyllm.models.families.rope_config import read_rope
from easyllm.models.hf_config import read_files
from easyllm.models.load import open_source


@pytest.fixture
def folder(tmp_path, tiny_folder) -> Path:
    """A copy of the tiny model's folder, to be damaged."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def change_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def unsupported_reason(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_model(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def reshard(folder: Path, max_shard_bytes: int) -> list[Path]:
    tensors, _ = read_tensors(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    write_model_weights(folder, tensors, max_shard_bytes=max_shard_bytes)
    return sorted(folder.glob("model-*.safetensors"))


def same_weights(one, other) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_folder_loads_back_as_the_same_model(tiny_folder, tiny_model):
    loaded = load_model(tiny_folder)
    assert same_weights(loaded, tiny_model)
    assert loaded.config == tiny_model.config
    assert not any(p.requires_grad for p in loaded.parameters())


def test_a_sharded_folder_loads_back_as_the_same_model(folder, tiny_model):
    limit = 10_000
    shards = reshard(folder, limit)
    assert len(shards) > 3
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((folder / INDEX).read_text())
    total = sum(p.numel() * p.element_size() for p in tiny_model.state_dict().values())
    assert index["metadata"]["total_size"] == total
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    for shard in shards:
        tensors, metadata = read_tensors(shard)
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        assert size <= limit or len(tensors) == 1
        assert metadata == {"format": "pt"}
        assert {name for name, file in index["weight_map"].items() if file == shard.name} == set(
            tensors
        )
    assert same_weights(load_model(folder), tiny_model)


def test_the_smallest_shards_contain_one_tensor_each(tmp_path):
    tensors = {str(i): torch.full((3,), float(i)) for i in range(5)}
    write_model_weights(tmp_path, tensors, max_shard_bytes=1)
    assert len(list(tmp_path.glob("model-*-of-00005.safetensors"))) == 5
    with TensorFolder(tmp_path) as found:
        assert found.shapes == dict.fromkeys(tensors, (3,))
        assert all(torch.equal(found.load(name), value) for name, value in tensors.items())


def test_tensors_and_metadata_read_back(tmp_path):
    tensors = {
        "a": torch.arange(6.0).reshape(2, 3).t(),
        "b": torch.ones(2, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(3),
    }
    write_tensors(tmp_path / "x.safetensors", tensors, {"step": "3"})
    found, metadata = read_tensors(tmp_path / "x.safetensors")
    assert metadata == {"step": "3"}
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


@pytest.mark.parametrize("left", [0, 4, 8, 100, -1])
def test_truncated_weights_are_named(folder, left):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:left])
    assert re.search(
        r"model\.safetensors is damaged or truncated .*again", unsupported_reason(folder)
    )


def test_weights_that_are_not_safetensors_are_named(folder):
    (folder / WEIGHTS).write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 4)
    assert "model.safetensors is damaged" in unsupported_reason(folder)


def test_a_truncated_shard_is_named(folder):
    shard = reshard(folder, 10_000)[1]
    shard.write_bytes(shard.read_bytes()[:-7])
    assert f"{shard.name} is damaged or truncated" in unsupported_reason(folder)


def test_a_missing_shard_is_named(folder):
    shard = reshard(folder, 10_000)[1]
    shard.unlink()
    assert f"{shard.name}' does not exist" in unsupported_reason(folder)


def test_a_tensor_in_the_index_but_in_no_shard_is_missing(folder):
    reshard(folder, 10_000)
    name = "model.norm.weight"
    shard = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    tensors, _ = read_tensors(shard)
    del tensors[name]
    write_tensors(shard, tensors | {"model.extra": torch.ones(1)})
    message = unsupported_reason(folder)
    assert f"1 missing: {name}" in message
    assert "1 unexpected: model.extra" in message


@pytest.mark.parametrize("name", ["../x", "../model.safetensors", "/etc/passwd", "sub/x", 3])
def test_an_index_that_names_a_file_outside_the_folder_is_refused(folder, name):
    (folder / INDEX).write_text(json.dumps({"weight_map": {"w": name}}))
    assert "outside its folder" in unsupported_reason(folder)


@pytest.mark.parametrize("name", ["..", ".", "", "\0"])
def test_an_index_that_names_no_file_is_refused(folder, name):
    (folder / INDEX).write_text(json.dumps({"weight_map": {"w": name}}))
    unsupported_reason(folder)


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"w": []}}', "\xff"]
)
def test_an_invalid_index_is_named(folder, content):
    (folder / INDEX).write_text(content, encoding="latin-1")
    assert f"{INDEX} is not a shard index" in unsupported_reason(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickles_are_never_read(folder, name):
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    reason = unsupported_reason(folder)
    assert "contains no model.safetensors (it has pickle files; run easyllm convert" in reason
    assert not Path("owned").exists()


def test_a_folder_without_weights_is_reported(folder):
    (folder / WEIGHTS).unlink()
    assert unsupported_reason(folder).endswith("contains no model.safetensors")


def test_mismatched_tensors_are_all_named(folder):
    tensors, _ = read_tensors(folder / WEIGHTS)
    del tensors["model.norm.weight"]
    tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2)
    tensors["model.layers.0.mlp.gate_proj.weight"] = torch.zeros(64, 31)
    write_tensors(folder / WEIGHTS, tensors)
    message = unsupported_reason(folder)
    assert "1 missing: model.norm.weight" in message
    assert "1 unexpected: model.layers.7.mlp.up_proj.weight" in message
    assert (
        "1 with wrong shape: model.layers.0.mlp.gate_proj.weight: got (64, 31), expected (64, 32)"
        in message
    )
    assert "use the config.json that belongs to these weights" in message


def test_a_configuration_of_another_size_names_a_few_tensors(folder):
    change_config(folder, num_hidden_layers=4)
    message = unsupported_reason(folder)
    assert "18 missing: model.layers.2." in message
    assert "and 8 more" in message


def test_ten_of_many_missing_and_of_many_further_tensors_are_named(folder):
    tensors, _ = read_tensors(folder / WEIGHTS)
    dropped = sorted(name for name in tensors if ".layers." in name)[:13]
    kept = {name: values for name, values in tensors.items() if name not in dropped}
    further = {f"model.further.{n:02}": torch.zeros(2) for n in range(12)}
    write_tensors(folder / WEIGHTS, kept | further)
    message = unsupported_reason(folder)
    assert "13 missing: " in message
    assert "12 unexpected: " in message
    assert sum(name in message for name in dropped) == 10
    assert sum(name in message for name in further) == 10
    assert "and 3 more" in message
    assert "and 2 more" in message


def test_redundant_buffers_are_ignored(folder, tiny_model):
    tensors, _ = read_tensors(folder / WEIGHTS)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    write_tensors(folder / WEIGHTS, {k: v.clone() for k, v in tensors.items()})
    assert same_weights(load_model(folder), tiny_model)


@pytest.mark.parametrize("content", ["{", "", "not json", "\xff"])
def test_a_configuration_that_is_not_json_is_named(folder, content):
    (folder / "config.json").write_text(content, encoding="latin-1")
    assert "config.json is not JSON" in unsupported_reason(folder)


def test_a_configuration_that_is_not_an_object_is_named(folder):
    (folder / "config.json").write_text("[]")
    assert "config.json does not contain a JSON object" in unsupported_reason(folder)


def test_a_generation_config_that_is_not_json_is_named(folder):
    (folder / "generation_config.json").write_text("{")
    assert "generation_config.json is not JSON" in unsupported_reason(folder)


def test_the_generation_configs_eos_tokens_take_precedence(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    assert read_files(folder)["eos_token_id"] == [5, 7]
    assert load_model(folder).config.eos_token_ids == (5, 7)


@pytest.mark.parametrize("model_type", ["lama", "qwen9", None, ["llama"], {}])
def test_an_unknown_model_type_lists_the_known_ones_and_says_that_no_code_is_run(
    folder, model_type
):
    change_config(folder, model_type=model_type, auto_map={"AutoModel": "evil.Model"})
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(CheckpointError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert f"model_type {model_type!r} is not known" in message
    assert "llama" in message.partition("known types are ")[2]
    assert "(code shipped with a checkpoint is never executed" in message
    assert ("did you mean 'llama'?" in message) == (model_type in ("lama", ["llama"]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": ...}, "config.json has no 'hidden_size'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu', which is not implemented"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "no 'short_factor' in its rope_scaling"),
        ({"rope_parameters": {"rope_type": "other", "rope_theta": 5.0}}, "RoPE scaling 'other'"),
        (
            {"rope_scaling": {"rope_type": "yarn"}},
            "config.json has no 'factor' in its rope_scaling",
        ),
        ({"num_key_value_heads": 3}, "not divisible by num_kv_heads=3"),
        ({"num_attention_heads": "four"}, "does not describe a valid model"),
        ({"num_attention_heads": 0, "head_dim": None}, "does not describe a valid model"),
        ({"vocab_size": -1}, r"vocab_size: Input should be greater than 0"),
        ({"rope_parameters": [1]}, "does not describe a valid model"),
    ],
)
def test_an_unusable_configuration_is_named(folder, changes, words):
    change_config(folder, **changes)
    with pytest.raises(CheckpointError, match=words) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("theta", [10000.0, 100000, 5e5])
def test_rope_parameters_are_equivalent_to_rope_theta(folder, theta):
    change_config(folder, rope_theta=theta)
    old = open_source(folder).config
    change_config(
        folder, rope_theta=..., rope_parameters={"rope_theta": theta, "rope_type": "default"}
    )
    assert open_source(folder).config == old
    assert old.layers[0].mixer.position.theta == theta


def test_rope_theta_has_a_default():
    nothing = {"rope_scaling": None, "rope_parameters": None}
    assert read_rope({}, 16) == read_rope(nothing, 16)
    assert read_rope({}, 16).theta == 10000.0


def test_a_written_configuration_loads_back_equal(tiny_model):
    family = FAMILIES["llama"]
    assert family.read_config(family.write_config(tiny_model.config)) == tiny_model.config


def test_a_key_map_renames_transposes_and_fuses_both_ways():
    rules = [
        *renames([("norm.weight", "ln.scale")]),
        Rename("layers.{i}.w", "h.{i}.kernel", transposed=True),
        Fused(("layers.{i}.a", "layers.{i}.b"), "h.{i}.ab", (2, 3)),
    ]
    keymap = KeyMap(rules, (r"h\.\d+\.buffer",))
    state = {
        "norm.weight": torch.arange(4.0),
        "layers.12.w": torch.arange(6.0).reshape(2, 3),
        "layers.12.a": torch.arange(8.0).reshape(2, 4),
        "layers.12.b": -torch.arange(12.0).reshape(3, 4),
    }
    file = keymap.to_file(state)
    assert {name: tuple(t.shape) for name, t in file.items()} == {
        "ln.scale": (4,),
        "h.12.kernel": (3, 2),
        "h.12.ab": (5, 4),
    }
    present = {name: t.shape for name, t in file.items()} | {"h.12.buffer": (1,)}
    expected = {name: t.shape for name, t in state.items()}
    back = {}
    for binding in keymap.check(expected, present, source="x"):
        parts = binding.rule.split(file[binding.theirs])
        back |= dict(zip(binding.ours, parts, strict=True))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    assert keymap.theirs("layers.3.b") == "h.3.ab"
    with pytest.raises(CheckpointError, match=r"h\.12\.ab: got \(4, 4\), expected \(5, 4\)"):
        keymap.check(expected, present | {"h.12.ab": (4, 4)}, source="x")


def test_a_key_map_matches_only_complete_names():
    keymap = KeyMap(renames([("a.{i}.w", "b.{i}.w")]))
    for name in ("a.x.w", "a.1.w2", "xa.1.w", "a.1.b.w"):
        with pytest.raises(CheckpointError, match="no name for"):
            keymap.theirs(name)


def test_a_missing_weight_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"x\.safetensors' does not exist"):
        open_safetensors(tmp_path / "x.safetensors")


@pytest.mark.parametrize(("dtype", "shape", "size"), [("F6_E2M3", [4], 3), ("F32", [0, 2**63], 0)])
def test_a_tensor_that_torch_cannot_hold_is_named(tmp_path, dtype, shape, size):
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}
    header = json.dumps({"w": entry}).encode()
    path = tmp_path / WEIGHTS
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))
    with pytest.raises(CheckpointError, match="tensor 'w' cannot be read") as caught:
        read_tensors(path)
    assert "\n" not in str(caught.value)
    with TensorFolder(tmp_path) as tensors, pytest.raises(CheckpointError, match="'w' cannot be"):
        tensors.load("w")


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Path, bytes]:
    """A folder to write to, and the bytes of a small valid file."""
    tensors = {"a.weight": torch.ones(4, 4), "b": torch.zeros(6, dtype=torch.bfloat16)}
    return tmp_path_factory.mktemp("store"), save(tensors, {"format": "pt"})


def open_whole(folder: Path, content: bytes) -> None:
    """Reads the bytes as a checkpoint, or checks that the error names the file."""
    path = folder / WEIGHTS
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    refused = None
    try:
        with TensorFolder(folder) as tensors:
            for name, shape in tensors.shapes.items():
                assert tuple(tensors.load(name).shape) == shape
    except CheckpointError as error:
        refused = str(error)
    assert refused is None or str(folder) in refused


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused(small, data):
    folder, content = small
    header = 8 + struct.unpack("<Q", content[:8])[0]
    damaged = bytearray(content)
    byte = st.one_of(st.integers(0, 255), st.sampled_from(b'0123456789"{}[],:'))
    for at in data.draw(st.lists(st.integers(0, header - 1), max_size=4)):
        damaged[at] = data.draw(byte)
    if data.draw(st.booleans()):
        damaged = damaged[: data.draw(st.integers(0, len(damaged)))]
    open_whole(folder, bytes(damaged))


@settings(max_examples=100, deadline=None)
@given(
    dtype=st.sampled_from(["F32", "BF16", "F8_E4M3", "F6_E2M3", "BOOL", "I64", "X", "C64"]),
    shape=st.lists(st.sampled_from([0, 1, 2, 8, 2**32, 2**63]), max_size=3),
    offsets=st.lists(st.sampled_from([0, 1, 4, 8, 32, 2**40, 2**64 - 1]), max_size=3),
    size=st.sampled_from([0, 1, 4, 8, 32]),
)
def test_an_arbitrary_header_is_read_or_refused(small, dtype, shape, offsets, size):
    header = json.dumps({"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()
    open_whole(small[0], struct.pack("<Q", len(header)) + header + bytes(size))
