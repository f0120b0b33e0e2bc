"""Why two engines give different texts: number formats, and the scope of a penalty."""

import tempfile
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import Field, PositiveInt

from easyllm.core.json_types import JsonObject
from easyllm.engine import LLM, SamplingParams
from easyllm.engine.processors import penalise_repetition
from easyllm.lab.lab import Bars, Lab, LabConfig, Result, Text, claim, number
from easyllm.lab.small_texts import small_language_model, small_texts
from easyllm.models.save import save_model
from easyllm.nn.decoder import Decoder
from easyllm.tokenizer.tokenizer import Tokenizer
from easyllm.verify.compare import compare


class Parameters(LabConfig):
    """Parameters of the lab."""

    quick_values: ClassVar[JsonObject] = {"steps": 2, "prompts": 1, "length": 8}

    steps: PositiveInt = Field(default=30, le=5000, description="Training steps of the model.")
    prompts: PositiveInt = Field(default=10, le=50, description="Number of prompts.")
    length: PositiveInt = Field(default=60, ge=8, le=400, description="Tokens of a completion.")
    penalty: float = Field(default=1.3, gt=1, le=10, description="Repetition penalty.")


def run(parameters: Parameters) -> Result:
    """Compares fp32 with bf16 and int8, and both scopes of a repetition penalty."""
    model, tokenizer, _ = small_language_model(steps=parameters.steps, seed=parameters.seed)
    prompts = [t[:40] for t in small_texts(parameters.prompts, parameters.seed + 1)]
    agreement, parts, kl = {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        path = str(save_model(model, Path(folder) / "model", tokenizer=tokenizer))
        for variant in ("float32", "bfloat16", "int8", "int4"):
            found = compare(path, f"{path}@{variant}", prompts, max_tokens=parameters.length)
            agreement[variant] = sum(c.agreement for c in found) / len(found)
            parts[variant] = sum(c.parts_at is not None for c in found)
            kl[variant] = sum(c.mean_kl_nats for c in found) / len(found)
    whole, output = _scopes(model, tokenizer, prompts, parameters)
    differ = sum(a != b for a, b in zip(whole, output, strict=True))
    count = len(prompts)
    return Result(
        numbers=[
            *(
                number(
                    f"parts_{name}",
                    value,
                    f"of {count} texts that differ, fp32 and {name}",
                    f"{count} 段中不同的段数，fp32 与 {name}",
                )
                for name, value in parts.items()
            ),
            *(
                number(
                    f"kl_{name}",
                    value,
                    f"mean KL, fp32 and {name}, nats",
                    f"平均 KL，fp32 与 {name}（nat）",
                    2,
                )
                for name, value in kl.items()
            ),
            number(
                "penalty_differs",
                differ,
                f"of {count} texts that differ by the scope of the penalty",
                f"{count} 段中因惩罚范围而不同的段数",
            ),
        ],
        figures=[
            Bars(
                title=f"Greedy texts of {parameters.length} tokens that differ",
                x="what differs",
                y=f"texts of {count}",
                groups=["nothing (fp32)", "bf16", "int8", "int4", "penalty's scope"],
                series={"texts": [*parts.values(), differ]},
            )
        ],
        claims=[
            claim(
                (
                    "The article (zhihu 658780653) and vLLM's issues 1069 and 1424: outputs differ "
                    "from transformers by number format and order of operations, and because the "
                    "repetition penalty left out the prompt.",
                    "文章（知乎 658780653）与 vLLM 的 issue 1069、1424：输出与 transformers 不同，"
                    "源于数值格式与运算次序，以及重复惩罚未计入提示。",
                ),
                (
                    f"The same format: {parts['float32']} of {count} texts differ; bf16 "
                    f"{parts['bfloat16']} (KL {kl['bfloat16']:.1e}), int8 {parts['int8']} (KL "
                    f"{kl['int8']:.1e}), int4 {parts['int4']} (KL {kl['int4']:.1e}); the "
                    f"penalty's scope {differ}.",
                    f"相同格式：{count} 段中 {parts['float32']} 段不同；bf16 {parts['bfloat16']} 段"
                    f"（KL {kl['bfloat16']:.1e}），int8 {parts['int8']} 段（KL "
                    f"{kl['int8']:.1e}），int4 {parts['int4']} 段（KL {kl['int4']:.1e}）；"
                    f"惩罚范围 {differ} 段。",
                ),
                "direction" if parts["float32"] == 0 and differ > 0 else "not",
                ("A small model, not vLLM itself.", "用小模型展示，并非 vLLM 本身。"),
            )
        ],
    )


@torch.no_grad()
def _scopes(
    model: Decoder, tokenizer: Tokenizer, prompts: list[str], parameters: Parameters
) -> tuple[list[list[int]], list[list[int]]]:
    """Returns greedy texts with the penalty on prompt and output, and on the output alone."""
    llm = LLM(model=model, tokenizer=tokenizer, num_pages=256)
    params = SamplingParams(
        temperature=0,
        repetition_penalty=parameters.penalty,
        max_tokens=parameters.length,
        ignore_eos=True,
    )
    whole = [c.token_ids for c in llm.generate(prompts, params)]
    output = []
    for prompt in prompts:
        ids = tokenizer.encode(prompt)
        written: list[int] = []
        for _ in range(parameters.length):
            logits = model.logits([*ids, *written])[-1]
            seen = torch.tensor(sorted(set(written)), dtype=torch.int64)
            written.append(int(penalise_repetition(logits, seen, parameters.penalty).argmax()))
        output.append(written)
    return whole, output


LAB = Lab(
    name="engines-differ",
    rows=(65,),
    chapter="inference",
    title=Text("Why two engines differ", "为什么两个引擎结果不同"),
    seconds=40,
    parameters=Parameters,
    run=run,
)
