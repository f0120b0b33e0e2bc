"""Runs trainings in forked ranks, one after another.

python rank_runs.py FOLDER     reads FOLDER/stages.json; writes FOLDER/codes.json

A stage is `{"ranks", "values", "output"}`, and how it ends before its last step: with `stop`, all
ranks are killed after that step; with `kill` only rank 1 is, and the others end by themselves.
"""

import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

from easyllm.core.config import validate
from easyllm.train import TrainConfig, loop, train
from forked_ranks import fork_ranks


def run_stage(stage):
    plain = loop.take_step

    def take_step(run):
        report = plain(run)
        alone = report.step == stage.get("kill") and run.parallel.mesh.world.rank == 1
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
        codes = fork_ranks(stage["ranks"], partial(run_stage, stage), fail_together=False)
        found.append({"codes": codes, "seconds": time.monotonic() - start})
    (folder / "codes.json").write_text(json.dumps(found))
