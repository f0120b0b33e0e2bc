#!/usr/bin/env bash
# peft 0.21.2: modules_to_save=["norm"] trains and saves every module whose name ends in the letters "norm".
#
# `target_modules` matches whole parts of a name, and `modules_to_save` the end of the text: in addition to the final norm of a
# Llama, each layer's input_layernorm and post_attention_layernorm are copied, trained and saved. An entry that fits nothing
# is accepted without a word, as long as another one fits.
#
# Seen on 29 November 2026 with peft 0.21.2, transformers 5.24.0, torch 2.13.0, Python 3.11 on Linux:
#   modules_to_save=['norm', 'scores'] trains 5 modules: model.layers.0.input_layernorm ... model.norm
#
# What to do: write whole names (model.norm) and count the trained parameters. In this project: docs/adapters.md.
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
import sys

from peft import LoraConfig, __version__, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
entries = ["norm", "scores"]
model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], modules_to_save=entries))
trained = {
    name.removeprefix("base_model.model.").split(".modules_to_save")[0]
    for name, parameter in model.named_parameters()
    if parameter.requires_grad and "lora_" not in name
}
model.save_pretrained("adapter")
saved = {
    name.removeprefix("base_model.model.").removesuffix(".weight")
    for name in load_file("adapter/adapter_model.safetensors")
    if "lora_" not in name
}
names = sorted(trained)
print(f"peft {__version__}: modules_to_save={entries} trains {len(names)} modules: {names[0]} ... {names[-1]}")
layers = {f"model.layers.{i}.{w}_layernorm" for i in (0, 1) for w in ("input", "post_attention")}
sys.exit(0 if trained == saved == layers | {"model.norm"} else 1)
PYTHON
