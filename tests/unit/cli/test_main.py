"""The list of commands that `easyllm --help` shows without importing them."""

import subprocess
import sys

import pytest
from typer.main import get_command

from easyllm.cli.main import COMMANDS, app, app_for, build_app
from easyllm_command import easyllm

LISTED = {name: text for commands in COMMANDS.values() for name, text in commands.items()}


def first_sentence(command):
    return " ".join((command.help or "").split("\n\n")[0].split())


def test_the_list_has_the_first_sentence_of_every_command():
    commands = get_command(app).commands
    assert {name: first_sentence(command) for name, command in commands.items()} == LISTED


def test_the_help_lists_every_command_and_imports_none():
    code = (
        "import sys; sys.argv = ['easyllm', '--help']\n"
        "from easyllm.cli.main import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "sys.stderr.write(repr([m for m in sys.modules if m.startswith(('easyllm', 'pydantic'))]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(f" {name} " in done.stdout for name in LISTED)
    assert "pydantic" not in done.stderr
    assert "easyllm.cli.train" not in done.stderr


@pytest.mark.parametrize("name", LISTED)
def test_a_command_is_loaded_with_its_own_module_only(name):
    module = next(module for module, commands in COMMANDS.items() if name in commands)
    assert set(get_command(app_for([name, "--json"])).commands) == set(COMMANDS[module])


def test_an_unknown_command_is_refused_among_all_of_them():
    assert set(get_command(app_for(["trian"])).commands) == set(LISTED)
    assert set(get_command(build_app()).commands) == set(LISTED)


USAGE = {
    ("convert", "a", "b", "--lora-rank", "0"): (
        "--lora-rank 0: input should be greater than or equal to 1; see easyllm convert --help"
    ),
    (
        "convert",
        "a",
        "b",
        "--lora-rank",
        "a b",
    ): "--lora-rank 'a b': input should be a valid integer",
    ("convert", "a", "b", "--loar-rank", "4"): (
        "no such option: --loar-rank (did you mean --lora-rank?); see easyllm convert --help"
    ),
    ("convert", "a"): "missing argument 'target'; see easyllm convert --help",
    ("convert", "a", "b", "c"): "got unexpected extra argument",
    ("plan", "--context"): "option '--context' requires an argument; see easyllm plan --help",
    ("trian",): "no such command 'trian'. Did you mean 'train'?; see easyllm --help",
    ("rag", "nosuch"): "no such command 'nosuch'; see easyllm rag --help",
}


@pytest.mark.parametrize("words", USAGE)
def test_a_line_that_cannot_be_parsed_is_one_sentence(words):
    done = easyllm(*words)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {USAGE[words]}")
    assert done.stderr.count("\n") == 1


def test_a_group_without_a_command_prints_its_help():
    done = easyllm("rag")
    assert done.returncode == 2
    assert "Usage: easyllm rag" in done.stdout + done.stderr
    assert "error" not in done.stderr
