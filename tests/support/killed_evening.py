"""Kills an evening with SIGKILL three times, resumes it, and compares it with one that was not.

    python tests/support/killed_evening.py FOLDER [KILLS] [SEED] [lab options ...]

By default the smallest evening (`--quick`). It is killed at random shares of the time that the
whole one took; each start continues where the last one was. FOLDER then has `whole` and `broken`.
Prints where it was killed, and whether models, quantized files and answers are the same.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

FILES = (
    *(f"stages/{name}/model/model.safetensors" for name in ("pretrain", "sft", "dpo", "grpo")),
    "model-gptq/model.safetensors",
    "model.gguf",
)
TIMES = ("seconds", "planned", "taken", "tokens_per_s")
"""Numbers that begin with these are times."""


def start(output, options):
    words = ["lab", "evening", f"output={output}", *options]
    line = [sys.executable, "-m", "easyllm", *words]
    return subprocess.Popen(line, start_new_session=True, stdout=subprocess.DEVNULL)


def stage_of(folder):
    """Returns the stages that have finished, the last one last."""
    done = sorted((folder / "stages" / "stages").glob("*.json"), key=os.path.getmtime)
    return [each.stem for each in done] + [
        each.stem for each in (folder / "records").glob("*.json")
    ]


def numbers(folder):
    found = json.loads((folder / "numbers.json").read_text(encoding="utf-8"))["numbers"]
    items = found.items() if isinstance(found, dict) else ((n["key"], n["value"]) for n in found)
    return {key: value for key, value in items if not key.startswith(TIMES)}


def main(folder, kills=3, seed=0, *options):
    options = options or ("--quick",)
    folder, draw = Path(folder), random.Random(int(seed))
    whole, broken = folder / "whole", folder / "broken"
    began = time.monotonic()
    assert start(whole, options).wait() == 0, "the whole evening failed"
    seconds, killed = time.monotonic() - began, []
    for _ in range(int(kills)):
        process = start(broken, options)
        try:
            process.wait(timeout=seconds * draw.uniform(0.25, 0.6))
            break
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            killed.append(stage_of(broken))
    assert start(broken, options).wait() == 0, "the resumed evening failed"
    same = {name: (whole / name).read_bytes() == (broken / name).read_bytes() for name in FILES}
    same["numbers"] = numbers(whole) == numbers(broken)
    result = {"finished_when_killed": killed, "seconds": round(seconds, 1), "same": same}
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    return 0 if killed and all(same.values()) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
