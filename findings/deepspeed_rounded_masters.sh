#!/usr/bin/env bash
# DeepSpeed 0.19.8: with bf16 enabled, the fp32 master weights of a model given in fp32 start from weights rounded to bf16.
#
# `deepspeed.initialize` converts the module to bf16 before the optimizer copies its parameters to fp32. A run in mixed precision
# that begins with an fp32 checkpoint therefore trains other weights than the checkpoint's, by up to 2^-9 of each value, and a
# checkpoint written before the first step is not the one that was read. torch's FSDP2 with `MixedPrecisionPolicy(param_dtype=
# torch.bfloat16)` keeps the fp32 weights and casts them for each use. The documentation of the key `bf16` does not mention it.
#
# Where it bites: continuing an fp32 run under DeepSpeed, and comparing its loss curve with another engine's from the same file:
# they differ from the first step on.
# Seen on 1 December 2026 with Python 3.11 on Linux, gloo on a CPU:
#   "given 1.000244140625; DeepSpeed's fp32 master 1.0; FSDP2's fp32 parameter 1.000244140625"
#
# What to do: expect it, or train in fp32. In this project: named in docs/parallel.md and where `backend: deepspeed` is resolved.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
{
  "${PYTHON:-python3}" -m venv "$work/venv"
  "$work/venv/bin/pip" install --quiet torch==2.13.0 numpy
  "$work/venv/bin/pip" install --quiet setuptools wheel ninja
  "$work/venv/bin/pip" install --quiet --no-build-isolation deepspeed==0.19.8
} >"$work/log" 2>&1 || { tail -3 "$work/log"; exit 2; }
export PATH="$work/venv/bin:$PATH" DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR="$work/extensions"
export RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=29531
"$work/venv/bin/python" - 2>"$work/errors" <<'PYTHON' || { code=$?; tail -3 "$work/errors"; exit $code; }
import contextlib
import sys

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

GIVEN = 1 + 2.0**-12  # not a bf16 number
CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 1},
}


def linear():
    layer = nn.Linear(4, 4, bias=False)
    return layer.requires_grad_(True), nn.init.constant_(layer.weight, GIVEN)


with contextlib.redirect_stdout(sys.stderr):
    deepspeed.init_distributed("gloo")
    model, _ = linear()
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=adam, config=CONFIG)
    master = safe_get_full_fp32_param(engine.module.weight)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    sharded = fully_shard(linear()[0], mesh=mesh, mp_policy=policy)
    kept = sharded.weight.full_tensor()
assert master.dtype == kept.dtype == torch.float32
seen = [float(tensor.flatten()[0]) for tensor in (master, kept)]
print(f"given {GIVEN}; DeepSpeed's fp32 master {seen[0]}; FSDP2's fp32 parameter {seen[1]}")
torch.distributed.destroy_process_group()
sys.exit(0 if seen == [1.0, GIVEN] else 1)
PYTHON
