"""Configuration files: errors with suggestions, overrides, precedence, round trips."""

import math
import os
import re
from pathlib import Path
from typing import Annotated, Literal

import pytest

from easyllm.core.config import (
    ENVIRONMENT_PREFIX,
    Config,
    apply_overrides,
    load_config,
    validate,
)
from easyllm.core.environment import RESERVED_VARIABLES, environment_overrides
from easyllm.core.errors import ConfigError, SourceError, suggest
from easyllm.core.json_schema import json_schema
from easyllm.core.kinds import Kinds
from easyllm.core.yaml_text import dump_yaml, read_yaml
from easyllm.pipeline.recipe import Recipe, load_recipe, load_train_recipe
from easyllm.train.config import TrainConfig

TRAIN = {"data": {"train": ["rows.jsonl"]}}


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    for name in [n for n in os.environ if n.startswith(ENVIRONMENT_PREFIX)]:
        monkeypatch.delenv(name)


def complaint(model, values) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(model, values, source="recipe.yaml")
    return str(caught.value)


def recipe(**stages):
    return {"name": "n", "output": "o", "stages": stages}


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_mistyped_key_gets_a_suggestion():
    message = complaint(TrainConfig, TRAIN | {"optimiser": {}})
    assert message == "recipe.yaml: unknown key 'optimiser' (did you mean 'optimizer'?)"


def test_a_mistyped_nested_key_is_named_with_its_path():
    message = complaint(TrainConfig, TRAIN | {"optimizer": {"learning_rat": 1e-4}})
    assert "unknown key 'optimizer.learning_rat' (did you mean 'learning_rate'?)" in message


def test_a_mistyped_key_of_an_optional_part_gets_a_suggestion():
    message = complaint(TrainConfig, TRAIN | {"adapter": {"rnak": 8}})
    assert "unknown key 'adapter.rnak' (did you mean 'rank'?)" in message


def test_a_key_without_a_similar_one_lists_the_known_ones():
    message = complaint(TrainConfig, TRAIN | {"optimizer": {"zzz": 1}})
    assert "(known keys: betas, eps, kind, learning_rate, paged, state, weight_decay)" in message


@pytest.mark.parametrize("name", ["tune", "train", "merge", "data", "optimizer"])
def test_a_typo_inside_a_stage_gets_a_suggestion_for_any_stage_name(name):
    stage = TRAIN | {"kind": "train", "batch_siz": 4, "optimizer": {"learning_rat": 1e-4}}
    message = complaint(Recipe, recipe(**{name: stage}))
    assert f"unknown key 'stages.{name}.batch_siz' (did you mean 'batch_size'?)" in message
    assert f"'stages.{name}.optimizer.learning_rat' (did you mean 'learning_rate'?)" in message


def test_an_unknown_kind_of_stage_lists_the_known_kinds():
    message = complaint(Recipe, recipe(a={"kind": "trian"}))
    assert "stages.a" in message
    for kind in ("convert", "evaluate", "train", "merge"):
        assert repr(kind) in message


def test_a_reference_to_a_later_stage_is_refused():
    message = complaint(Recipe, recipe(a={"kind": "convert", "model": "@b"}))
    assert message == "recipe.yaml: stage 'a' uses @b, which is not an earlier stage"


def test_all_errors_are_listed_at_once():
    values = {
        "batch_siz": 4,
        "epochs": 0,
        "optimizer": {"learning_rat": 1, "betas": [0.9, "x"]},
        "adapter": {"rank": -1},
    }
    message = complaint(TrainConfig, values)
    assert message.startswith("recipe.yaml: 6 mistakes\n  - ")
    for part in (
        "missing key 'data'",
        "unknown key 'batch_siz' (did you mean 'batch_size'?)",
        "unknown key 'optimizer.learning_rat'",
        "epochs=0: input should be greater than 0",
        "optimizer.betas.1='x': input should be a valid number",
        "adapter.rank=-1: input should be greater than 0",
    ):
        assert part in message


def test_a_long_invalid_value_is_truncated():
    message = complaint(TrainConfig, TRAIN | {"epochs": "x" * 500})
    assert len(message) < 200
    assert "..." in message


def test_a_configuration_is_immutable():
    config = validate(TrainConfig, TRAIN, source="test")
    with pytest.raises(ValueError, match="frozen"):
        config.epochs = 2


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("2.e3", 2e3),
        ("-3e2", -300.0),
        ("1.5e+3", 1500.0),
        ("3", 3),
        ("0.5", 0.5),
        ("true", True),
        ("null", None),
        ("[a, b]", ["a", "b"]),
        ("{x: 1}", {"x": 1}),
        ("a=b", "a=b"),
        ("'1e-4'", "1e-4"),
        ("e4", "e4"),
        ("", ""),
        ("@before", "@before"),
        ("[1, 2", "[1, 2"),
        ("你好", "你好"),
    ],
)
def test_an_override_is_read_as_yaml(text, value):
    found = apply_overrides({}, [f"key={text}"])["key"]
    assert found == value
    assert type(found) is type(value)


def test_an_override_sets_a_nested_key_and_keeps_the_rest():
    before = {"optimizer": {"kind": "adamw", "learning_rate": 1.0}, "seed": 3}
    after = apply_overrides(before, ["optimizer.learning_rate=1e-4", "data.train=[a]"])
    assert after == {
        "optimizer": {"kind": "adamw", "learning_rate": 1e-4},
        "seed": 3,
        "data": {"train": ["a"]},
    }
    assert before == {"optimizer": {"kind": "adamw", "learning_rate": 1.0}, "seed": 3}


def test_the_last_override_wins():
    assert apply_overrides({"seed": 0}, ["seed=1", "seed=2"]) == {"seed": 2}


def test_an_override_replaces_a_value_with_a_mapping():
    assert apply_overrides({"adapter": None}, ["adapter.rank=8"]) == {"adapter": {"rank": 8}}


def test_the_error_for_an_invalid_override_says_how_to_write_one():
    with pytest.raises(ConfigError, match=r"write key=value .*did you mean 'seed'"):
        apply_overrides({"seed": 0}, ["sede"])
    with pytest.raises(ConfigError, match="write key=value"):
        apply_overrides({}, ["=3"])


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("optimizer", "it has no value for optimizer; write optimizer.kind=value"),
        ("seed", "it has no value for seed; write seed=value"),
        ("optimizer.kind", "write key=value or key.sub=value"),
    ],
)
def test_a_key_without_a_value_is_not_suggested_to_itself(word, expected):
    values = {"optimizer": {"kind": "adamw"}, "seed": 0, "seeds": 1}
    with pytest.raises(ConfigError, match=re.escape(f"{word!r} is not an override")) as raised:
        apply_overrides(values, [word])
    assert str(raised.value).endswith(expected)
    assert "did you mean" not in str(raised.value)


def test_a_word_is_never_suggested_for_itself():
    assert suggest("seed", ["seed"]) == ""
    assert suggest("seed", ["seed", "seeds"]) == " (did you mean 'seeds'?)"


def test_two_underscores_in_a_variable_separate_keys():
    environment = {"EASYLLM_OPTIMIZER__LEARNING_RATE": "1e-4", "EASYLLM_SEED": "3"}
    assert environment_overrides(TrainConfig, environment) == [
        "optimizer.learning_rate=1e-4",
        "seed=3",
    ]


def test_variables_that_name_no_field_are_ignored():
    environment = dict.fromkeys(RESERVED_VARIABLES, "x")
    environment |= {"EASYLLM_NOTHING": "1", "SEED": "1", "EASYLLM_OUTPUTS__X": "1"}
    assert environment_overrides(TrainConfig, environment) == []


def test_precedence_is_defaults_file_environment_command_line(tmp_path, monkeypatch):
    def rate(*words):
        return load_config(TrainConfig, path, words).optimizer.learning_rate

    path = write(tmp_path / "r.yaml", "data: {train: [a]}\n")
    assert rate() == TrainConfig(data={"train": ["a"]}).optimizer.learning_rate
    write(path, "data: {train: [a]}\noptimizer: {learning_rate: 3e-4}\n")
    assert rate() == 3e-4
    monkeypatch.setenv("EASYLLM_OPTIMIZER__LEARNING_RATE", "1e-4")
    assert rate() == 1e-4
    assert rate("optimizer.learning_rate=5e-4") == 5e-4


def mistake(tmp_path, monkeypatch, text, *words, **environment):
    """Returns the error for a training recipe with these overrides and variables."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    path = write(tmp_path / "recipe.yaml", text)
    with pytest.raises(ConfigError) as caught:
        load_train_recipe(path, list(words))
    return str(caught.value).replace(str(path), "FILE")


MINE = "data: {train: [a]}\n"
BLAME = {
    "a key of the file": (MINE + "optimizer: {lr: 1}\n", (), {}, "FILE: unknown key"),
    "a value of the file": (MINE + "epochs: none\n", ("seed=3",), {}, "FILE: epochs='none'"),
    "a key of the command line": (MINE, ("optimizer.lr=1",), {}, "command line: unknown key"),
    "a value of the command line": (MINE, ("epochs=none",), {}, "command line: epochs='none'"),
    "a part of a value of the command line": (
        *(MINE, ("adapter={rank: 0}",), {}, "command line: adapter.rank=0"),
    ),
    "a kind of the command line": (
        *(MINE, ("optimizer.kind=adam",), {}, "command line: optimizer: unknown kind 'adam'"),
    ),
    "a part of an unknown key of the command line": (
        *(MINE, ("optimizr.learning_rate=1",), {}),
        "command line: unknown key 'optimizr' (did you mean 'optimizer'?)",
    ),
    "parts of an unknown key of both": (
        *(MINE + "optimizr: {eps: 1}\n", ("optimizr.learning_rate=1",), {}),
        "FILE: unknown key 'optimizr' (did you mean 'optimizer'?)",
    ),
    "a part of a single value": (
        *(MINE + "batch_size: 4\n", ("batch_size.x=1",), {}),
        "command line: batch_size={'x': 1}: input should be a valid integer",
    ),
    "a kind whose keys are others": (
        *(MINE, ("optimizer.kind=sgd", "optimizer.betas=[0.9, 0.95]"), {}),
        "command line: unknown key 'optimizer.betas' (known keys: ",
    ),
    "another type than a mapping": (
        *(MINE, ("optimizer=3",), {}),
        "command line: optimizer=3: expected a mapping with one of the kinds",
    ),
    "a part of an unknown key of the environment": (
        *(MINE, (), {"EASYLLM_OPTIMIZER__EPSS": "1"}),
        "environment variable EASYLLM_OPTIMIZER__EPSS: unknown key 'optimizer.epss' (did you "
        "mean 'eps'?)",
    ),
    "what the command line leaves out": (
        *(MINE, ("data.max_seq_len=4", "data.train=[]"), {}, "command line: data.train=[]"),
    ),
    "what the file leaves out": ("seed: 1\n", ("epochs=2",), {}, "FILE: missing key 'data'"),
    "the environment": (
        *(MINE, (), {"EASYLLM_SEED": "x"}, "environment variable EASYLLM_SEED: seed='x'"),
    ),
    "the environment, deeper": (
        *(MINE, (), {"EASYLLM_OPTIMIZER__EPS": "x"}),
        "environment variable EASYLLM_OPTIMIZER__EPS: optimizer.eps='x'",
    ),
    "values that do not go together": (
        *(MINE, ("batch_tokens=4",), {}),
        "FILE with batch_tokens changed: the size of a step is given in sequences or in tokens",
    ),
    "values inside that do not": (
        *(MINE + "optimizer: {kind: sgd}\n", ("optimizer.nesterov=true",), {}),
        "FILE with optimizer.nesterov changed: optimizer",
    ),
    "both": (
        *(MINE + "epochs: none\n", ("sed=3",), {}),
        "2 mistakes\n  - FILE: epochs='none'",
    ),
}


@pytest.mark.parametrize("case", BLAME.values(), ids=BLAME.keys())
def test_an_error_names_its_source(tmp_path, monkeypatch, case):
    text, words, environment, said = case
    assert mistake(tmp_path, monkeypatch, text, *words, **environment).startswith(said)


STAGES = "name: n\noutput: o\nstages: {train: {kind: train, data: {train: [a]}}}\n"


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("stages.train.optimizr.x=1", "unknown key 'stages.train.optimizr' (did you mean "),
        (
            "stages.trian.x=1",
            "missing key 'stages.trian.kind'; known kinds are 'tokenizer', 'extend', 'corpus', "
            "'convert', 'evaluate', 'train', 'merge'; other keys next to 'stages.trian': train "
            "(did you mean 'train'?)",
        ),
        ("stages.trian.kind=train", "missing key 'stages.trian.data'"),
        ("stages.train=3", "stages.train=3: expected a mapping with one of the kinds 'tokenizer',"),
    ],
)
def test_an_error_in_a_stage_names_its_source(tmp_path, word, said):
    path = write(tmp_path / "recipe.yaml", STAGES)
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, [word])
    assert str(caught.value).startswith(f"command line: {said}")


class _Low(Config):
    kind: Literal["low"] = "low"
    rank: int = 1


class _Wide(Config):
    kind: Literal["wide"] = "wide"
    length: int = 1


def test_the_known_keys_are_those_of_the_values_kind():
    shapes = Kinds("shape", default="low")
    shapes.register(_Low)
    shapes.register(_Wide)

    class Holder(Config):
        one: Annotated[_Low, shapes] = _Low()
        maybe: Annotated[_Low | _Wide, shapes] | None = None

    said = complaint(Holder, {"one": {"kind": "wide", "rank": 2}})
    assert "unknown key 'one.rank' (known keys: kind, length)" in said
    said = complaint(Holder, {"one": {"lengths": 2}})
    assert "unknown key 'one.lengths' (known keys: kind, rank)" in said
    said = complaint(Holder, {"maybe": {"kind": "wide", "lengths": 2}})
    assert "unknown key 'maybe.lengths' (did you mean 'length'?)" in said


def test_a_suggestion_differs_from_the_input():
    assert suggest("rank", ["rank", "ranks"]) == " (did you mean 'ranks'?)"
    assert suggest("rank", ["rank"]) == ""


def test_environment_variables_apply_to_recipes(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").touch()
    monkeypatch.setenv("EASYLLM_OPTIMIZER__LEARNING_RATE", "1e-4")
    monkeypatch.setenv("EASYLLM_STAGES__TUNE__BATCH_SIZE", "3")
    train = write(tmp_path / "train.yaml", "data: {train: rows.jsonl}\n")
    config = load_train_recipe(train, [])
    assert config.optimizer.learning_rate == 1e-4
    assert config.data.train == (str((tmp_path / "rows.jsonl").resolve()),)
    pipeline = write(
        tmp_path / "run.yaml",
        "name: n\noutput: o\nseed: 7\nstages:\n  tune: {kind: train, data: {train: rows.jsonl}}\n",
    )
    stage = load_recipe(pipeline, []).stages["tune"]
    assert stage.batch_size == 3
    assert stage.seed == 7
    assert load_recipe(pipeline, ["stages.tune.batch_size=5"]).stages["tune"].batch_size == 5


def test_the_error_for_a_recipe_of_the_other_kind_names_its_command(tmp_path):
    train = write(tmp_path / "train.yaml", "data: {train: [a]}\n")
    pipeline = write(tmp_path / "run.yaml", "name: n\noutput: o\nstages: {}\n")
    with pytest.raises(ConfigError, match="easyllm train"):
        load_recipe(train, [])
    with pytest.raises(ConfigError, match="easyllm run"):
        load_train_recipe(pipeline, [])


@pytest.mark.parametrize("text", ["a: [1", "a: b: c", "\tx: 1", "a: &x\nb: *y\n"])
def test_the_error_for_invalid_yaml_is_one_line_with_the_file_name(tmp_path, text):
    path = write(tmp_path / "bad.yaml", text)
    with pytest.raises(ConfigError, match=r"bad\.yaml is not valid YAML") as caught:
        read_yaml(path)
    assert "\n" not in str(caught.value)


def test_yaml_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "latin.yaml"
    path.write_bytes("name: café".encode("latin-1"))
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_yaml(path)


def test_yaml_cannot_build_python_objects(tmp_path):
    path = write(tmp_path / "bad.yaml", "a: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_yaml(path)


@pytest.mark.parametrize(("text", "kind"), [("- a\n", "list"), ("", "NoneType"), ("3", "int")])
def test_the_error_for_yaml_without_a_mapping_names_its_type(tmp_path, text, kind):
    path = write(tmp_path / "bad.yaml", text)
    with pytest.raises(ConfigError, match=f"contains a {kind}, expected a mapping"):
        read_yaml(path)


def test_a_missing_file_is_a_source_error(tmp_path):
    with pytest.raises(SourceError, match=r"nothing\.yaml' does not exist"):
        load_config(TrainConfig, tmp_path / "nothing.yaml")
    with pytest.raises(SourceError, match="is a folder; name a YAML file"):
        read_yaml(tmp_path)


def test_a_dump_loads_back_equal(tmp_path):
    config = TrainConfig(
        data={"train": ["a", "你好.jsonl"], "max_seq_len": 64},
        adapter={"rank": 4, "targets": ["q_proj"]},
        optimizer={"learning_rate": 1e-4, "eps": 1e-12},
        max_steps=3,
    )
    path = write(tmp_path / "r.yaml", dump_yaml(config))
    assert load_config(TrainConfig, path) == config
    assert "你好" in path.read_text(encoding="utf-8")


def test_a_dump_of_a_recipe_loads_back_equal(tmp_path):
    values = recipe(
        tune=TRAIN | {"kind": "train"},
        merged={"kind": "merge", "model": "smollm2", "adapter": "@tune"},
        after={"kind": "evaluate", "model": "@merged", "data": {"x": "rows.jsonl"}},
    )
    config = validate(Recipe, values, source="test")
    path = write(tmp_path / "r.yaml", dump_yaml(config))
    assert load_config(Recipe, path) == config


@pytest.mark.parametrize(
    "text", ["1e5", "1e-4", "2.e3", "3", "true", "null", "2024-01-01", "~", "", "a: b", "@x", "#"]
)
def test_text_that_looks_like_something_else_stays_text_in_a_dump(tmp_path, text):
    config = TrainConfig(data={"train": ["a"]}, model=text)
    path = write(tmp_path / "r.yaml", dump_yaml(config))
    assert load_config(TrainConfig, path).model == text


def test_every_default_is_written_out():
    text = dump_yaml(TrainConfig(data={"train": ["a"]}))
    for name in TrainConfig.model_fields:
        assert f"{name}:" in text
    assert "weight_decay: 0.0" in text


def test_the_json_schema_names_the_fields():
    schema = json_schema(TrainConfig)
    assert set(schema["properties"]) == set(TrainConfig.model_fields)
    assert math.isclose(schema["$defs"]["AdamWConfig"]["properties"]["eps"]["default"], 1e-8)


class _Inner(Config):
    rate: float = 0.1


class _Outer(Config):
    optimizer: _Inner = _Inner()
    epochs: int = 1


def test_an_unknown_key_of_a_nested_mapping_is_found_there():
    with pytest.raises(
        ConfigError, match=r"unknown key 'rate' \(did you mean 'optimizer.rate'\?\)"
    ):
        validate(_Outer, {"rate": 1}, source="recipe.yaml")
    with pytest.raises(ConfigError, match=r"unknown key 'epoch' \(did you mean 'epochs'\?\)"):
        validate(_Outer, {"epoch": 1}, source="recipe.yaml")
