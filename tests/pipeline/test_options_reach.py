"""Every option of every command has an effect, and invalid values are refused by name."""

import contextlib
import io
import json
import sys
import typing
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.models import OptionInfo

import easyllm.engine
from easyllm.cli.main import app, main
from easyllm.engine import Completion
from easyllm.models import ContextConfig

NONSENSE, NEGATIVE = "nonsense-value", "-7"
ANY_TEXT = {
    *("--stop", "--system", "--prompt", "--host", "--api-key", "--index-url"),
    *("--special", "--chat-template", "--text-key"),  # the user's own texts
    *("--regex", "--choice", "--allowed-host"),
    *("--output", "--config", "--set", "--text", "--model", "--draft"),  # paths, sources, pairs
    *("--history", "--html", "--embedder", "--index"),
}
"""Options that accept any text.

A new text option must be added here, or refuse invalid values.
"""
ANY_NUMBER = {"--length-penalty", "--seed"}
TOGETHER = {
    "--rope-factor": ("--rope", "yarn"),
    "--window": ("--rope", "streaming"),
    "--sinks": ("--rope", "streaming"),
    "--logprobs": ("--json",),
    "--top-k": ("--temperature", 1),
    "--top-p": ("--temperature", 1),
    "--min-p": ("--temperature", 1),
    "--typical-p": ("--temperature", 1),
}
"""Options that an option requires to have an effect."""


def run(*words, stdin=""):
    """Returns exit code, standard output and standard error of a command run in this process."""
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", ["easyllm", *map(str, words)])
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        code = 0
        try:
            main()
        except SystemExit as error:
            code = error.code or 0
    return code, out.getvalue(), err.getvalue()


@dataclass(frozen=True)
class Option:
    """An option of a command: its flag and the type of its value (None for a switch)."""

    flag: str
    type: type | None


def commands(group, words=()):
    """Yields the words and the function of every command."""
    for command in group.registered_commands:
        yield " ".join((*words, command.name)), command.callback
    for inner in group.registered_groups:
        yield from commands(inner.typer_instance, (*words, inner.name or ""))


def options_in(function):
    """Yields the options that typer reads from a function's annotations."""
    for name, hint in typing.get_type_hints(function, include_extras=True).items():
        found = [x for x in getattr(hint, "__metadata__", ()) if isinstance(x, OptionInfo)]
        if not found:
            continue
        words = (
            found[0].default,
            *(found[0].param_decls or ()),
        )  # the first one in typer is the default
        named = [word for word in words if isinstance(word, str) and word.startswith("--")]
        kinds = [x for x in leaf_types(hint.__origin__) if x is not type(None)]
        value = None if kinds == [bool] else kinds[0]
        flag = named[0] if named else f"--{name.replace('_', '-')}"
        yield Option(flag.rpartition("/")[2], value)  # of --x/--no-x the one that changes it


def leaf_types(hint):
    """Returns the types in a union or list: `list[str] | None` → str, NoneType."""
    inner = typing.get_args(hint)
    return [leaf for part in inner for leaf in leaf_types(part)] if inner else [hint]


COMMANDS = {name: tuple(options_in(function)) for name, function in commands(app)}
VALUED = [(name, option) for name, options in COMMANDS.items() for option in options if option.type]


@pytest.fixture(scope="module")
def calls(tiny_folder, tmp_path_factory):
    """Valid arguments of each command."""
    folder = tmp_path_factory.mktemp("calls")
    rows, text = folder / "rows.jsonl", folder / "text.txt"
    rows.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    text.write_text("one two three\n" * 20)
    out = folder / "out"
    return {
        "pull": ("smollm2",),
        "plan": ("llama2-7b",),
        "convert": (tiny_folder, out),
        "merge": (tiny_folder, folder, out),
        "quantize": (tiny_folder, out, "--group-size", "16"),
        "generate": (tiny_folder, "x"),
        "chat": (tiny_folder,),
        "serve": (tiny_folder,),
        "bench engine": (tiny_folder,),
        "bench serve": ("http://127.0.0.1:9",),
        "rl gridworld": (),
        "lab": ("rope-distance",),
        "probe": (tiny_folder, "one two"),
        "data passkey": (tiny_folder, folder / "keys.jsonl", "--length", 128),
        "dtype": ("0.1",),
        "embed words": (text, out),
        "embed search": (tiny_folder, text, "one"),
        "rag index": (text, out),
        "rag ask": (folder, "one?"),
        "rag serve": (folder, tiny_folder),
        "rag eval": (rows,),
        "eval": (tiny_folder, rows),
        "reason": (tiny_folder, "2 + 2"),
        "prompt new": ("new.md",),
        "verify": (tiny_folder,),
        "train": ("sft-lora",),
        "compare": (tiny_folder, tiny_folder),
        "data best-of-n": (tiny_folder, rows, folder / "best.jsonl", "--reward", "rule:digits"),
        "data inspect": (rows, "--model", tiny_folder),
        "tokenizer train": (text, "--output", out),
        "tokenizer report": (tiny_folder, "--text", f"a={text}"),
        "tokenizer extend": (tiny_folder, text, "--dry-run"),
    }


@pytest.mark.parametrize(
    ("name", "option"), VALUED, ids=[f"{name} {option.flag}" for name, option in VALUED]
)
def test_an_invalid_value_is_refused_by_the_name_of_its_option(
    calls, monkeypatch, tmp_path, name, option
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("easyllm.serve.run.serve", lambda *_, **__: None)
    word, number = option.flag, option.type in (int, float)
    if word in (ANY_NUMBER if number else ANY_TEXT):
        pytest.skip("any value may be meant")
    value = NEGATIVE if number else NONSENSE
    needed = TOGETHER.get(word, ()) if word != "--logprobs" else ("--json",)
    needed = needed if set(needed[:1]) <= options_of(name) else ()
    words = () if name == "quickstart" else calls[name]
    code, out, err = run(*name.split(), *words, *needed, word, value)
    assert code == 2, (out, err)
    assert value in err or word in err, err
    assert not out


# ---- accepted values have an effect

ENGINE = {
    "--dtype": ("dtype", "bfloat16", "bfloat16"),
    "--quantize": ("quantize", "int4", "int4"),
    "--cache-gb": ("cache_gb", "0.5", 0.5),
    "--cache-dtype": ("cache_dtype", "int8", "int8"),
    "--deterministic": ("deterministic", None, True),
    "--no-weight-cache": ("weight_cache", None, False),
    "--draft": ("draft", "ngram", "ngram"),
    "--max-running": ("max_running", "3", 3),
    "--adapter": ("adapter", "folder", "folder"),
    "--rope": ("context", "yarn", ContextConfig(method="yarn")),
    "--rope-factor": ("context", "2", ContextConfig(method="yarn", factor=2)),
    "--window": ("context", "9", ContextConfig(method="streaming", window=9)),
    "--sinks": ("context", "2", ContextConfig(method="streaming", sinks=2)),
    "--logn": ("context", None, ContextConfig(method="yarn", logn=True)),
}
SAMPLING = {
    "--temperature": ("temperature", "0.25", 0.25),
    "--top-k": ("top_k", "5", 5),
    "--top-p": ("top_p", "0.5", 0.5),
    "--min-p": ("min_p", "0.1", 0.1),
    "--typical-p": ("typical_p", "0.9", 0.9),
    "--repetition-penalty": ("repetition_penalty", "1.5", 1.5),
    "--presence-penalty": ("presence_penalty", "0.5", 0.5),
    "--frequency-penalty": ("frequency_penalty", "0.5", 0.5),
    "--no-repeat-ngram": ("no_repeat_ngram_size", "3", 3),
    "--seed": ("seed", "4", 4),
    "--max-tokens": ("max_tokens", "7", 7),
    "--min-tokens": ("min_tokens", "2", 2),
    "--stop": ("stop", "end", ("end",)),
    "--n": ("n", "2", 2),
    "--best-of": ("best_of", "3", 3),
    "--logprobs": ("logprobs", "2", 2),
}
GUIDES = {"--json-schema", "--json-object", "--regex", "--choice", "--grammar"}
ELSEWHERE = {
    "generate": {"--beams", "--length-penalty", "--chat", "--json", *GUIDES},
    "chat": {"--system", *GUIDES},
    "serve": {
        "--host",
        "--port",
        "--api-key",
        "--read-timeout",
        "--write-timeout",
        "--drain-timeout",
        *("--max-waiting", "--unload-idle", "--allowed-host", "--adapters-folder", "--log-json"),
        *("--system", "--history", "--watch", "--replicas"),
    },
    "bench engine": {"--repeats", "--json"},
}
"""Options for neither the engine's constructor nor the sampling parameters, tested elsewhere."""


class Recorder:
    """Stands in for the engine and records its arguments."""

    def __init__(self, source, **options):
        self.options, self.params = options, None
        Recorder.last = self
        self.engine = SimpleNamespace(memory=SimpleNamespace(line=lambda: "memory"))

    def encode(self, prompt):
        return [1]

    def encode_chat(self, messages):
        self.messages = messages
        return [1]

    def stream(self, ids, params, guide=None):
        self.params, self.guide = params, guide
        return iter(())

    def beam_search(self, prompts, params):
        self.params = params
        return [Completion()]


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setattr(easyllm.engine, "LLM", Recorder)
    # There is no adapter in the folder.
    monkeypatch.setattr("easyllm.models.adapter_files.check_adapter", lambda _: None)
    monkeypatch.setattr("easyllm.adapters.read_adapter", lambda path: SimpleNamespace(folder=path))
    monkeypatch.setattr("easyllm.serve.run.serve", lambda *_, **__: None)
    monkeypatch.setattr(
        "easyllm.engine.rates.measure_rates",
        lambda *_, **__: ([], {"matmul_flops_per_s": 1.0, "read_bytes_per_s": 1.0}),
    )


VERBS = ("generate", "chat", "serve", "bench engine")


def options_of(name):
    return {option.flag for option in COMMANDS[name]}


def invoke(name, calls, word, value):
    needed = TOGETHER.get(word, ("--rope", "yarn") if word == "--logn" else ())
    port = ("--port", 18431) if name == "serve" else ()
    words = (*name.split(), *calls[name], *needed, word, *(() if value is None else (value,)))
    code, _, err = run(*words, *port, stdin="hello\n")
    assert code == 0, err
    return Recorder.last


@pytest.mark.parametrize(
    ("name", "word"), [(n, w) for n in VERBS for w in sorted(options_of(n) & ENGINE.keys())]
)
def test_an_engine_option_reaches_the_engine(calls, recorder, name, word):
    key, value, expected = ENGINE[word]
    assert invoke(name, calls, word, value).options[key] == expected


@pytest.mark.parametrize(
    ("name", "word"),
    [(n, w) for n in ("generate", "chat") for w in sorted(options_of(n) & SAMPLING.keys())],
)
def test_a_sampling_option_reaches_the_sampler(calls, recorder, name, word):
    key, value, expected = SAMPLING[word]
    assert getattr(invoke(name, calls, word, value).params, key) == expected


@pytest.mark.parametrize("name", VERBS)
def test_every_option_is_tested_above(name):
    assert options_of(name) <= ENGINE.keys() | SAMPLING.keys() | ELSEWHERE[name]


def test_timeouts_reach_the_server(calls, recorder, monkeypatch):
    seen = {}
    monkeypatch.setattr("easyllm.serve.run.serve", lambda *_, **options: seen.update(options))
    words = ("--read-timeout", 5, "--write-timeout", 6, "--drain-timeout", 7, "--port", 18431)
    words += ("--max-waiting", 8, "--unload-idle", 9, "--allowed-host", "a.example", "--log-json")
    words += ("--adapters-folder", calls["serve"][0])
    code, _, err = run("serve", *calls["serve"], *words)
    assert code == 0, err
    limits = seen["limits"]
    assert (limits.read_timeout_s, limits.write_timeout_s, limits.drain_timeout_s) == (5, 6, 7)
    assert (limits.max_waiting, limits.unload_idle_s) == (8, 9)
    assert "a.example" in seen["allowed_hosts"]
    assert seen["adapters_folder"] == Path(calls["serve"][0])
    assert seen["log"] is not None


@pytest.mark.parametrize(
    ("text", "begins"), [("assistant", "# Role: "), ("Be brief.", "Be brief.")]
)
def test_the_system_message_of_a_server_reaches_the_engine(calls, recorder, text, begins):
    assert invoke("serve", calls, "--system", text).options["system"].startswith(begins)


def test_beams_chat_and_system_options_reach_the_engine(calls, recorder):
    assert invoke("generate", calls, "--beams", 3).params.num_beams == 3
    code, _, err = run(
        "generate", *calls["generate"], "--beams", 2, "--length-penalty", 0.5, "--chat"
    )
    assert code == 0, err
    assert Recorder.last.params.length_penalty == 0.5
    assert Recorder.last.messages == [{"role": "user", "content": "x"}]
    found = invoke("chat", calls, "--system", "Be brief.")
    assert found.messages[0] == {"role": "system", "content": "Be brief."}


IN_VAIN = {
    "--rope-factor without --rope": ("generate", "--rope-factor", 2),
    "--rope-factor without --rope, converting": ("convert", "--rope-factor", 2),
    "--sinks without --rope": ("generate", "--sinks", 2),
    "--logn without --rope": ("generate", "--logn"),
    "--window of a method without one": ("generate", "--rope", "yarn", "--window", 5),
    "--sinks of a method without them": ("generate", "--rope", "rerope", "--sinks", 5),
    "--rope-factor of a streaming context": (
        *("generate", "--rope", "streaming"),
        *("--rope-factor", 2),
    ),
    "--logprobs that nothing prints": ("generate", "--logprobs", 2),
}


@pytest.mark.parametrize("words", IN_VAIN.values(), ids=IN_VAIN.keys())
def test_an_option_without_effect_is_refused(calls, recorder, words):
    name, *rest = words
    code, out, err = run(name, *calls[name], *rest)
    assert code == 2, (out, err)
    assert err.startswith("error: ")


def test_an_index_for_a_hub_model_is_refused():
    code, _, err = run("pull", "hf:org/name", "--index-url", "https://example.org/simple")
    assert code == 2
    assert "leave it out" in err
