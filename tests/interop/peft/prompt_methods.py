"""Prompt tuning, P-Tuning and prefix tuning exchanged with peft, and trained by both."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from exchange import BASE as LLAMA
from figures import Figures
from peft import (
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

import easyllm.adapters as ours
from easyllm.batches.packing import pack
from easyllm.examples.sample import Sample
from easyllm.models import hf_module_name, load_model
from easyllm.train.objectives import LanguageModel

BOUND, LOSS_BOUND, STEPS = 1e-5, 1e-4, 20
IDS = torch.arange(5, 45)
GPT2 = {"vocab_size": 320, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 128}
GEMMA = LLAMA | {"head_dim": 12, "query_pre_attn_scalar": 12, "tie_word_embeddings": True}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "gpt2": GPT2 | {"pad_token_id": 0, "initializer_range": 0.1},
    "gemma2": GEMMA | {"sliding_window": 8},
    "qwen3": LLAMA | {"head_dim": 16},
    "mixtral": LLAMA | {"num_local_experts": 4},
}


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method as peft and as this project configure it."""

    theirs: type
    ours: Any
    keys: dict[str, Any] = field(default_factory=dict)


SIZE = {"encoder_hidden_size": 32}
METHODS = {
    "prompt tuning": Method(
        theirs=PromptTuningConfig, ours=ours.PromptTuningConfig(num_virtual_tokens=5)
    ),
    "P-Tuning, MLP": Method(
        theirs=PromptEncoderConfig,
        keys=SIZE,
        ours=ours.PTuningConfig(num_virtual_tokens=5, encoder_hidden_size=32),
    ),
    "P-Tuning, LSTM": Method(
        theirs=PromptEncoderConfig,
        keys=SIZE | {"encoder_reparameterization_type": "LSTM"},
        ours=ours.PTuningConfig(num_virtual_tokens=5, encoder="lstm", encoder_hidden_size=32),
    ),
    "prefix tuning": Method(
        theirs=PrefixTuningConfig, ours=ours.PrefixTuningConfig(num_virtual_tokens=5)
    ),
    "prefix tuning, MLP": Method(
        theirs=PrefixTuningConfig,
        keys=SIZE | {"prefix_projection": True},
        ours=ours.PrefixTuningConfig(num_virtual_tokens=5, projection=True, encoder_hidden_size=32),
    ),
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another number of tokens": ({"num_virtual_tokens": 4}, "prompt_embeddings has 5 rows"),
    "an unknown key": ({"prompt_temperature": 2.0}, "prompt_temperature"),
    "two submodules": ({"num_transformer_submodules": 2}, "num_transformer_submodules"),
    "another base": ({"num_layers": 3}, "num_layers"),
}


def compare(figures: Figures, work: Path) -> None:
    """Runs all comparisons, with files in `work`."""
    print("prompt methods: largest difference of logits, both ways")
    for name, method in METHODS.items():
        for family in FAMILIES:
            case = f"{name}, {family}"
            figures.run(
                case, lambda c=case, m=method, f=family: exchange(figures, c, m, f, work / c)
            )
        if method.theirs is PrefixTuningConfig:
            continue  # peft 0.21.2 refuses a prefix on the classifiers of transformers 5.24
        case = f"{name}, classifier"
        figures.run(
            case, lambda c=case, m=method: exchange(figures, c, m, "llama", work / c, labels=3)
        )
    print("prompt methods: refused by name")
    for name, (keys, word) in REFUSED.items():
        figures.run(name, lambda n=name, k=keys, w=word: refuse(figures, n, k, w, work / n))
    print(f"prompt methods: largest difference of losses in {STEPS} steps")
    for name, method in METHODS.items():
        figures.run(name, lambda n=name, m=method: train(figures, n, m, work / f"trained {n}"))


def exchange(
    figures: Figures, name: str, method: Method, family: str, folder: Path, labels: int = 0
) -> None:
    """Compares logits of an adapter made by peft and read here, and the other way round."""
    adapted = made_by_peft(method, family, folder, labels)
    expected = their_logits(adapted)
    model = load_model(folder / "base", adapter=folder / "adapter", dtype="float32")
    figures.at_most(name, float((our_logits(model) - expected).abs().max()), BOUND)
    base = their_logits(reopened(folder, labels))
    if float((base - expected).abs().max()) < 100 * BOUND:
        raise ValueError("the adapter changes nothing, so the figure says nothing")
    model = load_model(folder / "base", dtype="float32")
    if labels:  # the head of the base
        model = load_model(folder / "base", adapter=folder / "adapter", dtype="float32")
        ours.detach(model)
    adapters = ours.attach(model, method.ours, seed=1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapters.trained_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    got = our_logits(model)
    where = hf_module_name(model)
    ours.save_adapter(model, folder / "ours", module_name=where, base=str(folder / "base"))
    reference = PeftModel.from_pretrained(reopened(folder, labels), folder / "ours").eval()
    difference = float((got - their_logits(reference)).abs().max())
    figures.at_most(f"{name}, to peft", difference, BOUND)


def refuse(figures: Figures, name: str, keys: dict[str, Any], word: str, folder: Path) -> None:
    made_by_peft(METHODS["prompt tuning"], "llama", folder)
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    figures.refused(
        name, lambda: load_model(folder / "base", adapter=folder / "adapter"), names=word
    )


def train(figures: Figures, name: str, method: Method, folder: Path) -> None:
    """Compares losses of training from the same values on the same data, and the final files."""
    reference = made_by_peft(method, "llama", folder).train()
    model = load_model(folder / "base", dtype="float32")
    adapters = ours.attach(model, method.ours)
    copy_start(reference, adapters.model_adapter)
    mine = list(adapters.trained_parameters(model).values())
    theirs = [p for p in reference.parameters() if p.requires_grad]
    optimizers = [torch.optim.AdamW(part, lr=1e-2, weight_decay=0.01) for part in (mine, theirs)]
    generator = torch.Generator().manual_seed(3)
    differences, first, loss = list[float](), 0.0, 0.0
    for _ in range(STEPS):
        ids = torch.randint(3, 320, (30,), generator=generator)
        mask = [False] * 10 + [True] * 20
        batch = pack([Sample.from_mask(ids.tolist(), mask)])
        ours_loss = LanguageModel().loss(model, batch).sum / 20
        labels = ids.masked_fill(~torch.tensor(mask), -100)
        their_loss = reference(input_ids=ids[None], labels=labels[None]).loss
        loss = float(ours_loss.detach())
        differences.append(abs(loss - float(their_loss.detach())))
        first = first or loss
        for each, optimizer in zip((ours_loss, their_loss), optimizers, strict=True):
            optimizer.zero_grad()
            each.backward()
            optimizer.step()
    figures.at_most(name, max(differences), LOSS_BOUND)
    table = adapters.own_tensors()["prompt_embeddings"]
    theirs_table = reference.get_prompt_embedding_to_save("default")
    figures.at_most(f"{name}, tables", float((table - theirs_table).abs().max()), LOSS_BOUND)


@torch.no_grad()
def copy_start(reference: Any, adapter: Any) -> None:
    """Copies the parameters of peft's encoder, which has them in the same order."""
    values = dict(reference.prompt_encoder["default"].named_parameters())
    order = sorted(values, key=lambda n: not n.startswith("embedding"))
    parameters = [p for _, p in sorted(adapter.named_parameters(), key=_embedding_first)]
    for parameter, name in zip(parameters, order, strict=True):
        parameter.copy_(values[name])


def _embedding_first(entry: tuple[str, nn.Parameter]) -> bool:
    return not entry[0].endswith("embedding")


# ---- models


def made_by_peft(method: Method, family: str, folder: Path, labels: int = 0) -> Any:
    """Returns a model adapted by peft; writes the files of base and adapter."""
    torch.manual_seed(0)
    values = FAMILIES[family] | ({"num_labels": labels} if labels else {})
    model = kind_of(labels).from_config(AutoConfig.for_model(family, **values))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder / "base")
    task = "SEQ_CLS" if labels else "CAUSAL_LM"
    config = method.theirs(task_type=task, num_virtual_tokens=5, **method.keys)
    adapted = get_peft_model(reopened(folder, labels), config).eval()
    adapted.save_pretrained(folder / "adapter")
    return adapted


def reopened(folder: Path, labels: int = 0) -> Any:
    """Returns the base model in a folder, in fp32."""
    return kind_of(labels).from_pretrained(folder / "base", dtype=torch.float32).eval()


def kind_of(labels: int) -> Any:
    return AutoModelForSequenceClassification if labels else AutoModelForCausalLM


@torch.no_grad()
def their_logits(model: Any) -> Tensor:
    """Returns the logits of the real tokens, [T, V] (peft prepends the virtual ones); or labels."""
    out: Tensor = model(input_ids=IDS[None]).logits[0]
    return out[-len(IDS) :] if out.ndim == 2 else out


def our_logits(model: Any) -> Tensor:
    out: Tensor = model.logits(IDS)
    return out if model.config.num_labels is None else out[-1]
