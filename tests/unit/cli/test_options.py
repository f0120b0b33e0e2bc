"""Flags are made from configuration fields: types, defaults, bounds and help texts exist once."""

import inspect
import io
import json
import subprocess
import sys
from typing import Annotated

import pytest
from pydantic import BaseModel, Field
from typer.models import OptionInfo

from easyllm.cli.options import FlagGroup, Values, checked_flags, option, with_flags
from easyllm.cli.output import figures_text, print_json
from easyllm.cli.sampling import LOADING, SAMPLING
from easyllm.core.errors import ConfigError
from easyllm.engine.params import SamplingParams


class Numbers(BaseModel):
    """Fields of every type of flag."""

    count: Annotated[int, Field(ge=1, le=9)] = Field(3, description="A count.")
    share: Annotated[float, Field(gt=0, le=1)] = Field(0.5, description="A share, as [0.5].")
    limit: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = Field(None, description="A limit.")
    words: tuple[Annotated[str, Field(min_length=1)], ...] = Field((), description="Words.")
    fast: bool = Field(False, description="Whether to be fast.")


GROUP = FlagGroup(Numbers, *Numbers.model_fields, flags={"count": "--number"})


def flags_of(command):
    """Returns annotation, `OptionInfo` and default of each parameter."""
    found = {}
    for name, parameter in inspect.signature(command).parameters.items():
        (flag,) = (x for x in parameter.annotation.__metadata__ if isinstance(x, OptionInfo))
        found[name] = (parameter.annotation.__origin__, flag, parameter.default)
    return found


def test_a_flag_has_the_type_default_bounds_and_text_of_its_field():
    @with_flags
    def command(numbers: Annotated[Values, GROUP.starting(share=0.25)]) -> None:
        del numbers

    found = flags_of(command)
    assert [found[name][0] for name in found] == [int, float, int | None, list[str] | None, bool]
    assert [found[name][2] for name in found] == [3, 0.25, None, None, False]
    flags = {name: flag for name, (_, flag, _) in found.items()}
    assert (flags["count"].default, flags["share"].default) == ("--number", "--share")
    assert (flags["count"].min, flags["count"].max, flags["count"].help) == (1, 9, "A count.")
    assert (flags["share"].min, flags["share"].max) == (None, None)  # an exclusive bound
    assert flags["share"].help == r"A share, as \[0.5]."
    assert (flags["limit"].min, flags["limit"].max) == (0, None)
    assert flags["words"].help == "Words. Repeatable."


def test_a_command_receives_the_values_of_a_group_by_field():
    seen = {}

    @with_flags
    def command(model: str, *, numbers: Annotated[Values, GROUP], last: int = 1) -> None:
        seen.update(model=model, numbers=numbers, last=last)

    command(model="m", count=2, share=0.1, limit=None, words=["a"], fast=True, last=3)
    assert seen == {
        "model": "m",
        "numbers": {"count": 2, "share": 0.1, "limit": None, "words": ("a",), "fast": True},
        "last": 3,
    }


def test_two_flags_with_one_name_are_refused():
    def command(one: Annotated[Values, GROUP], two: Annotated[Values, GROUP]) -> None:
        del one, two

    with pytest.raises(ValueError, match="duplicate parameter"):
        with_flags(command)


def test_a_flag_that_needs_another_one_says_so():
    assert option(Numbers, "count", needs="--fast").help == "With --fast: a count."
    assert option(Numbers, "count", low=0, note="0: none.").help == "A count. 0: none."
    assert option(Numbers, "count", low=0).min == 0


def test_groups_have_a_flag_for_every_parameter_that_a_command_line_can_express():
    others = {"logit_bias", "stop_token_ids", "ignore_eos", "prompt_logprobs"}
    others |= {"skip_special_tokens", "include_stop"}
    assert set(SAMPLING.fields) == SamplingParams.model_fields.keys() - others
    assert not set(SAMPLING.fields) & set(LOADING.fields)


def test_json_is_printed_without_torch():
    code = (
        "import sys; from easyllm.cli.output import print_json; print_json({'a': float('nan')});"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"a": None}


def test_json_has_no_nan_where_the_terminal_lacks_a_character(monkeypatch):
    written = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", written)
    print_json({"name": "é", "loss": [float("nan")]})
    written.flush()
    text = written.buffer.getvalue().decode("ascii")
    assert "NaN" not in text
    assert json.loads(text) == {"name": "é", "loss": [None]}


def test_options_are_importable_without_torch():
    code = (
        "import sys, easyllm.engine.options, easyllm.engine.params, easyllm.serve.limits\n"
        "assert not {'torch', 'numpy', 'fastapi'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Bounded(BaseModel, extra="forbid"):
    """Fields of a command."""

    top_k: int = Field(default=1, gt=0, description="A number.")
    name: str = Field(default="", max_length=3, description="A name.")


def test_a_mistake_is_named_by_its_flag():
    group = FlagGroup(Bounded, "top_k", "name", flags={"name": "--called/--nameless"})
    assert checked_flags(Bounded, {"top_k": 2}, group).top_k == 2
    with pytest.raises(ConfigError, match=r"^--top-k 0: input should be greater than 0$"):
        checked_flags(Bounded, {"top_k": 0}, group)
    with pytest.raises(ConfigError, match=r"^options: 2 mistakes") as raised:
        checked_flags(Bounded, {"top_k": -1, "name": "long name"}, group)
    assert "--top-k -1: " in str(raised.value)
    assert "--called 'long name': " in str(raised.value)
    with pytest.raises(ConfigError, match=r"^options: unknown key 'top'"):
        checked_flags(Bounded, {"top": 1}, group)


def test_figures_for_people_have_units():
    figures = {
        "peak_rss_bytes": 1260912640,
        "predicted_bytes": {"weights": 2e9, "peak": "loss"},
        "predicted_seconds": 1.25,
        "tokens": 5000,
        "eval/loss_nats": 1.5123456789,
        "retention_loss_nats_before": 14.520647178,
    }
    assert figures_text(figures) == {
        "peak rss": "1.26 GB",
        "predicted": "weights 2.00 GB, peak loss",
        "predicted seconds": "1.2 s",
        "tokens": "5,000",
        "eval/loss_nats": "1.51235",
        "retention loss before": "14.5206 nats",
    }
