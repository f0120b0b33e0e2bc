"""Runs the `easyllm` command in this process."""

import contextlib
import io
import sys
from dataclasses import dataclass

import pytest

from easyllm.cli.main import main

RECIPE = """
model: {model}
data: {{ train: [{data}], max_seq_len: 64 }}
adapter: {{ kind: lora, rank: 2 }}
output: {output}
"""
"""A recipe of a short training run."""
GOOD = '{"prompt": "a", "completion": "b"}\n'
"""A row that can be trained on."""


@dataclass
class Done:
    """The outcome of a command."""

    returncode: int
    stdout: str
    stderr: str


def easyllm(*words, stdin=None, **environment):
    """Runs a command in this process, because a new one would import torch again."""
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", ["easyllm", *map(str, words)])
        patch.setattr(sys, "stdin", io.StringIO(stdin or ""))
        for name, value in environment.items():
            patch.setenv(name, value)
        code = 0
        try:
            main()
        except SystemExit as error:
            code = error.code or 0
    return Done(code, out.getvalue(), err.getvalue())
