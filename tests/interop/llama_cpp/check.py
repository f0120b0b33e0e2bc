"""GGUF files in llama.cpp and in this project: tokens, log-probabilities, greedy completions.

llama.cpp runs in this process (`xllamacpp`) and is queried through its own HTTP server
(`llama_server`).
"""

import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import families
import gguf
import numpy as np
import sentencepiece
import torch
import written
from figures import Figures
from llama_server import CONTEXT, peer
from safetensors.torch import load_file

from easyllm.engine import LLM, SamplingParams
from easyllm.models import load_model, load_tokenizer, locate, save_model
from easyllm.models.families import family_of
from easyllm.models.gguf_export import save_gguf
from easyllm.nn import Decoder
from easyllm.pipeline.calibration import calibration
from easyllm.tokenizer import Tokenizer

BOUND = 2e-3  # of a log-probability: the two programs sum in different orders
TEXTS = {
    "digits": "In 1984, 12345678 + 0.5 = 3,141.59 (or 007)",
    "digits and letters": "x86_64 v2.0.1 H2O 3rd 1e-5 0xFF",
    "Chinese": "你好，世界！二〇二六年十一月，北京的天气很好。",
    "Chinese and digits": "第12章 共345页，价格￥67.89元",
    "spaces": "a  b   c    d\te\n\n  f \n g   ",
    "leading space": "  two spaces first",
    "code": "def f(x):\n    return x**2  # ok\n\n\nprint(f(3))",
    "quotes": "It's John's, they'll say \"don't\" - I'M SURE",
    "scripts": "naïve café Привет мир नमस्ते こんにちは 한국어 🙂👩‍👩‍👧",
    "marks": "<|im_start|>user\nhi<|im_end|>",
    "empty": "",
}
CUTS = ("smollm", "gpt-2", "default", "llama-bpe", "qwen2", "starcoder", "refact", "command-r")
CUTS += ("glm4", "chatglm-bpe", "deepseek-v3", "deepseek-coder", "deepseek-llm")
ORIGINAL = 32
PROMPT = [(7 * i * i + 3 * i) % 250 + 3 for i in range(90)]


def main() -> int:
    torch.set_num_threads(1)
    figures = Figures("torch", "xllamacpp", "gguf", "sentencepiece")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        print("tokens of SmolLM2's vocabulary, by tokenizer.ggml.pre")
        for pre in CUTS:
            figures.run(pre, lambda p=pre: tokens_of_pre(figures, p, work))
        print("tokens of a sentencepiece vocabulary")
        figures.run("sentencepiece", lambda: tokens_of_sentencepiece(figures, work))
        print("a tiny Llama: largest difference of ten log-probabilities; greedy tokens")
        for name, (config, keys, factors) in ROPE.items():
            figures.run(
                name, lambda n=name, c=config, k=keys, f=factors: tiny(figures, n, c, k, f, work)
            )
        print("a tiny model of every family, written here: the same, in F32 and F16")
        for name, hf in families.FAMILIES.items():
            figures.run(name, lambda n=name, h=hf: family(figures, n, h, work))
        print("SmolLM2: the same")
        figures.run("SmolLM2 in F32", lambda: smollm2(figures, work))
        print("files written here: greedy tokens, and KL on a text")
        figures.run("files written here", lambda: all_types(figures, work))
    return figures.end()


# ---- tokens


def tokens_of_pre(figures: Figures, pre: str, work: Path) -> None:
    """Compares the same vocabulary and merges under another pre-tokenizer."""
    reader = gguf.GGUFReader(locate("smollm2"))
    tokenizer = {name: field for name, field in reader.fields.items() if "tokenizer." in name}
    model, hf = tiny_model(vocab_size=len(tokenizer["tokenizer.ggml.tokens"].contents()))
    path = work / f"{pre}.gguf"
    values = {name: (field.contents(), field.types) for name, field in tokenizer.items()}
    values["tokenizer.ggml.pre"] = (pre, [gguf.GGUFValueType.STRING])
    write(path, model, hf, work / f"{pre} hf", tokenizer=values)
    compare_tokens(figures, pre, path)
    path.unlink()


def tokens_of_sentencepiece(figures: Figures, work: Path) -> None:
    (work / "corpus.txt").write_text("\n".join(list(TEXTS.values()) * 20))
    trainer = {"vocab_size": 480, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2}
    trainer |= {"input": str(work / "corpus.txt"), "model_prefix": str(work / "pieces")}
    trainer |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    sentencepiece.SentencePieceTrainer.train(**trainer, hard_vocab_limit=False)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(work / "pieces.model"))
    count = pieces.get_piece_size()
    kinds = [
        2 if pieces.is_unknown(i) else 3 if pieces.is_control(i) else 6 if pieces.is_byte(i) else 1
        for i in range(count)
    ]
    array, text, real = (
        gguf.GGUFValueType.ARRAY,
        gguf.GGUFValueType.STRING,
        gguf.GGUFValueType.FLOAT32,
    )
    whole, flag = gguf.GGUFValueType.UINT32, gguf.GGUFValueType.BOOL
    values: dict[str, Any] = {
        "model": ("llama", [text]),
        "pre": ("default", [text]),
        "tokens": ([pieces.id_to_piece(i) for i in range(count)], [array, text]),
        "scores": ([pieces.get_score(i) for i in range(count)], [array, real]),
        "token_type": (kinds, [array, gguf.GGUFValueType.INT32]),
        "bos_token_id": (1, [whole]),
        "eos_token_id": (2, [whole]),
        "unknown_token_id": (0, [whole]),
        "add_bos_token": (True, [flag]),
    }
    model, hf = tiny_model(vocab_size=count)
    values = {f"tokenizer.ggml.{name}": value for name, value in values.items()}
    write(work / "pieces.gguf", model, hf, work / "pieces hf", tokenizer=values)
    compare_tokens(figures, "sentencepiece", work / "pieces.gguf")
    tokenizer = Tokenizer.from_sentencepiece(work / "pieces.model", add_bos=True)
    path = work / "written.gguf"
    save_gguf(model, path, type="f32", tokenizer=tokenizer)
    compare_tokens(figures, "sentencepiece, written here", path)


def compare_tokens(figures: Figures, name: str, path: Path) -> None:
    ours = load_tokenizer(path)
    with peer(path) as llama:
        wrong = []
        for kind, text in TEXTS.items():
            for special in (False, True):
                got, expected = (
                    ours.encode(text, special_tokens=special),
                    llama.tokens(text, special=special),
                )
                if got != expected:
                    wrong.append(f"{kind}: got {got[:12]}, llama.cpp {expected[:12]}")
                    break
    figures.true(name, not wrong, "; ".join(wrong[:2]) or f"{len(TEXTS)} texts equal")


# ---- values


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": ORIGINAL}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}


def llama3_factors(width: int, theta: float) -> np.ndarray:
    """Returns `rope_freqs.weight`: divisors of frequencies, as in Llama 3.1's published code."""
    found = []
    for i in range(0, width, 2):
        length = 2 * math.pi * theta ** (i / width)
        ratio = (ORIGINAL / length - 1.0) / (4.0 - 1.0)
        smooth = min(max(ratio, 0.0), 1.0)
        found.append(1 / (smooth + (1 - smooth) / 8.0))
    return np.array(found, np.float32)


ROPE: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    # name: (config.json keys, GGUF keys, whether the file contains factors)
    "plain": ({}, {}, False),
    "theta 500000, no tied head": ({"rope_theta": 5e5, "tie_word_embeddings": False}, {}, False),
    "Llama 3's factors": ({"rope_scaling": LLAMA3}, {}, True),
    "linear scaling": (
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
        False,
    ),
    "YaRN": (
        {"rope_scaling": YARN},
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": ORIGINAL,
        },
        False,
    ),
}


def tiny(
    figures: Figures,
    name: str,
    config: dict[str, Any],
    keys: dict[str, Any],
    factors: bool,
    work: Path,
) -> None:
    """Compares a file read by both, which was written from a folder."""
    model, hf = tiny_model(**config)
    path, folder = work / f"{name}.gguf", work / f"{name} hf"
    extra = (
        {"rope_freqs.weight": llama3_factors(hf["head_dim"], hf["rope_theta"])} if factors else {}
    )
    write(path, model, hf, folder, keys=keys, extra=extra)
    with peer(path) as llama:
        steps = llama.greedy(PROMPT, 24)
    figures.at_most(f"{name}: the folder", difference(load_model(folder), PROMPT, steps), BOUND)
    figures.at_most(f"{name}: the file", difference(load_model(path), PROMPT, steps), BOUND)
    figures.equal(f"{name}: greedy", greedy(path, PROMPT, 24), [step["id"] for step in steps])


def family(figures: Figures, name: str, hf: Mapping[str, Any], work: Path) -> None:
    """Compares the files that are written here of a random model of a family."""
    values = byte_tokenizer(families.VOCAB)
    tokenizer = Tokenizer.from_gguf({key: value for key, (value, _) in values.items()})
    model = families.random_model(hf)
    for type in ("f32", "f16"):
        path = work / "family.gguf"
        save_gguf(model, path, type=type, tokenizer=tokenizer, replace=True)
        with peer(path) as llama:
            steps = llama.greedy(PROMPT, families.TOKENS)
        families.check(figures, f"{name}, {type}", load_model(path, dtype="float32"), PROMPT, steps)


def smollm2(figures: Figures, work: Path) -> None:
    """Compares the complete model in F32, so that both compute with the same weights."""
    path = work / "smollm2.gguf"
    in_float32(locate("smollm2"), path)
    tokenizer = load_tokenizer(path)
    llm = LLM(path, dtype="float32")
    with peer(path) as llama:
        for text in ("The capital of France is", "1 2 3 4 5 6", "def add(a, b):\n    return"):
            ids = tokenizer.encode(text)
            steps = llama.greedy(ids, 16)
            figures.at_most(f"{text!r}", difference(llm.model, ids, steps), BOUND)
            figures.equal(f"{text!r}: greedy", answer(llm, ids, 16), [s["id"] for s in steps])


def all_types(figures: Figures, work: Path, only: Sequence[str] | None = None) -> None:
    """Compares a file of each type: of SmolLM2, and of a wider random model for K-quants."""
    small, tokenizer = load_model("smollm2", dtype="float32"), load_tokenizer("smollm2")
    wide = written.wide_model(tokenizer)
    (ids,) = calibration(tokenizer, count=1, length=written.TOKENS).sequences
    text, path = ids.tolist(), work / "written.gguf"
    for type in ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"):
        if only is not None and type not in only:
            continue
        written.prepared(small, tokenizer, path, type, weighed=type.startswith("q"))
        with peer(path) as llama:
            equal = type in ("f32", "f16")
            prompts = written.PROMPTS
            written.check(figures, type, path, llama, equal=equal, text=text, prompts=prompts)
    for type in ("q6_k", "q5_k", "q4_k"):
        if only is not None and type not in only:
            continue
        written.prepared(wide, tokenizer, path, type, weighed=True)
        with peer(path) as llama:
            written.check(
                figures, type, path, llama, equal=False, text=text, prompts=written.PROMPTS
            )


@torch.no_grad()
def difference(model: Decoder, ids: Sequence[int], steps: Sequence[Mapping[str, Any]]) -> float:
    """Returns the largest log-probability difference over the top ten tokens of each step."""
    whole = [*ids, *(step["id"] for step in steps)]
    rows = model.logits(whole)[len(ids) - 1 : -1].log_softmax(-1)
    found = 0.0
    for row, step in zip(rows, steps, strict=True):
        for top in step["top_logprobs"]:
            found = max(found, abs(float(row[top["id"]]) - top["logprob"]))
    return found


def greedy(path: Path, ids: Sequence[int], count: int) -> list[int]:
    return answer(LLM(path, dtype="float32"), ids, count)


def answer(llm: LLM, ids: Sequence[int], count: int) -> list[int]:
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    return list(llm.generate([list(ids)], params)[0].token_ids)


# ---- files


def tiny_model(**changes: Any) -> tuple[Decoder, dict[str, Any]]:
    """Returns a random Llama and its `config.json`."""
    hf: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | changes
    model = Decoder(family_of("llama").read_config(hf))
    generator = torch.Generator().manual_seed(0)
    model.reset_parameters(std=0.15, generator=generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
    return model.requires_grad_(False).eval(), hf


def write(
    path: Path,
    model: Decoder,
    hf: Mapping[str, Any],
    folder: Path,
    *,
    keys: Mapping[str, Any] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
    tokenizer: Mapping[str, tuple[Any, list[Any]]] | None = None,
) -> None:
    """Saves the model as a folder, and as a GGUF file with tensor names from the `gguf` package."""
    save_model(model, folder)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(hf["max_position_embeddings"])
    writer.add_embedding_length(hf["hidden_size"])
    writer.add_block_count(hf["num_hidden_layers"])
    writer.add_feed_forward_length(hf["intermediate_size"])
    writer.add_head_count(hf["num_attention_heads"])
    writer.add_head_count_kv(hf["num_key_value_heads"])
    writer.add_key_length(hf["head_dim"])
    writer.add_value_length(hf["head_dim"])
    writer.add_rope_dimension_count(hf["head_dim"])
    writer.add_layer_norm_rms_eps(hf["rms_norm_eps"])
    writer.add_rope_freq_base(hf["rope_theta"])
    for key, value in (keys or {}).items():
        add = {float: writer.add_float32, int: writer.add_uint32, str: writer.add_string}
        add[type(value)](f"llama.{key}", value)
    add_fields(writer, tokenizer or byte_tokenizer(hf["vocab_size"]))
    heads = {"q_proj": hf["num_attention_heads"], "k_proj": hf["num_key_value_heads"]}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, hf["num_hidden_layers"])
    for name, tensor in load_file(folder / "model.safetensors").items():
        array, part = tensor.float().numpy(), name.split(".")[-2]
        if part in heads:  # rotated pairs are adjacent in llama.cpp
            split = array.reshape(heads[part], 2, -1, array.shape[1])
            array = np.ascontiguousarray(split.swapaxes(1, 2).reshape(array.shape))
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), array)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    finish(writer)


def byte_tokenizer(count: int) -> dict[str, tuple[Any, list[Any]]]:
    """Returns the metadata of a byte-level vocabulary of ASCII with one merge.

    llama.cpp omits tokens that end within a character from `completion_probabilities`, so the
    vocabulary contains none.
    """
    letters = [chr(code) for code in range(33, 127)]
    tokens = ["<pad>", "<s>", "</s>", *letters, "ab"]
    tokens += [f"w{n}." for n in range(count - len(tokens))]
    kinds = [3] * 3 + [1] * (count - 3)
    array, text = gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING
    whole, flag = gguf.GGUFValueType.UINT32, gguf.GGUFValueType.BOOL
    values = {
        "model": ("gpt2", [text]),
        "pre": ("gpt-2", [text]),
        "tokens": (tokens, [array, text]),
        "token_type": (kinds, [array, gguf.GGUFValueType.INT32]),
        "merges": (["a b"], [array, text]),
        "bos_token_id": (1, [whole]),
        "eos_token_id": (2, [whole]),
        "add_bos_token": (False, [flag]),
    }
    return {f"tokenizer.ggml.{name}": value for name, value in values.items()}


def in_float32(source: Path, target: Path) -> None:
    """Writes a copy of a GGUF file with its weights in F32."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    fields = {name: (f.contents(), f.types) for name, f in reader.fields.items()}
    skipped = ("GGUF.", "general.architecture", "general.file_type", "general.quantization")
    add_fields(writer, {n: v for n, v in fields.items() if not n.startswith(skipped)})
    for tensor in reader.tensors:
        array = gguf.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, array.reshape(tuple(reversed(tensor.shape.tolist()))))
    finish(writer)


def add_fields(writer: gguf.GGUFWriter, fields: Mapping[str, tuple[Any, list[Any]]]) -> None:
    for name, (value, kinds) in fields.items():
        writer.add_key_value(name, value, kinds[0], kinds[1] if len(kinds) > 1 else None)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    sys.exit(main())
