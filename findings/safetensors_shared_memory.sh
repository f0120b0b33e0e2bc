#!/usr/bin/env bash
# safetensors 0.8.0 with torch 2.13.0: two reads of one tensor from one open file are the same memory.
#
# `safe_open(path, framework="pt").get_tensor(name)` called twice gives two tensors with one storage: what is written into the first
# is read from the second, and from every later read. A second `safe_open` of the same file has memory of its own. The documentation
# says nothing of it, and `safetensors.torch.load_file` gives fresh memory at every call.
#
# Where it bites: a model and its frozen reference that are both filled from one open checkpoint and trained in place are one model:
# a preference loss never leaves its start, without an error.
# Seen on 29 November 2026 with Python 3.11 on Linux:
#   "first read after writing 1 into it: [1.0, 1.0]; second read: [1.0, 1.0]; another safe_open: [0.0, 0.0]"
#
# What to do: open the file again for each model, or clone what it gives. In this project: `checkpoint/store.py`, `reopened`.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
{
  "${PYTHON:-python3}" -m venv "$work/venv"
  "$work/venv/bin/pip" install --quiet torch==2.13.0
  "$work/venv/bin/pip" install --quiet numpy safetensors==0.8.0
} >"$work/log" 2>&1 || { tail -3 "$work/log"; exit 2; }
"$work/venv/bin/python" - "$work/two.safetensors" <<'PYTHON'
import sys

import torch
from safetensors import safe_open
from safetensors.torch import save_file

path = sys.argv[1]
save_file({"weight": torch.zeros(2)}, path)
opened = safe_open(path, framework="pt")
first, second = opened.get_tensor("weight"), opened.get_tensor("weight")
first += 1
fresh = safe_open(path, framework="pt").get_tensor("weight")
print(
    f"first read after writing 1 into it: {first.tolist()}; second read: {second.tolist()}; "
    f"another safe_open: {fresh.tolist()}"
)
as_stated = second.tolist() == [1.0, 1.0] and fresh.tolist() == [0.0, 0.0]
sys.exit(0 if as_stated else 1)
PYTHON
