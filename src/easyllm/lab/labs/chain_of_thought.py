"""Chain of thought: a small model that writes its steps, one that does not, and votes."""

import random
from typing import Any, ClassVar

from pydantic import Field, PositiveFloat, PositiveInt

from easyllm.core.json_types import JsonObject
from easyllm.engine import LLM
from easyllm.examples.sample import Sample
from easyllm.lab.lab import Bars, Lab, LabConfig, Lines, Result, Text, claim, number
from easyllm.lab.small_models import new_model, small_config, smoothed, train_small
from easyllm.prompt.ask import Ask, ModelAsker
from easyllm.prompt.extract import extract
from easyllm.prompt.reasoning import Reasoned, vote
from easyllm.tokenizer.tokenizer import Tokenizer
from easyllm.tokenizer.train import train_tokenizer
from easyllm.tokenizer.train_config import TokenizerConfig

METHODS = {"direct": False, "with steps": True}
VOTES = (1, 3, 9)


class Parameters(LabConfig):
    """Parameters of the lab."""

    quick_values: ClassVar[JsonObject] = {"steps": 5, "questions": 3, "digits": 3}

    digits: PositiveInt = Field(default=5, ge=2, le=12, description="Digits that are added.")
    steps: PositiveInt = Field(default=600, le=10_000, description="Training steps of each model.")
    questions: PositiveInt = Field(default=60, le=1000, description="Held-out problems.")
    temperature: PositiveFloat = Field(default=1.0, le=3, description="Of the sampled answers.")


def run(parameters: Parameters) -> Result:
    """Trains two models on the same sums modulo 10, one of them with intermediate results."""
    draw = random.Random(parameters.seed)
    problems = [[draw.randrange(10) for _ in range(parameters.digits)] for _ in range(4000)]
    test = problems[: parameters.questions]
    known = {tuple(p) for p in test}
    train = [p for p in problems if tuple(p) not in known]
    examples = [_question(p) + _answer(p, steps=True) for p in train[:200]]
    tokenizer = train_tokenizer(examples, TokenizerConfig(vocab_size=300))
    right, tokens, curves, voted = {}, {}, {}, dict[str, list[tuple[float, float]]]()
    for name, steps in METHODS.items():
        llm, losses = _trained(train, tokenizer, parameters, steps=steps)
        curves[name] = smoothed(losses)
        greedy = _answers(llm, test, parameters, samples=1, temperature=0.0)
        right[name] = _share(greedy, test)
        tokens[name] = sum(each.tokens for each in greedy) / len(greedy)
        voted[name] = [
            (
                float(n),
                _share(
                    _answers(llm, test, parameters, samples=n, temperature=parameters.temperature),
                    test,
                ),
            )
            for n in VOTES
        ]
    single, most = voted["with steps"][0][1], voted["with steps"][-1][1]
    return Result(
        numbers=[
            number("direct", right["direct"], "right answers, direct", "直接回答的正确率", 3),
            number(
                "steps", right["with steps"], "right answers, with steps", "写出步骤的正确率", 3
            ),
            number(
                "tokens_direct",
                tokens["direct"],
                "tokens of an answer, direct",
                "直接回答的词元数",
                3,
            ),
            number(
                "tokens_steps",
                tokens["with steps"],
                "tokens of an answer, with steps",
                "写出步骤的词元数",
                3,
            ),
            number(
                "single",
                single,
                "right, one sampled answer with steps",
                "采样一个带步骤的回答的正确率",
                3,
            ),
            number(
                "vote", most, f"right, vote of {VOTES[-1]}", f"{VOTES[-1]} 个回答投票的正确率", 3
            ),
        ],
        figures=[
            Lines(
                title="Loss per token of the answer",
                x="step",
                y="nats",
                lines=curves,
            ),
            Bars(
                title=f"Sum of {parameters.digits} digits modulo 10",
                x="answer",
                y="share right, greedy",
                groups=list(right),
                series={"right": list(right.values())},
            ),
            Lines(
                title=f"Votes at temperature {parameters.temperature:g}",
                x="sampled answers",
                y="share right",
                lines=voted,
                marks=True,
            ),
        ],
        claims=_claims(right, tokens, single, most),
    )


def _claims(
    right: dict[str, float], tokens: dict[str, float], single: float, most: float
) -> list[Any]:
    return [
        claim(
            (
                "Chain-of-thought prompting (arXiv 2201.11903): intermediate steps raise accuracy "
                "on problems of several steps (GSM8K with PaLM 540B from 17.9 to 56.9).",
                "思维链提示（arXiv 2201.11903）：中间步骤提高多步问题的正确率（PaLM 540B 在 "
                "GSM8K 上从 "
                "17.9 到 56.9）。",
            ),
            (
                f"{right['direct']:.0%} right directly and {right['with steps']:.0%} with steps, "
                f"for {tokens['direct']:.0f} and {tokens['with steps']:.0f} tokens an answer.",
                f"直接回答正确率 {right['direct']:.0%}，写出步骤 {right['with steps']:.0%}；"
                f"每个回答 {tokens['direct']:.0f} 与 {tokens['with steps']:.0f} 个词元。",
            ),
            "direction" if right["with steps"] > right["direct"] else "not",
            (
                "Small models trained on steps, not a large one prompted.",
                "这里是用步骤训练的小模型，不是提示大模型。",
            ),
        ),
        claim(
            (
                "Self-consistency (arXiv 2203.11171): the most frequent of several sampled answers "
                "is right more often than one of them.",
                "自洽性（arXiv 2203.11171）：多个采样回答中最常见的答案比单个回答更常正确。",
            ),
            (
                f"One sampled answer is right in {single:.0%}, the vote of {VOTES[-1]} in "
                f"{most:.0%}.",
                f"单个采样回答正确 {single:.0%}，{VOTES[-1]} 个投票 {most:.0%}。",
            ),
            "direction" if most >= single else "not",
            (
                "The same small model; the gain is largest where single answers are often wrong.",
                "同一个小模型；单个回答常错时提升最大。",
            ),
        ),
    ]


def _question(digits: list[int]) -> str:
    return "+".join(map(str, digits)) + " ="


def _answer(digits: list[int], *, steps: bool) -> str:
    """Returns the text of an answer: each partial sum, if asked for, and the result."""
    parts, total = list[str](), digits[0]
    for digit in digits[1:]:
        parts.append(f" {total}+{digit}={(total + digit) % 10}")
        total = (total + digit) % 10
    return ("".join(parts) if steps else "") + f" so {total}\n"


def _trained(
    problems: list[list[int]], tokenizer: Tokenizer, parameters: Parameters, *, steps: bool
) -> tuple[LLM, list[float]]:
    """Returns an engine with a new model trained on answers, and the loss of each step."""
    samples = []
    for problem in problems:
        asked = tokenizer.encode(_question(problem))
        answer = tokenizer.encode(_answer(problem, steps=steps))
        mask = [False] * len(asked) + [True] * len(answer)
        samples.append(Sample.from_mask([*asked, *answer], mask))
    model = new_model(small_config(vocab_size=tokenizer.vocab_size), parameters.seed)
    losses = train_small(
        model, samples, steps=parameters.steps, batch_size=32, warmup=20, seed=parameters.seed
    )
    return LLM(model=model.requires_grad_(False).eval(), tokenizer=tokenizer), losses


def _answers(
    llm: LLM, problems: list[list[int]], parameters: Parameters, *, samples: int, temperature: float
) -> list[Reasoned]:
    longest = 12 * parameters.digits + 8
    ask = ModelAsker(
        llm,
        max_tokens=longest,
        seed=parameters.seed,
        chat=False,
        form="{question}{begun}",
        stop=("\n",),
    )
    replies = ask([Ask(_question(p)) for p in problems], n=samples, temperature=temperature)
    return [
        vote([(r.text, extract("number", r.text), r.tokens, r.truncated) for r in each])
        for each in replies
    ]


def _share(answers: list[Reasoned], problems: list[list[int]]) -> float:
    pairs = zip(answers, problems, strict=True)
    return sum(each.answer == str(sum(p) % 10) for each, p in pairs) / len(problems)


LAB = Lab(
    name="chain-of-thought",
    rows=(58,),
    chapter="prompts",
    title=Text("Chain of thought, and votes", "思维链与投票"),
    seconds=60,
    parameters=Parameters,
    run=run,
)
