"""Kills a training run with SIGKILL at random points, and resumes it each time.

    python tests/support/killed_runs.py CONFIG.json FOLDER KILLS SEED

A point is a number of calls of Easyllm's functions, so it may be anywhere: in a rollout, a reward,
an update, or in the middle of writing a checkpoint, and it does not depend on the clock. Each
attempt is a fork of this process, which has imported torch but computed nothing. FOLDER then has
`whole`, a run without interruption, and `broken`. Prints how many attempts were killed, and where.
"""

import json
import os
import random
import signal
import sys
import traceback
from pathlib import Path

import rl_runs  # noqa: F401 - registers a reward
from easyllm.train import Callback, TrainConfig, train

SOURCE = str(Path(sys.modules["easyllm"].__file__).parent)


class Calls:
    """Counts the calls of functions in `easyllm`; number `end` kills the process."""

    def __init__(self, end=None):
        self.count, self.end, self.where = 0, end, ""

    def __call__(self, frame, event, _):
        if event != "call" or not frame.f_code.co_filename.startswith(SOURCE):
            return
        self.count += 1
        if self.count == self.end:
            os.kill(os.getpid(), signal.SIGKILL)


class NoteStart(Callback):
    """Notes how many calls there were before the first step."""

    def __init__(self, calls):
        self.calls, self.before = calls, 0

    def on_start(self, run):
        self.before = self.calls.count


def forked(config, output, end=None):
    """Trains in a fork of this process; returns its status, and the counts of an unkilled run."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        calls = Calls(end)
        start = NoteStart(calls)
        sys.setprofile(calls)
        try:
            train(config, output, callbacks=[start])
            sys.setprofile(None)
            os.write(writer, json.dumps([start.before, calls.count]).encode())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(writer)
    status = os.waitpid(child, 0)[1]
    with os.fdopen(reader) as file:
        found = file.read()
    return status, json.loads(found) if found else None


def main(config, folder, kills, seed):
    config = TrainConfig.model_validate_json(Path(config).read_text("utf-8"))
    folder, draw = Path(folder), random.Random(seed)
    status, counts = forked(config, folder / "whole")
    assert status == 0, "the whole run failed"
    before, every = counts
    ends = []
    for _ in range(kills):
        # so many calls that each attempt has something left to do
        end = draw.randint(before // 2, before + (every - before) // kills)
        status, _ = forked(config, folder / "broken", end)
        if not os.WIFSIGNALED(status):
            break
        ends.append(end)
    else:
        status, _ = forked(config, folder / "broken")
    assert status == 0, "the resumed run failed"
    found = {"killed_at": ends, "calls": every, "before_first_step": before}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
