"""Runs the stages of `rank_runs.py` in one process that forks the ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import easyllm
from easyllm.train.metrics import read_metrics

SUPPORT = Path(__file__).parent


def stage(values, output, ranks, parallel=None, more=None, **ends):
    """A training: a recipe's values with some more, its folder, its ranks, and how it ends."""
    values = values | {"parallel": parallel or {}} | (more or {})
    return {"ranks": ranks, "values": values, "output": str(output), **ends}


def run_stages(folder, stages):
    """Returns how the stages ended, by their names, and what they printed."""
    (folder / "stages.json").write_text(json.dumps(list(stages.values())))
    paths = [str(Path(easyllm.__file__).parents[1]), str(SUPPORT), str(SUPPORT.parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SUPPORT / "rank_runs.py"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ends = json.loads((folder / "codes.json").read_text())
    return dict(zip(stages, ends, strict=True)), done.stderr


def losses(output):
    return [m["train/loss_nats"] for m in read_metrics(output) if "train/loss_nats" in m]
