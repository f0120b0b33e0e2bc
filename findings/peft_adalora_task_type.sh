#!/usr/bin/env bash
# peft 0.21.2: without task_type, AdaLoRA trains without its orthogonality term, and says nothing.
#
# AdaLoRA prunes singular values, which means something only while P and Q stay near orthogonal; `orth_reg_weight` adds that
# to the loss. `task_type` looks like a label (LoRA computes the same with and without it), but here it decides whether the
# loss contains the term at all: the wrapper without a task calls the base model past the code that adds it.
#
# Seen on 29 November 2026 with peft 0.21.2, transformers 5.24.0, torch 2.13.0, Python 3.11 on Linux:
#   loss without task_type 4.14 (that of the base alone), with task_type="CAUSAL_LM" 5.54; LoRA: 4.14 both times
#
# What to do: set task_type="CAUSAL_LM" for AdaLoRA. In this project: docs/adapters.md; the term does not depend on it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
{
  "${PYTHON:-python3}" -m venv "$work/venv"
  "$work/venv/bin/pip" install --quiet torch==2.13.0
  "$work/venv/bin/pip" install --quiet peft==0.21.2 transformers==5.24.0
} >"$work/log" 2>&1 || { tail -3 "$work/log"; exit 2; }
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore - 2>"$work/log" <<'PYTHON' || { status=$?; tail -3 "$work/log"; exit $status; }
import copy
import sys

import torch
from peft import AdaLoraConfig, LoraConfig, __version__, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).eval()
ids = torch.arange(20)[None]


def loss(config):
    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(base), config)
    return model(input_ids=ids, labels=ids).loss.item()


def both(kind, **settings):
    return [loss(kind(target_modules=["q_proj"], task_type=t, **settings)) for t in (None, "CAUSAL_LM")]


without, with_task = both(AdaLoraConfig, init_r=8, target_r=4, total_step=10, orth_reg_weight=0.5)
plain, plain_task = both(LoraConfig, r=8)
alone = base(input_ids=ids, labels=ids).loss.item()
print(
    f"peft {__version__}: AdaLoRA's loss without task_type {without:.2f} (base alone {alone:.2f}), with "
    f"{with_task:.2f}; LoRA's {plain:.2f} and {plain_task:.2f}"
)
same = abs(without - alone) < 1e-5 and abs(plain - plain_task) < 1e-5
sys.exit(0 if same and with_task - without > 0.1 else 1)
PYTHON
