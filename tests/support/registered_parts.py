"""User-defined parts: adapters, a storage format, an objective and a model family.

None of them is part of the package; `test_extension_points` registers each with one call.
"""

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from easyllm.adapters import (
    Adapter,
    AdapterConfig,
    AdapterSet,
)
from easyllm.adapters.peft_keys import check_keys
from easyllm.core.errors import CheckpointError
from easyllm.examples.data_file import read_rows
from easyllm.examples.prepare import PreparationStats
from easyllm.examples.sample import Sample, SampleGroup
from easyllm.models.families import llama
from easyllm.models.families.family import Family, llama_keymap
from easyllm.models.families.gguf_layout import GGUFLayout
from easyllm.nn.storage import PackedStorage
from easyllm.train.data_config import RowsConfig
from easyllm.train.objectives import (
    LossOutput,
    Objective,
    ObjectiveConfig,
)

# ---- 1. an adapter whose forward uses the weight, with a trained parameter across its modules


class WeightNormConfig(AdapterConfig):
    """Rows of the weight are slightly rotated; their norms are trained.

    As in DoRA, times a number that all linears share.
    """

    kind: Literal["test_weight_norm"] = "test_weight_norm"
    rank: int = 2

    def build(self, name, in_features, out_features):
        return WeightNorm(self.rank, in_features, out_features)

    def to_peft(self, modules):
        return {"test_rank": self.rank}

    @classmethod
    def from_peft(cls, description, modules):
        check_keys(description, honoured=("test_rank",), neutral={"bias": "none"})
        return cls(rank=description["test_rank"], targets=tuple(modules))


class WeightNorm(Adapter):
    passes_input_unchanged = True

    def __init__(self, rank, in_features, out_features):
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, in_features))
        self.up = nn.Parameter(torch.empty(out_features, rank))
        self.length = nn.Parameter(torch.empty(out_features))  # the additional trained parameter

    def reset_parameters(self, generator):
        nn.init.normal_(self.down, std=0.1, generator=generator)
        nn.init.zeros_(self.up)
        nn.init.zeros_(self.length)

    def _scale(self, weight):
        moved = weight.float() + self.up @ self.down
        # without gradient through the norm, as in DoRA
        ratio = weight.float().norm(dim=1) / moved.norm(dim=1)
        return ratio.detach() * self.length.exp()

    def forward(self, x, base):
        y = base(x)
        bias = 0 if base.layer.bias is None else base.layer.bias
        return (y - bias + x @ self.down.T @ self.up.T) * self._scale(base.weight) + bias

    def merged(self, weight, bias):
        moved = weight + self.up @ self.down
        return moved * self._scale(weight)[:, None], bias

    def file_tensors(self):
        return {
            "test_down.weight": self.down,
            "test_up.weight": self.up,
            "test_length": self.length,
        }


# ---- 2. an input-side adapter: the base GEMM is computed once, on the scaled input


class InputScaleConfig(AdapterConfig):
    kind: Literal["test_input_scale"] = "test_input_scale"

    def build(self, name, in_features, out_features):
        return InputScale(in_features)

    @classmethod
    def from_peft(cls, description, modules):
        check_keys(description, honoured=(), neutral={"bias": "none"})
        return cls(targets=tuple(modules))


class InputScale(Adapter):
    def __init__(self, in_features):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(in_features))

    def reset_parameters(self, generator):
        nn.init.ones_(self.scale)

    def forward(self, x, base):
        return base(x * self.scale.to(x.dtype))

    def merged(self, weight, bias):
        return weight * self.scale, bias

    def file_tensors(self):
        return {"test_scale": self.scale}


# ---- 3. virtual tokens with separate keys and values: a method of the complete model


class PromptConfig(AdapterConfig):
    kind: Literal["test_prompt"] = "test_prompt"
    level = "model"
    tokens: int = 3

    def build_model_adapter(self, model):
        return Prompt(self.tokens, model)

    def merge_unsupported_reason(self):
        return "virtual tokens are no weights"

    def to_peft(self, modules):
        return {"num_virtual_tokens": self.tokens}

    @classmethod
    def from_peft(cls, description, modules):
        check_keys(description, honoured=("num_virtual_tokens",), neutral={"bias": "none"})
        return cls(tokens=description["num_virtual_tokens"])

    def num_parameters_of_model(self, model):
        with torch.device("meta"):
            return sum(p.numel() for p in Prompt(self.tokens, model).parameters())


class Prompt(nn.Module):
    def __init__(self, tokens, model):
        super().__init__()
        mixer = model.layers[-1].mixer
        self.num_virtual, self.num_layers = tokens, model.num_layers
        self.prompt_embeddings = nn.Parameter(torch.empty(tokens, model.hidden_size))
        self.last_keys = nn.Parameter(torch.empty(tokens, mixer.num_kv_heads, mixer.head_dim))

    def reset_parameters(self, generator):
        nn.init.normal_(self.prompt_embeddings, std=0.5, generator=generator)
        nn.init.normal_(self.last_keys, std=0.5, generator=generator)

    def vectors(self):
        return self.prompt_embeddings

    def keys_values(self):
        return [None] * (self.num_layers - 1) + [(self.last_keys, self.last_keys.flip(0))]


# ---- 4. weights in 8-bit floats, stored as three tensors each


class Float8(PackedStorage):
    format = "test_float8"

    def __init__(self, codes, scale, dtype):
        super().__init__(tuple(codes.shape), dtype)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)

    def linear(self, x, bias=None, *, deterministic=False):
        return super().linear(x, bias, deterministic=deterministic)

    def dense(self):
        return (self.codes.float() * self.scale[:, None]).to(self.dtype)

    def tensors(self):
        return {
            "weight": self.codes,
            "weight_scale": self.scale,
            "weight_shape": torch.tensor(self.shape),
        }


def to_float8(weight, name):
    scale = weight.float().abs().amax(1).clamp(min=1e-12) / 448
    return Float8((weight.float() / scale[:, None]).to(torch.float8_e4m3fn), scale, weight.dtype)


def from_float8_file(tensors, shape, dtype):
    if tuple(tensors["weight_shape"].tolist()) != tuple(shape):
        raise CheckpointError(f"weight_shape is {tensors['weight_shape'].tolist()}, not {shape}")
    return Float8(tensors["weight"], tensors["weight_scale"], dtype)


# ---- 5. an objective on pairs, with extras and a reference model


class PairsData(RowsConfig):
    kind: Literal["test_pairs"] = "test_pairs"
    train: tuple[str, ...]


class PairLossConfig(ObjectiveConfig):
    kind: Literal["test_pair_loss"] = "test_pair_loss"
    beta: float = 0.5


class PairLoss(Objective):
    """-log σ(β (Δ_better - Δ_worse)), Δ: log-ratio to the reference (arXiv 2305.18290, eq. 7)."""

    needs_reference = True

    def __init__(self, config):
        self.config = config

    def prepare(self, data, files, tokenizer):
        samples, account = [], PreparationStats()
        for file in files:
            for row in read_rows(file):
                pair = []
                for side, sign in (("chosen", 1.0), ("rejected", -1.0)):
                    prompt, answer = (tokenizer.encode(row.values[k]) for k in ("prompt", side))
                    ids = prompt + answer
                    mask = [False] * len(prompt) + [True] * len(answer)
                    plain = Sample.from_mask(ids, mask)
                    places = torch.arange(plain.num_tokens)
                    extras = {"sign": sign, "weight": row.values["weight"], "place": places}
                    pair.append(Sample(plain.token_ids, plain.labels, extras))
                samples.append(SampleGroup(tuple(pair)))
                account.samples += 1
                account.tokens += samples[-1].num_tokens
        return samples, account

    def num_terms(self, batch):
        return int((batch.extras["sign"] > 0).sum())

    def loss(self, model, batch):
        assert torch.equal(batch.extras["place"], batch.positions)  # packed with their tokens
        pairs = len(batch.extras["sign"]) // 2  # a padding sequence has no partner
        hidden = model(batch.token_ids, batch.context())
        ours = summed(model, hidden, batch)[: 2 * pairs].view(pairs, 2)
        theirs = self.reference.hidden(batch)
        base = summed(self.reference, theirs, batch)[: 2 * pairs].view(pairs, 2)
        margin = self.config.beta * ((ours - base) @ torch.tensor([1.0, -1.0]))
        weight = batch.extras["weight"].view(-1)[: 2 * pairs : 2]
        total = -(F.logsigmoid(margin) * weight).sum()
        return LossOutput(total, pairs, metrics={"margin": float(margin.detach().mean())})


def summed(model, hidden, batch):
    """Returns the summed log-probability [S] of each sequence's labels."""
    rows = F.cross_entropy(model.head(hidden), batch.labels, reduction="none", ignore_index=-100)
    return -torch.stack([part.sum() for part in rows.split(batch.lengths)])


# ---- 6. a family with its own names in GGUF files


def family_read_config(hf):
    return llama.read_config(hf).changed(family="test_family")


def family_write_config(config):
    return llama.write_config(config) | {"model_type": "test_family"}


def family_read_gguf(metadata):
    heads = metadata.need("heads")
    return {
        "model_type": "test_family",
        "hidden_size": metadata.need("width"),
        "intermediate_size": metadata.need("inner"),
        "num_hidden_layers": metadata.need("layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get("kv_heads", heads),
        "head_dim": metadata.need("head_dim"),
        "max_position_embeddings": metadata.need("context_length"),
        "rms_norm_eps": metadata.need("eps"),
        "tie_word_embeddings": True,
    }


TEST_FAMILY = Family(
    name="test_family",
    model_types=("test_family",),
    read_config=family_read_config,
    write_config=family_write_config,
    keymap=llama_keymap,
    gguf=GGUFLayout(
        architectures=("testarch",),
        read_config=family_read_gguf,
        names={
            "words": "model.embed_tokens",
            "last": "model.norm",
            **{f"t.{{i}}.{p}": f"model.layers.{{i}}.self_attn.{p}_proj" for p in "qkvo"},
            **{f"t.{{i}}.{p}": f"model.layers.{{i}}.mlp.{p}_proj" for p in ("gate", "up", "down")},
            "t.{i}.n1": "model.layers.{i}.input_layernorm",
            "t.{i}.n2": "model.layers.{i}.post_attention_layernorm",
        },
        transforms={"t.{i}.down": lambda tensor, _config: tensor / 2},
    ),
)


class CountingSet(AdapterSet):
    """A set with its own state: gradient sums after each backward pass, and a term of the loss."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.seen, self.steps = torch.zeros(2), 0

    def after_backward(self, progress):
        total = sum(float(a.scale.grad.abs().sum()) for _, a in self.linears.values())
        self.seen = self.seen + torch.tensor([total, progress.step])

    def after_step(self, progress):
        self.steps += 1

    def loss(self):
        return 0.01 * sum((a.scale - 1).square().sum() for _, a in self.linears.values())

    def state(self):
        return {"seen": self.seen, "steps": torch.tensor(self.steps)}

    def load_state(self, tensors):
        self.seen, self.steps = tensors["seen"], int(tensors["steps"])


ADAPTERS = {
    "test_weight_norm": {"kind": "test_weight_norm", "rank": 3},
    "test_input_scale": {"kind": "test_input_scale"},
    "test_prompt": {"kind": "test_prompt", "tokens": 4},
}
