#!/usr/bin/env bash
# gptqmodel: on a machine with one or two CPUs nothing can be quantized.
#
# Its thread pool has (CPUs + 1) // 2 workers by default, one on two CPUs, but loading a model to quantize asks that pool for
# two, whatever its size: the error names a "virtual pool" and neither the number of CPUs nor the environment variable
# GPTQMODEL_CPU_WORKERS that sets the number. With the variable at 2 the same call works on the same machine. The script
# sets it to 1, which is the default there, and then to 2.
#
# Seen on 30 November 2026 with gptqmodel 7.6.0, torch 2.13.0 (CPU), transformers 5.24.0, Python 3.11 on Linux:
#   1 worker: ValueError: Virtual pool 'model_loader:cpu' requests 2 workers but parent 'cpu' only has 1; 2 workers: 7 linears
#
# What to do: export GPTQMODEL_CPU_WORKERS=2. Loading a quantized folder needs no workers. `easyllm quantize --method gptq`
# runs on any number of CPUs, and its folders load in gptqmodel (docs/quantization.md).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
{
  "${PYTHON:-python3}" -m venv "$work/venv"
  "$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.2.6 "setuptools<83" wheel
  "$work/venv/bin/pip" install --quiet --no-build-isolation gptqmodel==7.6.0 transformers==5.24.0
} >"$work/log" 2>&1 || { tail -3 "$work/log"; exit 2; }
cd "$work"
cat >quantize.py <<'PYTHON'
import sys

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

words = {f"w{i}": i for i in range(64)} | {"<unk>": 64, "</s>": 65}
raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
raw.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", unk_token="<unk>").save_pretrained("full")
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, bos_token_id=65, eos_token_id=65,
)
LlamaForCausalLM(config).half().save_pretrained("full")
rows = [{"input_ids": [(i * k) % 64 for i in range(32)], "attention_mask": [1] * 32} for k in range(1, 13)]
try:
    model = GPTQModel.load("full", QuantizeConfig(bits=4, group_size=32), device="cpu")
    model.quantize(rows, batch_size=1)
    model.save("quantized")
    made = GPTQModel.load("quantized", device="cpu", backend=BACKEND.GPTQ_TORCH)
    found = sum(hasattr(each, "qweight") for each in made.model.modules())
    print(f"RESULT {found} linears", flush=True)
except ValueError as error:
    print(f"RESULT ValueError: {error}", flush=True)
PYTHON
one=$(GPTQMODEL_CPU_WORKERS=1 CUDA_VISIBLE_DEVICES="" "$work/venv/bin/python" quantize.py 2>/dev/null | grep -ao 'RESULT .*' | cut -c8-) || true
rm -rf full quantized
two=$(GPTQMODEL_CPU_WORKERS=2 CUDA_VISIBLE_DEVICES="" "$work/venv/bin/python" quantize.py 2>/dev/null | grep -ao 'RESULT .*' | cut -c8-) || true
echo "gptqmodel 7.6.0: 1 worker: ${one:-no result}; 2 workers: ${two:-no result}"
[[ $one == *"requests 2 workers but parent 'cpu' only has 1"* && $two == "7 linears" ]]
