"""Writes models of `transformers` as GGUF files, as llama.cpp's converter does."""

import re
import tempfile
from collections import defaultdict

import gguf
import numpy as np
import torch
from safetensors.torch import load_file

ADDED_ONE = {"gemma", "gemma2", "gemma3"}
"""Architectures whose converter adds 1 to the weights of norms."""


TRANSPOSED = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")


def interleaved(weight, heads):
    """Returns query and key rows in llama.cpp's order, as its converter writes them."""
    split = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(weight.shape))


def stacked(reference):
    """Returns the state of a mixture as the converter writes it: experts stacked by projection."""
    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(folder)
        state = load_file(f"{folder}/model.safetensors")
    experts = defaultdict(dict)
    for name in list(state):
        if found := re.fullmatch(r"(.*\.experts)\.(\d+)\.(.*)", name):
            experts[f"{found[1]}.{found[3]}"][int(found[2])] = state.pop(name)
    stacks = {
        name: torch.stack([parts[i] for i in sorted(parts)]) for name, parts in experts.items()
    }
    return state | stacks


def tensors_of(reference, arch):
    """Returns the name and values of each tensor, as in a GGUF file."""
    config = reference.config
    number = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    state = (
        stacked(reference)
        if "moe" in config.model_type or config.model_type == "mixtral"
        else reference.state_dict()
    )
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    for name, value in state.items():
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        array = value.float().numpy()
        if arch == "llama":
            heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
            part = name.split(".")[-2]
            array = interleaved(array, heads[part]) if part in heads else array
        if arch in ADDED_ONE and "norm" in theirs:
            array = array + 1
        if arch == "gpt2" and name.endswith("weight") and theirs.split(".")[-2] in TRANSPOSED:
            array = np.ascontiguousarray(array.T)
        yield theirs, array


def write(path, reference, arch, keys=(), extra=(), part=None):
    """Writes the model as a GGUF file.

    Args:
        path: the file to write.
        reference: the model of `transformers`.
        arch: llama.cpp's name of the architecture.
        keys: additional metadata.
        extra: additional tensors.
        part: (number, count) of a split file.
    """
    config = reference.config
    writer = gguf.GGUFWriter(path, arch)
    if part is None or part[0] == 0:
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_head_count(config.num_attention_heads)
        writer.add_vocab_size(config.vocab_size)
        if arch == "gpt2":
            writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
            writer.add_layer_norm_eps(config.layer_norm_epsilon)
        else:
            writer.add_feed_forward_length(config.intermediate_size)
            if arch == "starcoder2":
                writer.add_layer_norm_eps(config.norm_epsilon)
            else:
                writer.add_layer_norm_rms_eps(config.rms_norm_eps)
            writer.add_head_count_kv(config.num_key_value_heads)
            rope = config.rope_parameters.get("full_attention", config.rope_parameters)
            writer.add_rope_freq_base(rope["rope_theta"])
            head_dim = getattr(config, "head_dim", None)
            if head_dim:
                writer.add_key_length(head_dim)
                writer.add_value_length(head_dim)
        for key, value in dict(keys).items():
            add = {bool: writer.add_bool, float: writer.add_float32, int: writer.add_uint32}
            add.get(type(value), writer.add_string)(f"{arch}.{key}", value)
    tensors = [*tensors_of(reference, arch), *extra]
    if part is not None:
        writer.add_uint16("split.no", part[0])
        writer.add_uint16("split.count", part[1])
        writer.add_int32("split.tensors.count", len(tensors))
        tensors = tensors[part[0] :: part[1]]
    for name, array in tensors:
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
