"""Every key of every configuration is read somewhere: none is silently ignored."""

import ast
import importlib
import pkgutil
import sys
from pathlib import Path

import pytest

import easyllm
from easyllm.core.config import Config
from easyllm.parallel.config import ParallelConfig
from easyllm.train import TrainConfig, train
from easyllm.train.config import LossScaleConfig

SOURCE = Path(easyllm.__file__).parent


def every_config(base=Config):
    """Yields all configuration classes."""
    for sub in base.__subclasses__():
        if sub.__module__.startswith("easyllm."):
            yield sub
        yield from every_config(sub)


for _module in pkgutil.walk_packages([str(SOURCE)], "easyllm."):
    importlib.import_module(_module.name)
CONFIGS = sorted(set(every_config()), key=lambda config: (config.__module__, config.__name__))


def reads():
    """Maps each attribute to the (file, line) pairs that read it, also in patterns or `getattr`."""
    found = {}
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                names = [node.attr]
            elif isinstance(node, ast.MatchClass):
                names = node.kwd_attrs
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr":
                names = [x.value for x in node.args[1:2] if isinstance(x, ast.Constant)]
            for name in names:
                found.setdefault(name, []).append((path, node.lineno))
    return found


def validators():
    """Returns the lines of validators by file: a key that is only validated is not yet read."""
    found = {}
    for path in SOURCE.rglob("*.py"):
        lines = found.setdefault(path, set())
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = [ast.unparse(x) for x in getattr(node, "decorator_list", ())]
            if any("validator" in name for name in named):
                lines |= set(range(node.lineno, node.end_lineno + 1))
    return found


READS, VALIDATORS = reads(), validators()
BOUNDS = ("Gt", "Ge", "Lt", "Le", "MinLen", "MaxLen", "MultipleOf")
RECORDS = {"Manifest", "ShardsManifest"}
"""Keys that are documentation for people or other programs, without effect."""
CHECKED = {"QuantSpec": {"group_size", "symmetric"}}
"""Keys for which a validator accepts only the supported value."""


@pytest.mark.parametrize(
    "config", [c for c in CONFIGS if c.__name__ not in RECORDS], ids=lambda config: config.__name__
)
def test_every_key_is_read_by_more_than_a_validator(config):
    # `kind` distinguishes variants: pydantic reads it
    for name in config.model_fields.keys() - {"kind"} - CHECKED.get(config.__name__, set()):
        places = [(p, line) for p, line in READS.get(name, ()) if line not in VALIDATORS[p]]
        assert places, name


@pytest.fixture
def seen(monkeypatch):
    """The keys that a run reads, by configuration, except reads in validators."""
    found = {}
    plain = Config.__getattribute__

    def watched(self, name):
        if name in type(self).__pydantic_fields__:
            caller = sys._getframe(1).f_code
            module = sys.modules[type(self).__module__].__file__
            validates = caller.co_filename == module and caller.co_name.startswith("_")
            if not validates and "pydantic" not in caller.co_filename:
                found.setdefault(type(self), set()).add(name)
        return plain(self, name)

    monkeypatch.setattr(Config, "__getattribute__", watched)
    return found


SMALL = {"batch_size": None, "batch_tokens": 24, "micro_batch_tokens": 48, "device": "cpu"}
RUNS = {
    "adamw": {
        "adapter": {"rank": 2},
        "samples": {"prompts": ["a"], "max_tokens": 2},
        "early_stopping": {"patience": 1, "min_delta": 100.0},
        "parameter_groups": [{"pattern": "lora_A", "rate_factor": 0.5}],
        "eval_every": 1,
        "keep_best": True,
        "schedule": {"kind": "linear"},
    },
    "muon": {
        "optimizer": {"kind": "muon"},
        "schedule": {"kind": "wsd"},
        "objective": {"label_smoothing": 0.1},
    },
    "sgd": {"optimizer": {"kind": "sgd", "momentum": 0.9}, "schedule": {"kind": "inverse_sqrt"}},
}


@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS.keys())
def test_a_run_reads_every_configured_key(seen, tiny_folder, tmp_path, changes):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n' * 3)
    data = {"train": [str(rows)], "eval": [str(rows)], "max_seq_len": 32}
    values = {"model": str(tiny_folder), "data": data, "max_steps": 2, "save_every": 1}
    config = TrainConfig.model_validate(values | SMALL | changes)
    seen.clear()
    train(config, tmp_path / "run")
    parts = [config, *(getattr(config, name) for name in TrainConfig.model_fields)]
    parts += config.parameter_groups
    for part in (part for part in parts if isinstance(part, Config)):
        if isinstance(part, LossScaleConfig | ParallelConfig):
            continue  # read in fp16, and in several processes
        # the command reads `output`, pydantic reads `kind`
        unread = set(type(part).model_fields) - seen.get(type(part), set()) - {"output", "kind"}
        assert not unread, type(part).__name__


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__qualname__)
def test_no_bound_of_a_field_is_replaced_by_that_of_its_type(config):
    # pydantic keeps the last of two bounds of a kind: PositiveInt's replaces Field's stricter one
    for name, field in config.model_fields.items():
        kinds = [type(bound) for bound in field.metadata if type(bound).__name__ in BOUNDS]
        assert len(kinds) == len(set(kinds)), f"{name} has two bounds of a kind: {field.metadata}"
