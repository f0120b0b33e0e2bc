#!/usr/bin/env bash
# llama.cpp (xllamacpp 2026.10.11549): RoPE of a Baichuan model is applied only if it has 32 layers; with another number it has no positions.
#
# The architecture `baichuan` of GGUF serves two models: 7B with RoPE and 13B with ALiBi. llama.cpp tells them apart by their number
# of layers, 32 or 40. A file with any other number (a pruned or a distilled Baichuan, or one trained from scratch) loads without a
# warning, and runs without positions: it generates fluent text of a worse model, and a tool that converts it reports success.
#
# Shown with models in which only the first layer does anything: without positions, exchanging two earlier tokens changes nothing in
# what follows the last one (but for the rounding of the cache to fp16).
# Seen on 1 December 2026 with Python 3.11 on Linux:
#   "32 layers: exchanging two tokens changes the next token's log-probability by 0.1 or more; 31 layers: by less than 0.01"
#
# What to do: pad the model with layers that add nothing, or use another runtime. In this project: a Baichuan model with another
# number of layers is not written as GGUF, with a sentence that says why.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
{
  "${PYTHON:-python3}" -m venv "$work/venv"
  "$work/venv/bin/pip" install --quiet xllamacpp==2026.10.11549 gguf==0.19.0 numpy
} >"$work/log" 2>&1 || { tail -3 "$work/log"; exit 2; }
cd "$work"
"$work/venv/bin/python" - 2>"$work/log" <<'PYTHON' || { status=$?; tail -3 "$work/log"; exit $status; }
import json
import sys
import urllib.request

import gguf
import numpy as np
import xllamacpp

WIDTH, INNER, HEADS, LETTERS = 64, 96, 4, [chr(code) for code in range(33, 127)]
TOKENS = ["<pad>", "<s>", "</s>", *LETTERS, "ab"]


def write(path, layers):
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "baichuan")
    writer.add_context_length(256)
    writer.add_block_count(layers)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 3 + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)

    def add(name, *shape, scale):
        writer.add_tensor(name, (random.standard_normal(shape) * scale).astype(np.float32))

    add("token_embd.weight", len(TOKENS), WIDTH, scale=1.0)
    add("output.weight", len(TOKENS), WIDTH, scale=0.5)
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    for layer in range(layers):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(WIDTH, np.float32))
        for name in ("attn_q", "attn_k", "attn_v"):
            add(f"blk.{layer}.{name}.weight", WIDTH, WIDTH, scale=0.3)
        add(f"blk.{layer}.attn_output.weight", WIDTH, WIDTH, scale=0.3 * (layer == 0))
        for name in ("ffn_gate", "ffn_up"):
            add(f"blk.{layer}.{name}.weight", INNER, WIDTH, scale=0.3)
        add(f"blk.{layer}.ffn_down.weight", WIDTH, INNER, scale=0.0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def changed(layers):
    """The largest change of a log-probability if two earlier tokens are exchanged."""
    write("model.gguf", layers)
    params = xllamacpp.CommonParams()
    params.model.path = "model.gguf"
    params.n_ctx, params.n_parallel, params.port, params.warmup = 256, 1, 0, False
    params.cpuparams.n_threads = 2
    server = xllamacpp.Server(params)
    found = []
    for prompt in ([10, 20, 30, 40, 50], [30, 20, 10, 40, 50]):
        body = {"prompt": prompt, "n_predict": 1, "temperature": 0, "n_probs": len(TOKENS), "cache_prompt": False}
        request = urllib.request.Request(
            f"{server.listening_address}/completion",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            step = json.load(answer)["completion_probabilities"][0]
        found.append({top["id"]: top["logprob"] for top in step["top_logprobs"]})
    del server
    first, second = found
    return max(abs(first[token] - second[token]) for token in first if token in second)


few, all_layers = changed(31), changed(32)
print(
    "32 layers: exchanging two tokens changes the next token's log-probability by "
    f"{'0.1 or more' if all_layers >= 0.1 else all_layers}; 31 layers: by "
    f"{'less than 0.01' if few < 0.01 else few}"
)
sys.exit(0 if all_layers >= 0.1 and few < 0.01 else 1)
PYTHON
