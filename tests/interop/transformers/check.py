"""The newest `transformers` compared with this project: logits, tokenizers and chat templates.

`make test` compares with the release pinned in `constraints.txt`; what passes in both behaves the
same in the two releases.
"""

import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from figures import Figures
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import (
    AddedToken,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Tokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)
from transformers.utils import logging

from easyllm.models import load_model, load_tokenizer, save_model

BOUND = 3e-5
BASE: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.15,
}
GPT2: dict[str, Any] = {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 128}
GPT2 |= {"vocab_size": 211, "pad_token_id": 0, "initializer_range": 0.15}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 40, "num_experts": 6}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, Llama 3's factors": ("llama", {"rope_scaling": LLAMA3, "rope_theta": 5e5}),
    "llama, YaRN": ("llama", {"rope_scaling": YARN}),
    "llama, linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "mistral, window": ("mistral", {"sliding_window": 9}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "qwen2": ("qwen2", {}),
    "qwen2_moe": ("qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 56}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3_moe": ("qwen3_moe", EXPERTS | {"head_dim": 16, "norm_topk_prob": True}),
    "gemma": ("gemma", {"head_dim": 16, "initializer_range": 0.1}),
    "gemma2": ("gemma2", {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 9}),
    "glm4": ("glm4", {"head_dim": 16, "attention_bias": True}),
    "gpt2": ("gpt2", GPT2),
}
TEXTS = (
    "Hello world, it's 2026-11-29: 1,234.5 + 67!",
    "你好，世界！价格￥67.89元，第12章。",
    "  two  spaces\n\n\tand a tab ",
    "<tool>x</tool> a <tool>  b<s>c</s> <|end|> d<|end|>",
    "naïve café e\u0301 Привет 🙂👩‍👩‍👧 \u00a0x",
    "",
)
CONVERSATIONS: tuple[list[dict[str, Any]], ...] = (
    [{"role": "user", "content": "hello, 世界"}],
    [
        {"role": "system", "content": " Be brief. \n"},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": '<b>&"quoted"\'s</b>'},
    ],
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Das Wetter – 天气 <now>",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
TEMPLATES = {
    "trimmed blocks": (
        "{%- for m in messages %}\n    {%- if m.role == 'system' %}\n        {{- '[S]' + "
        "m.content | trim }}\n"
        "    {%- else %}\n        {{- '[' + m['role'] + ']' ~ m.content }}\n    {%- endif "
        "%}\n{% endfor %}\nend\n"
        "{% if add_generation_prompt %}\n  {{ '[assistant]' }}\n{% endif %}"
    ),
    "tools as JSON": (
        "{% if tools %}{{ tools | tojson }}{{ tools | tojson(indent=2) }}{% endif %}"
        "{% for m in messages %}{{ bos_token if loop.first }}{{ m.content }}{{ eos_token "
        "}}{% endfor %}"
    ),
    "namespace, break, continue": (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% if m.role == 'system' %}{% "
        "continue %}{% endif %}"
        "{% set ns.n = ns.n + 1 %}{{ ns.n }}:{{ m.content }};{% if ns.n == 2 %}{% break %}{% "
        "endif %}{% endfor %}"
    ),
    "generation": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content "
        "}}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}|{% endfor %}"
    ),
    "strings, lists, tests": (
        "{{ messages | length }} {{ messages[-1].content.split(' ')[0] }} {{ "
        "messages[0].role.upper() }}"
        "{{ messages | map(attribute='role') | join('/') }} {{ messages[0].tool_calls is defined }}"
        "{{ messages[::-1][0].content | replace('1', 'one') }} {{ (messages | "
        "first).content.startswith('h') }}"
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }} {{ none is "
        "none }} {{ 7 // 2 }}"
    ),
}


def main() -> int:
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    figures = Figures("torch", "transformers", "tokenizers", "jinja2", "huggingface_hub")
    print(f"make test holds {pinned('transformers')} against the same")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        print("logits: largest difference read from there, and written for there")
        for name, (family, values) in FAMILIES.items():
            figures.run(name, lambda n=name, f=family, v=values: logits(figures, n, f, v, work / n))
        figures.run("scores of labels", lambda: scores(figures, work / "scores"))
        print("tokenizers: ids, and text from ids")
        for name, make in TOKENIZERS.items():
            figures.run(name, lambda n=name, m=make: tokens(figures, n, m(work), work / f"{n} t"))
        print("chat templates: ids")
        for name, template in TEMPLATES.items():
            figures.run(name, lambda n=name, t=template: chats(figures, n, t, work / f"{n} c"))
        figures.run("SmolLM2", lambda: smollm2(figures, work / "smollm2"))
    return figures.end()


@torch.no_grad()
def logits(figures: Figures, name: str, family: str, values: dict[str, Any], folder: Path) -> None:
    torch.manual_seed(0)
    base = {} if family == "gpt2" else BASE
    config = AutoConfig.for_model(family, **base | values)
    reference = AutoModelForCausalLM.from_config(config).eval()
    for parameter_name, parameter in reference.named_parameters():
        if "norm" in parameter_name or parameter.ndim == 1:
            parameter.uniform_(0.5, 1.5)
    reference.save_pretrained(folder / "theirs")
    ids = torch.randint(3, 211, (60,))
    expected = reference(ids[None]).logits[0]
    model = load_model(folder / "theirs")
    save_model(model, folder / "ours")
    again = AutoModelForCausalLM.from_pretrained(folder / "ours").eval()
    there = float((again(ids[None]).logits[0] - expected).abs().max())
    here = float((model.logits(ids) - expected).abs().max())
    figures.at_most(name, here, BOUND)
    figures.at_most(f"{name}, saved", there, BOUND)


@torch.no_grad()
def scores(figures: Figures, folder: Path) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **BASE, num_labels=3)
    reference = AutoModelForSequenceClassification.from_config(config).eval()
    reference.save_pretrained(folder)
    ids = torch.randint(3, 211, (20,))
    got = load_model(folder).logits(ids)[-1]
    figures.at_most(
        "scores of labels", float((got - reference(ids[None]).logits[0]).abs().max()), BOUND
    )


# ---- tokenizers


def trained(**pre: Any) -> Backend:
    """Returns a trained byte-level BPE vocabulary."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, **pre)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(list(TEXTS) * 8, trainer)
    return backend


def vocabulary() -> dict[str, Any]:
    """Returns the same as arguments of the model-specific tokenizer classes."""
    model = json.loads(trained().to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(pair) for pair in model["merges"]]}


def plain(_: Path) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=trained(), bos_token="<s>", eos_token="</s>")


def with_added(_: Path) -> Any:
    """Returns a tokenizer with all kinds of added tokens: special or not, with or without strip."""
    made = plain(_)
    made.add_tokens(
        [AddedToken("<tool>", lstrip=True, rstrip=True), AddedToken("world", single_word=True)]
    )
    made.add_special_tokens({"additional_special_tokens": [AddedToken("<|end|>", rstrip=True)]})
    return made


def gpt2(_: Path) -> Any:
    return GPT2Tokenizer(**vocabulary(), bos_token="<s>", eos_token="</s>", unk_token="</s>")


def gpt2_prefix(_: Path) -> Any:
    return GPT2Tokenizer(
        **vocabulary(), bos_token="<s>", eos_token="</s>", unk_token="</s>", add_prefix_space=True
    )


def qwen2(_: Path) -> Any:
    made = Qwen2Tokenizer(**vocabulary(), eos_token="</s>", pad_token="<s>", unk_token=None)
    made.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    return made


def llama(_: Path) -> Any:
    """Returns a vocabulary with `▁` pieces and byte tokens, as in sentencepiece."""
    letters = sorted({c for text in TEXTS for c in text.replace(" ", "▁")})
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *letters]
    merges = [("▁", "t"), ("H", "e"), ("l", "l"), ("He", "ll"), ("▁", "▁"), ("1", "2")]
    pieces += ["".join(pair) for pair in merges]
    return LlamaTokenizer(vocab={p: i for i, p in enumerate(dict.fromkeys(pieces))}, merges=merges)


TOKENIZERS: dict[str, Callable[[Path], Any]] = {
    "byte-level BPE": plain,
    "added tokens": with_added,
    "GPT2Tokenizer": gpt2,
    "GPT2Tokenizer, add_prefix_space": gpt2_prefix,
    "Qwen2Tokenizer": qwen2,
    "LlamaTokenizer": llama,
}


def tokens(figures: Figures, name: str, reference: Any, folder: Path) -> None:
    """Compares ids with and without special tokens, and decoded text, of a saved tokenizer."""
    reference.save_pretrained(folder)
    theirs, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    ours.save(folder / "again")
    again = AutoTokenizer.from_pretrained(folder / "again")
    wrong = []
    for text in TEXTS:
        for ends in (True, False):
            expected = theirs.encode(text, add_special_tokens=ends)
            if (got := ours.encode(text, special_tokens=ends)) != expected:
                wrong.append(f"{text!r}: got {got}, expected {expected}")
            if (got := again.encode(text, add_special_tokens=ends)) != expected:
                wrong.append(f"{text!r}, saved here: got {got}, expected {expected}")
        back = theirs.decode(expected, clean_up_tokenization_spaces=False)
        if (got_text := ours.decode(expected, skip_special=False)) != back:
            wrong.append(f"{text!r}: text {got_text!r}, expected {back!r}")
    figures.true(name, not wrong, "; ".join(wrong[:2])[:400] or f"{len(TEXTS)} texts equal")
    figures.equal(
        f"{name}: bos, eos, pad",
        (ours.bos_id, ours.eos_id, ours.pad_id),
        (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id),
    )


def chats(figures: Figures, name: str, template: str, folder: Path) -> None:
    made = plain(folder)
    made.chat_template = template
    made.save_pretrained(folder)
    compare_chats(figures, name, folder, tools=TOOLS if "tools" in template else None)


def smollm2(figures: Figures, folder: Path) -> None:
    """Compares the real tokenizer and template, saved here."""
    tokenizer = load_tokenizer("smollm2")
    tokenizer.save(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    theirs = AutoTokenizer.from_pretrained(folder)
    texts = [text for text in TEXTS if theirs.encode(text) != tokenizer.encode(text)]
    figures.equal("SmolLM2: texts that differ", texts, [])
    compare_chats(figures, "SmolLM2: conversations", folder, tools=None)


def compare_chats(figures: Figures, name: str, folder: Path, *, tools: Any) -> None:
    theirs, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    wrong = []
    for messages in CONVERSATIONS:
        for prompt in (True, False):
            text = theirs.apply_chat_template(
                messages, tools=tools, add_generation_prompt=prompt, tokenize=False
            )
            expected = theirs.encode(text, add_special_tokens=False)
            got = ours.encode_chat(messages, tools=tools, add_generation_prompt=prompt)
            if list(got.token_ids) != expected:
                wrong.append(
                    f"got {ours.decode(list(got.token_ids), skip_special=False)!r}, expected "
                    f"{text!r}"
                )
    figures.true(name, not wrong, "; ".join(wrong[:1])[:500] or "equal")


def pinned(package: str) -> str:
    """Returns the package's line of constraints.txt."""
    lines = (Path(__file__).parents[3] / "constraints.txt").read_text().splitlines()
    return next(line for line in lines if line.startswith(f"{package}=="))


if __name__ == "__main__":
    sys.exit(main())
