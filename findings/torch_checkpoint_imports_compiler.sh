#!/usr/bin/env bash
# torch: the first call of torch.utils.checkpoint imports the compiler (TorchDynamo, SymPy), about 100 MB and seconds of CPU,
# in a program that never compiles.
#
# Activation checkpointing is there to save memory. Its function is decorated so that `torch.compile` leaves it alone, and the
# decorator imports `torch._dynamo` when it is first called; importing `torch.utils.checkpoint` does not. With a small model
# on a CPU the peak of a process that recomputes activations is therefore higher than without, and the first step is seconds
# longer. Taking the function from under its decorator does not help: it imports the same packages.
#
# Seen on 30 November 2026 with torch 2.13.0 (CPU), Python 3.11 on Linux:
#   before the call: torch._dynamo no, sympy no; after one call on a tensor of one element: yes, yes, at least 60 MB more
#
# What to do: count it. `easyllm plan` adds it to a run that recomputes activations (docs/planner-accuracy.md); on a GPU, or
# with a model of gigabytes, it does not matter.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
{
  "${PYTHON:-python3}" -m venv "$work/venv"
  "$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.2.6
} >"$work/log" 2>&1 || { tail -3 "$work/log"; exit 2; }
cd "$work"
cat >call.py <<'PYTHON'
import sys

import torch
from torch.utils.checkpoint import checkpoint


def resident_mb():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 1e6


def loaded():
    return [name in sys.modules for name in ("torch._dynamo", "sympy")]


x = torch.ones(1, requires_grad=True)
torch.exp(x).backward()  # autograd is set up
before, start = loaded(), resident_mb()
checkpoint(torch.exp, x, use_reentrant=False).backward()
print("RESULT", before, loaded(), resident_mb() - start >= 60, flush=True)
PYTHON
found=$("$work/venv/bin/python" call.py 2>/dev/null | grep -ao 'RESULT .*' | cut -c8-) || true
echo "torch 2.13.0: compiler and SymPy loaded before and after one call, at least 60 MB more: ${found:-no result}"
[[ $found == "[False, False] [True, True] True" ]]
