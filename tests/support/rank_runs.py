"""Runs trainings in forked ranks, one after another.

python rank_runs.py FOLDER     reads FOLDER/stages.json; writes FOLDER/codes.json

A stage is `{"ranks", "values", "output"}`, and how it ends before its last step: with `stop`, all
ranks are killed after that step; with `kill` only rank 1 is, and the others end by themselves; with
`hang` rank 1 hangs.
"""

import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import rl_runs  # noqa: F401 - registers objectives and a reward
from easyllm.core.config import validate
from easyllm.train import TrainConfig, loop, train
from forked_ranks import fork_ranks

HANG_S = 15


def run_stage(stage):
    plain = loop.take_step

    def take_step(run):
        report = plain(run)
        alone = report.step == stage.get("kill") and run.parallel.mesh.world.rank == 1
        if report.step == stage.get("hang") and run.parallel.mesh.world.rank == 1:
            time.sleep(HANG_S)
        if alone or report.step == stage.get("stop"):
            os.kill(os.getpid(), signal.SIGKILL)
        return report

    loop.take_step = take_step
    train(validate(TrainConfig, stage["values"], source="stage"), Path(stage["output"]))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    found = []
    for stage in json.loads((folder / "stages.json").read_text()):
        start = time.monotonic()
        together = not {"kill", "hang"} & stage.keys()
        codes = fork_ranks(stage["ranks"], partial(run_stage, stage), fail_together=together)
        found.append({"codes": codes, "seconds": time.monotonic() - start})
    (folder / "codes.json").write_text(json.dumps(found))
