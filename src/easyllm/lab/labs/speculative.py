"""An engine's two promises: the same text for every batch, and drafts that only save passes."""

from typing import ClassVar

from pydantic import Field, PositiveInt

from easyllm.core.json_types import JsonObject
from easyllm.engine import LLM, SamplingParams
from easyllm.engine.request import Request
from easyllm.lab.lab import Bars, Lab, LabConfig, Result, Text, claim, number
from easyllm.lab.small_texts import small_language_model, small_texts


class Parameters(LabConfig):
    """Parameters of the lab."""

    quick_values: ClassVar[JsonObject] = {"steps": 3, "prompts": 2, "length": 12}

    steps: PositiveInt = Field(default=120, le=5000, description="Training steps of the model.")
    prompts: PositiveInt = Field(default=8, le=64, description="Number of requests.")
    length: PositiveInt = Field(default=48, ge=8, le=200, description="Tokens of a completion.")
    draft_tokens: PositiveInt = Field(default=4, le=16, description="Draft tokens per pass.")


def run(parameters: Parameters) -> Result:
    """Runs the same requests one by one, together, and with drafts from their own text."""
    model, tokenizer, _ = small_language_model(steps=parameters.steps, seed=parameters.seed)
    prompts = [
        tuple(tokenizer.encode(t))[:60]
        for t in small_texts(parameters.prompts, parameters.seed + 1)
    ]
    params = SamplingParams(temperature=0, max_tokens=parameters.length, ignore_eos=True)
    plain = LLM(model=model, tokenizer=tokenizer, num_pages=512)
    drafting = LLM(
        model=model,
        tokenizer=tokenizer,
        num_pages=512,
        draft="ngram",
        draft_tokens=parameters.draft_tokens,
    )
    alone, passes_alone = {}, 0
    for number_of, ids in enumerate(prompts):
        found, taken = _run(plain, [ids], params)
        alone[number_of], passes_alone = found[0], passes_alone + taken
    together, passes_together = _run(plain, prompts, params)
    drafted, passes_drafted = _run(drafting, prompts, params)
    passes_one = 0
    for ids in prompts:
        passes_one += _run(drafting, [ids], params)[1]
    same_batch = sum(alone[i] == text for i, text in enumerate(together))
    same_draft = sum(a == b for a, b in zip(drafted, together, strict=True))
    count = len(prompts)
    passes = {
        "one by one": passes_alone,
        "one by one, drafts": passes_one,
        "together": passes_together,
        "together, drafts": passes_drafted,
    }
    return Result(
        numbers=[
            number(
                "same_in_batch",
                same_batch,
                f"of {count} texts equal alone and together",
                f"{count} 段中单独与同批相同的段数",
            ),
            number(
                "same_with_drafts",
                same_draft,
                f"of {count} texts equal with drafts",
                f"{count} 段中使用草稿后相同的段数",
            ),
            *(
                number(
                    f"passes_{name.replace(', ', '_').replace(' ', '_')}",
                    value,
                    f"forward passes, {name}",
                    f"前向次数，{_ZH[name]}",
                )
                for name, value in passes.items()
            ),
        ],
        figures=[
            Bars(
                title=f"Forward passes for {count} texts of {parameters.length} tokens",
                x="how they are run",
                y="passes",
                groups=list(passes),
                series={"passes": list(passes.values())},
            )
        ],
        claims=[
            claim(
                (
                    "Speculative decoding (arXiv 2211.17192) does not change greedy output; "
                    "continuous batching runs many requests in one pass.",
                    "投机解码（arXiv 2211.17192）不改变贪心输出；"
                    "连续批处理在一次前向中运行多个请求。",
                ),
                (
                    f"{same_draft} of {count} texts are equal with drafts, {same_batch} in a "
                    f"batch; passes: {passes_alone} one by one, {passes_one} with drafts, "
                    f"{passes_together} together.",
                    f"{count} 段中使用草稿后相同 {same_draft} 段，同批相同 {same_batch} 段；"
                    "前向次数："
                    f"逐个 {passes_alone}，加草稿 {passes_one}，同批 {passes_together}。",
                ),
                "reproduced"
                if same_draft == same_batch == count and passes_one < passes_alone
                else "direction",
            )
        ],
    )


_ZH = {
    "one by one": "逐个",
    "one by one, drafts": "逐个，草稿",
    "together": "同批",
    "together, drafts": "同批，草稿",
}


def _run(
    llm: LLM, prompts: list[tuple[int, ...]], params: SamplingParams
) -> tuple[list[list[int]], int]:
    """Returns the tokens of each completion, and the number of forward passes."""
    requests = [Request(prompt_ids=ids, params=params) for ids in prompts]
    found: dict[int, list[int]] = {request.id: [] for request in requests}
    llm.engine.clear_prefix_cache()
    for request in requests:
        llm.engine.add(request)
    passes = 0
    while llm.engine.busy:
        passes += 1
        for event in llm.engine.step():
            if event.token_id is not None:
                found[event.request_id].append(event.token_id)
    return list(found.values()), passes


LAB = Lab(
    name="speculative",
    rows=(59,),
    chapter="inference",
    title=Text("Batches and drafts change no text", "批处理与草稿不改变文本"),
    seconds=40,
    parameters=Parameters,
    run=run,
)
