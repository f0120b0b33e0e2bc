"""Structured prompts: sections survive a round trip, faults are found, structure costs tokens."""

from typing import ClassVar

from pydantic import Field

from easyllm.core.json_types import JsonObject
from easyllm.lab.lab import Bars, Lab, LabConfig, Result, Text, claim, number
from easyllm.models import load_tokenizer
from easyllm.prompt.library import load_prompt, prompt_names, read_prompt_text
from easyllm.prompt.lint import lint
from easyllm.prompt.structured import parse, to_flat, to_markdown

GOOD = read_prompt_text("assistant")
FAULTS = {
    "missing-section": GOOD.replace("## Rules", "## Remarks"),
    "unresolved-variable": GOOD + "Answer about <Topic>.\n",
    "mixed-markers": GOOD.replace("2. Says", "- Says"),
    "skipped-level": GOOD.replace("### Skill", "##### Skill").replace("## Profile", "# Profile"),
    "empty-section": GOOD.replace("## Workflow", "## Workflow\n\n## Steps"),
    "repeated-section": GOOD + "\n## Rules\n1. Be brief.\n",
}


class Parameters(LabConfig):
    """Parameters of the lab."""

    quick_values: ClassVar[JsonObject] = {"prompts": ("assistant", "assistant-zh")}

    prompts: tuple[str, ...] = Field(
        default=(), max_length=20, description="Prompts by name; empty for all in the package."
    )


def run(parameters: Parameters) -> Result:
    """Parses and writes prompts, plants faults, and counts tokens of both forms."""
    tokenizer = load_tokenizer("smollm2")
    names = parameters.prompts or tuple(prompt_names())
    prompts = {name: load_prompt(name) for name in names}
    equal = sum(parse(to_markdown(prompt)) == prompt for prompt in prompts.values())
    faults = sum(len(lint(read_prompt_text(name), _filled(name))) for name in names)
    found = {rule: rule in {f.rule for f in lint(text)} for rule, text in FAULTS.items()}
    tokens = {
        name: [len(tokenizer.encode(form(prompt))) for form in (to_markdown, to_flat)]
        for name, prompt in prompts.items()
    }
    saved = 1 - sum(flat for _, flat in tokens.values()) / sum(m for m, _ in tokens.values())
    return Result(
        numbers=[
            number(
                "equal",
                equal,
                f"of {len(prompts)} prompts equal after a round trip",
                f"{len(prompts)} 个提示往返后相同的个数",
            ),
            number("faults", faults, "faults in them", "其中的问题数"),
            number(
                "found",
                sum(found.values()),
                f"of {len(found)} planted faults found",
                f"{len(found)} 个埋入的问题中找到的个数",
            ),
            number("saved", saved, "tokens saved by the flat form", "平铺格式节省的词元比例"),
        ],
        figures=[
            Bars(
                title="Length of prompts",
                x="prompt",
                y="tokens (SmolLM2)",
                groups=list(tokens),
                series={
                    "Markdown": [m for m, _ in tokens.values()],
                    "flat": [flat for _, flat in tokens.values()],
                },
            )
        ],
        claims=[
            claim(
                (
                    "The article (lonepatient, 2023-08-01): a prompt is written as Role, Profile, "
                    "Skills, Rules, Workflow and Initialization with <Var> for references; weak "
                    "models take a flat form better.",
                    "文章（lonepatient，2023-08-01）：提示写成 Role、Profile、Skill、Rules、"
                    "Workflow、"
                    "Initialization 等部分，用 <Var> 引用；能力弱的模型更适合平铺格式。",
                ),
                (
                    f"{equal} of {len(prompts)} prompts survive a round trip, "
                    f"{sum(found.values())} "
                    f"of {len(found)} planted faults are found; the flat form takes {saved:.0%} "
                    "fewer tokens.",
                    f"{len(prompts)} 个提示中 {equal} 个往返不变，{len(found)} 个埋入的问题找到 "
                    f"{sum(found.values())} 个；平铺格式少用 {saved:.0%} 的词元。",
                ),
                "direction" if equal == len(prompts) and all(found.values()) else "not",
                (
                    "Structure is checked; whether answers get better depends on the model.",
                    "这里检查的是结构；回答是否更好取决于模型。",
                ),
            )
        ],
    )


def _filled(name: str) -> dict[str, str]:
    """Returns a value for every variable of a prompt."""
    return dict.fromkeys(load_prompt(name).variables, "value")


LAB = Lab(
    name="structured-prompts",
    rows=(56,),
    chapter="prompts",
    title=Text("Prompts with a structure", "结构化提示"),
    seconds=5,
    parameters=Parameters,
    run=run,
)
