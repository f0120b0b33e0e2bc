#!/usr/bin/env bash
# Ray Train: without a checkpoint the reported metrics are lost, and without the dashboard the workers' output drowns.
#
# Two things that meet in a script that trains on a Ray started by `ray.init(include_dashboard=False)`:
#   1. `ray.train.report({"loss": 1.0})` is accepted and logged, but `trainer.fit().metrics` is None: the result keeps the
#      metrics of checkpoints only. The same call with a checkpoint returns {"loss": 1.0}.
#   2. An actor that watches over the run asks the state API, which the dashboard serves, about once a second and logs a
#      line for each failure. A run of ten seconds prints more of these lines than lines of its own; training is unaffected.
#
# Seen on 30 November 2026 with ray[train] 2.60.0, torch 2.13.0 (CPU), Python 3.11 on Linux:
#   metrics without a checkpoint: None; with one: {'loss': 1.0}; lines "Failed to query Ray Train Controller": 10 or more
#
# What to do: write what a run found to a file of your own, or report a checkpoint with it; set log_to_driver=False, or start
# the dashboard (ray[default]). `easyllm train --ray` reads the run's manifest, and follows its metrics file.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
{
  "${PYTHON:-python3}" -m venv "$work/venv"
  "$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.2.6
  "$work/venv/bin/pip" install --quiet "ray[train]==2.60.0"
} >"$work/log" 2>&1 || { tail -3 "$work/log"; exit 2; }
cd "$work"
cat >train.py <<'PYTHON'
import sys
import tempfile
import time

import ray
import ray.train
from ray.train import Checkpoint, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

FOLDER = sys.argv[1]


def work(config):
    time.sleep(10)
    checkpoint = Checkpoint.from_directory(tempfile.mkdtemp()) if config["checkpoint"] else None
    ray.train.report({"loss": 1.0}, checkpoint=checkpoint)


ray.init(include_dashboard=False, object_store_memory=200 * 2**20)
for checkpoint in (False, True):
    run = RunConfig(name=f"run-{checkpoint}", storage_path=FOLDER)
    scaling = ScalingConfig(num_workers=1)
    trainer = TorchTrainer(work, train_loop_config={"checkpoint": checkpoint}, scaling_config=scaling, run_config=run)
    print(f"RESULT checkpoint {checkpoint}: {trainer.fit().metrics}", flush=True)
ray.shutdown()
PYTHON
RAY_AUTH_MODE=disabled RAY_DEDUP_LOGS=0 "$work/venv/bin/python" train.py "$work/results" >out 2>&1 || { tail -3 out; exit 2; }
without=$(grep -ao 'RESULT checkpoint False: .*' out | cut -d' ' -f4-)
with=$(grep -ao 'RESULT checkpoint True: .*' out | cut -d' ' -f4-)
lines=$(grep -ac 'Failed to query Ray Train Controller' out) || true
echo "ray 2.60.0: metrics without a checkpoint: $without; with one: $with; lines about the controller's state: $lines"
[[ $without == None && $with == "{'loss': 1.0}" && $lines -ge 10 ]]
