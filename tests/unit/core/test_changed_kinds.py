"""An override that selects another kind keeps the recipe's settings that the new kind has."""

import pytest

from easyllm.core.changed_kinds import overridden
from easyllm.core.config import validate
from easyllm.core.errors import ConfigError
from easyllm.train import TrainConfig

WRITTEN = {
    "data": {"train": ["a.jsonl"]},
    "adapter": {"kind": "lora", "rank": 4, "alpha": 9, "rslora": True},
    "optimizer": {"learning_rate": 0.5, "betas": [0.5, 0.6]},
}


def config(*words):
    values = overridden(TrainConfig, WRITTEN, words, source="mine.yaml")
    return validate(TrainConfig, values, source="mine.yaml", overrides=words)


def test_settings_that_both_kinds_have_are_kept():
    adapter = config("adapter.kind=dora").adapter
    assert (adapter.kind, adapter.rank, adapter.alpha, adapter.rslora) == ("dora", 4, 9.0, True)


def test_settings_of_the_old_kind_are_left_out_with_a_note(capsys):
    assert config("adapter.kind=ia3").adapter.kind == "ia3"
    note = " ".join(capsys.readouterr().err.split())
    expected = "note: adapter.kind=ia3 has no rank=4, alpha=9, rslora=True of mine.yaml; left out"
    assert note == expected
    assert config("optimizer.kind=sgd").optimizer.learning_rate == 0.5
    assert "has no betas=[0.5, 0.6]" in capsys.readouterr().err


def test_settings_that_the_user_gives_are_never_left_out():
    with pytest.raises(ConfigError, match="rank"):
        config("adapter.kind=ia3", "adapter.rank=8")


def test_the_same_kind_again_or_a_whole_section_changes_nothing(capsys):
    assert config("adapter.kind=lora").adapter.rank == 4
    assert config("adapter={kind: ia3}").adapter.kind == "ia3"
    with pytest.raises(ConfigError, match="adapter"):
        config("adapter.kind=lorra")
    assert "left out" not in capsys.readouterr().err
