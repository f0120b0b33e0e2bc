"""Tiny random checkpoints of families that `transformers` lacks, with their forward pass.

Each forward pass is written from the published definition over the tensors of the file, one
sequence at a time, in the order of the authors' operations: residual scales, positions and masks
are those of their code, not of ours.
"""

import json
import math

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

VOCAB = 320
HIDDEN, HEADS, DIM, INNER = 64, 4, 16, 96


def random_tensors(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in shapes.items():
        near_one = "norm" in name and name.endswith("weight")
        values = torch.rand(shape, generator=generator)
        found[name] = 0.5 + values if near_one else (values - 0.5) * (0.6 if len(shape) > 1 else 1)
    return found


def write_folder(folder, config, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def attend(q, k, v, mask, bias=None):
    """Attention of [T, H, d] queries, keys and values under a [T, T] mask."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(q.shape[-1])
    scores = scores if bias is None else scores + bias
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("hij,jhd->ihd", weights, v).flatten(1)


def causal(n):
    return torch.ones(n, n).tril().bool()


def prefix_mask(n, context):
    mask = causal(n)
    mask[:, :context] = True
    return mask


def rotate_half(x, positions, theta=10000.0):
    """Rotates pairs (i, i + d/2) of `x: [T, H, d]`."""
    half = x.shape[-1] // 2
    speeds = theta ** (-torch.arange(half) / half)
    angles = (positions[:, None].float() * speeds).repeat(1, 2)[:, None]
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * angles.cos() + turned * angles.sin()


def rotate_adjacent(x, positions, theta=10000.0):
    """Rotates pairs (2i, 2i + 1) as complex numbers."""
    half = x.shape[-1] // 2
    angles = positions[:, None].float() * theta ** (-torch.arange(half) / half)
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]
    pairs = torch.view_as_complex(x.contiguous().view(*x.shape[:-1], half, 2))
    return torch.view_as_real(pairs * turns).flatten(-2)


def rms(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


class Layout:
    """One family: its config.json, the shapes of its tensors, and its logits."""

    prefix = 0
    """Tokens of the test's sequences that see each other in both directions."""

    def tensors(self):
        return random_tensors(self.shapes())

    def write(self, folder):
        return write_folder(folder, self.config, self.tensors())


class Baichuan(Layout):
    def __init__(self, *, layers=2, alibi=False, unit_head=False):
        self.alibi, self.unit_head, self.layers = alibi, unit_head, layers
        self.config = {
            "model_type": "baichuan",
            "architectures": ["BaichuanForCausalLM"],
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "intermediate_size": INNER,
            "num_hidden_layers": layers,
            "num_attention_heads": HEADS,
            "model_max_length": 128,
            "rms_norm_eps": 1e-6,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
        self.config |= {"z_loss_weight": 0} if unit_head else {}
        self.config |= {} if alibi else {"max_position_embeddings": 128}

    def shapes(self):
        shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "lm_head.weight": (VOCAB, HIDDEN)}
        for i in range(self.layers):
            layer = f"model.layers.{i}."
            shapes |= {
                f"{layer}self_attn.W_pack.weight": (3 * HIDDEN, HIDDEN),
                f"{layer}self_attn.o_proj.weight": (HIDDEN, HIDDEN),
                f"{layer}mlp.gate_proj.weight": (INNER, HIDDEN),
                f"{layer}mlp.up_proj.weight": (INNER, HIDDEN),
                f"{layer}mlp.down_proj.weight": (HIDDEN, INNER),
                f"{layer}input_layernorm.weight": (HIDDEN,),
                f"{layer}post_attention_layernorm.weight": (HIDDEN,),
            }
        return shapes | {"model.norm.weight": (HIDDEN,)}

    def logits(self, w, ids):
        x, n = w["model.embed_tokens.weight"][ids], len(ids)
        at, bias = torch.arange(n), None
        if self.alibi:  # slopes 1/4 .. 1/256 for 4 heads, times the position of the key
            bias = 2.0 ** -torch.tensor([2.0, 4, 6, 8])[:, None, None] * at.float()
        for i in range(self.layers):
            p = f"model.layers.{i}."
            start = rms(x, w[f"{p}input_layernorm.weight"], 1e-6)
            packed = start @ w[f"{p}self_attn.W_pack.weight"].T
            q, k, v = packed.unflatten(-1, (3, HEADS, DIM)).unbind(1)
            if not self.alibi:
                q, k = rotate_half(q, at), rotate_half(k, at)
            x = x + attend(q, k, v, causal(n), bias) @ w[f"{p}self_attn.o_proj.weight"].T
            start = rms(x, w[f"{p}post_attention_layernorm.weight"], 1e-6)
            gate = F.silu(start @ w[f"{p}mlp.gate_proj.weight"].T)
            x = (
                x
                + (gate * (start @ w[f"{p}mlp.up_proj.weight"].T)) @ w[f"{p}mlp.down_proj.weight"].T
            )
        x = rms(x, w["model.norm.weight"], 1e-6)
        head = w["lm_head.weight"]
        return x @ (F.normalize(head) if self.unit_head else head).T


class ChatGLM(Layout):
    """The last token of the prefix is [gMASK]; the token after it, sop, starts the block."""

    prefix = 11

    def __init__(self, layers=2):
        self.layers = layers
        self.config = {
            "model_type": "chatglm",
            "architectures": ["ChatGLMModel"],
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "inner_hidden_size": INNER,
            "num_layers": layers,
            "num_attention_heads": HEADS,
            "layernorm_epsilon": 1e-5,
            "max_sequence_length": 128,
            "position_encoding_2d": True,
            "bos_token_id": 312,
            "eos_token_id": 313,
            "pad_token_id": 3,
            "mask_token_id": 308,
            "gmask_token_id": 309,
        }

    def shapes(self):
        sizes = {
            "input_layernorm": (HIDDEN,),
            "attention.query_key_value": (3 * HIDDEN, HIDDEN),
            "attention.dense": (HIDDEN, HIDDEN),
            "post_attention_layernorm": (HIDDEN,),
            "mlp.dense_h_to_4h": (INNER, HIDDEN),
            "mlp.dense_4h_to_h": (HIDDEN, INNER),
        }
        shapes = {"transformer.word_embeddings.weight": (VOCAB, HIDDEN)}
        for i in range(self.layers):
            for name, shape in sizes.items():
                shapes[f"transformer.layers.{i}.{name}.weight"] = shape
                shapes[f"transformer.layers.{i}.{name}.bias"] = shape[:1]
        last = "transformer.final_layernorm"
        return shapes | {f"{last}.weight": (HIDDEN,), f"{last}.bias": (HIDDEN,)}

    def logits(self, w, ids):
        n, context = len(ids), self.prefix
        first = torch.arange(n)
        first[context:] = context - 1
        second = torch.cat([torch.zeros(context).long(), torch.arange(n - context) + 1])
        alpha = (2 * self.layers) ** 0.5

        def affine(x, name):
            return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

        def norm(x, name):
            return F.layer_norm(x, (HIDDEN,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

        def turned(x):
            a, b = x.chunk(2, dim=-1)
            return torch.cat([rotate_half(a, first), rotate_half(b, second)], -1)

        x = w["transformer.word_embeddings.weight"][ids]
        for i in range(self.layers):
            p = f"transformer.layers.{i}."
            start = norm(x, f"{p}input_layernorm")
            heads = affine(start, f"{p}attention.query_key_value").view(n, HEADS, 3 * DIM)
            q, k, v = heads.split(DIM, dim=-1)
            mixed = attend(turned(q), turned(k), v, prefix_mask(n, context))
            x = start * alpha + affine(mixed, f"{p}attention.dense")
            start = norm(x, f"{p}post_attention_layernorm")
            inner = F.gelu(affine(start, f"{p}mlp.dense_h_to_4h"), approximate="tanh")
            x = start * alpha + affine(inner, f"{p}mlp.dense_4h_to_h")
        return norm(x, "transformer.final_layernorm") @ w["transformer.word_embeddings.weight"].T


class ChatGLM2(Layout):
    def __init__(self, *, layers=2, ratio=1, name="THUDM/chatglm3-6b"):
        self.layers, self.ratio, self.by_base = layers, ratio, "chatglm2" not in name
        self.config = {
            "_name_or_path": name,
            "model_type": "chatglm",
            "architectures": ["ChatGLMModel"],
            "padded_vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "ffn_hidden_size": INNER,
            "num_layers": layers,
            "num_attention_heads": HEADS,
            "kv_channels": DIM,
            "multi_query_attention": True,
            "multi_query_group_num": 2,
            "add_qkv_bias": True,
            "add_bias_linear": False,
            "rmsnorm": True,
            "post_layer_norm": True,
            "apply_residual_connection_post_layernorm": False,
            "original_rope": True,
            "layernorm_epsilon": 1e-5,
            "seq_length": 128,
            "rope_ratio": ratio,
            "tie_word_embeddings": False,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }

    def shapes(self):
        shapes = {"transformer.embedding.word_embeddings.weight": (VOCAB, HIDDEN)}
        width = (HEADS + 2 * 2) * DIM
        for i in range(self.layers):
            p = f"transformer.encoder.layers.{i}."
            shapes |= {
                f"{p}input_layernorm.weight": (HIDDEN,),
                f"{p}self_attention.query_key_value.weight": (width, HIDDEN),
                f"{p}self_attention.query_key_value.bias": (width,),
                f"{p}self_attention.dense.weight": (HIDDEN, HIDDEN),
                f"{p}post_attention_layernorm.weight": (HIDDEN,),
                f"{p}mlp.dense_h_to_4h.weight": (2 * INNER, HIDDEN),
                f"{p}mlp.dense_4h_to_h.weight": (HIDDEN, INNER),
            }
        shapes["transformer.encoder.final_layernorm.weight"] = (HIDDEN,)
        return shapes | {"transformer.output_layer.weight": (VOCAB, HIDDEN)}

    def logits(self, w, ids):
        n = len(ids)
        at = torch.arange(n) / (1 if self.by_base else self.ratio)
        theta = 10000.0 * (self.ratio if self.by_base else 1)

        def turned(x):
            half = x.shape[-1] // 2
            return torch.cat([rotate_adjacent(x[..., :half], at, theta), x[..., half:]], -1)

        x = w["transformer.embedding.word_embeddings.weight"][ids]
        for i in range(self.layers):
            p = f"transformer.encoder.layers.{i}."
            fused = f"{p}self_attention.query_key_value"
            start = rms(x, w[f"{p}input_layernorm.weight"], 1e-5)
            heads = F.linear(start, w[f"{fused}.weight"], w[f"{fused}.bias"]).view(n, -1, DIM)
            q, k, v = heads.split((HEADS, 2, 2), dim=1)
            mixed = attend(turned(q), turned(k), v, causal(n))
            x = x + mixed @ w[f"{p}self_attention.dense.weight"].T
            start = rms(x, w[f"{p}post_attention_layernorm.weight"], 1e-5)
            gate, up = (start @ w[f"{p}mlp.dense_h_to_4h.weight"].T).chunk(2, dim=-1)
            x = x + (F.silu(gate) * up) @ w[f"{p}mlp.dense_4h_to_h.weight"].T
        x = rms(x, w["transformer.encoder.final_layernorm.weight"], 1e-5)
        return x @ w["transformer.output_layer.weight"].T


class GLM(Layout):
    """The blank-infilling model with two learned positions."""

    prefix = 9

    def __init__(self, layers=2):
        self.layers = layers
        self.config = {
            "model_type": "glm",
            "architectures": ["GLMForConditionalGeneration"],
            "block_position_encoding": True,
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "num_layers": layers,
            "num_attention_heads": HEADS,
            "max_sequence_length": 128,
        }

    def shapes(self):
        sizes = {
            "input_layernorm": (HIDDEN,),
            "attention.query_key_value": (3 * HIDDEN, HIDDEN),
            "attention.dense": (HIDDEN, HIDDEN),
            "post_attention_layernorm": (HIDDEN,),
            "mlp.dense_h_to_4h": (4 * HIDDEN, HIDDEN),
            "mlp.dense_4h_to_h": (HIDDEN, 4 * HIDDEN),
        }
        inside = "glm.transformer."
        shapes = {
            "glm.word_embeddings.weight": (VOCAB, HIDDEN),
            f"{inside}position_embeddings.weight": (129, HIDDEN),
            f"{inside}block_position_embeddings.weight": (129, HIDDEN),
        }
        for i in range(self.layers):
            for name, shape in sizes.items():
                shapes[f"{inside}layers.{i}.{name}.weight"] = shape
                shapes[f"{inside}layers.{i}.{name}.bias"] = shape[:1]
        last = f"{inside}final_layernorm"
        return shapes | {f"{last}.weight": (HIDDEN,), f"{last}.bias": (HIDDEN,)}

    def logits(self, w, ids):
        n, context, inside = len(ids), self.prefix, "glm.transformer."
        first = torch.arange(n)
        first[context:] = context - 1
        second = torch.cat([torch.zeros(context).long(), torch.arange(n - context) + 1])

        def affine(x, name):
            return F.linear(x, w[f"{inside}{name}.weight"], w[f"{inside}{name}.bias"])

        def norm(x, name):
            name = f"{inside}{name}"
            return F.layer_norm(x, (HIDDEN,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

        x = w["glm.word_embeddings.weight"][ids]
        x = x + w[f"{inside}position_embeddings.weight"][first]
        x = x + w[f"{inside}block_position_embeddings.weight"][second]
        for i in range(self.layers):
            p = f"layers.{i}."
            packed = affine(norm(x, f"{p}input_layernorm"), f"{p}attention.query_key_value")
            q, k, v = packed.view(n, 3, HEADS, DIM).unbind(1)
            x = x + affine(attend(q, k, v, prefix_mask(n, context)), f"{p}attention.dense")
            start = norm(x, f"{p}post_attention_layernorm")
            inner = F.gelu(affine(start, f"{p}mlp.dense_h_to_4h"), approximate="tanh")
            x = x + affine(inner, f"{p}mlp.dense_4h_to_h")
        return norm(x, "final_layernorm") @ w["glm.word_embeddings.weight"].T


LAYOUTS = {
    "baichuan 7B": Baichuan(),
    "baichuan 13B": Baichuan(alibi=True),
    "baichuan2 7B": Baichuan(unit_head=True),
    "baichuan2 13B": Baichuan(alibi=True, unit_head=True),
    "chatglm": ChatGLM(),
    "chatglm2": ChatGLM2(),
    "chatglm2 32k": ChatGLM2(ratio=16, name="THUDM/chatglm2-6b-32k"),
    "chatglm3 32k": ChatGLM2(ratio=50, name="THUDM/chatglm3-6b-32k"),
    "glm": GLM(),
}
