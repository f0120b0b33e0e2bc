"""SFT: which tokens are trained, and how much each response counts."""

from typing import ClassVar

from pydantic import Field, PositiveInt

from easyllm.core.json_types import JsonObject
from easyllm.examples.conversations import Conversation
from easyllm.examples.prepare import prepare_conversations, split_responses
from easyllm.examples.sample import Sample
from easyllm.lab.lab import Bars, Lab, LabConfig, Result, Text, claim, number
from easyllm.tokenizer.tokenizer import Tokenizer
from easyllm.tokenizer.train import train_tokenizer
from easyllm.tokenizer.train_config import TokenizerConfig

LETTERS = "ABCDEFGH"


class Parameters(LabConfig):
    """Parameters of the lab."""

    quick_values: ClassVar[JsonObject] = {}

    turns: PositiveInt = Field(default=3, ge=2, le=8, description="Turns of the second session.")


def run(parameters: Parameters) -> Result:
    """Weighs the responses of two sessions, one with a single turn."""
    config = TokenizerConfig(vocab_size=300, chat_template="chatml", eos="<|im_end|>")
    tokenizer = train_tokenizer(["ABC question answer user assistant"], config)
    letters = LETTERS[: parameters.turns]
    sessions = [_talk("A"), _talk(letters)]
    pieces = [part for session in sessions for part in split_responses(session)]

    def prepare(talks: list[Conversation], *, split: bool = False) -> list[Sample]:
        return prepare_conversations(talks, tokenizer, max_seq_len=512, split_turns=split)[0]

    whole, cut, split = prepare(sessions), prepare(pieces), prepare(sessions, split=True)
    found = {
        "complete, mean of samples": _weights(whole, letters, tokenizer, by_token=False),
        "cut, all responses trained": _weights(cut, letters, tokenizer, by_token=False),
        "split, last response trained": _weights(split, letters, tokenizer, by_token=False),
        "complete, mean of tokens": _weights(whole, letters, tokenizer, by_token=True),
    }
    allowed = {*_ids(letters, tokenizer), tokenizer.eos_id}
    prompt_trained = sum(
        label != -100 and label not in allowed for sample in whole for label in sample.labels
    )
    zh = {
        "complete, mean of samples": "完整会话，样本平均",
        "cut, all responses trained": "切分，训练所有回答",
        "split, last response trained": "切分，只训练最后的回答",
        "complete, mean of tokens": "完整会话，词元平均",
    }
    usual = parameters.turns == 3
    a, b = found["complete, mean of samples"], found["cut, all responses trained"]
    exact = _near(a, (2 / 3, 1 / 6, 1 / 6)) and _near(b, (17 / 24, 5 / 24, 1 / 12))
    return Result(
        numbers=[
            number(
                "prompt_labels",
                prompt_trained,
                "trained tokens that are not of a response",
                "不属于回答却参与训练的词元数",
            ),
            *(
                number(
                    f"{key.replace(', ', '_').replace(' ', '_')}_{letter}",
                    weight,
                    f"weight of {letter}, {key}",
                    f"{letter} 的权重，{zh[key]}",
                )
                for key, weights in found.items()
                for letter, weight in zip(letters, weights, strict=True)
            ),
        ],
        figures=[
            Bars(
                title=f"Weight of each response: sessions A and {letters}",
                x="how sessions are used",
                y="share of the loss",
                groups=list(found),
                series={
                    letter: [weights[i] for weights in found.values()]
                    for i, letter in enumerate(letters)
                },
            )
        ],
        claims=[
            claim(
                (
                    "The article (zhihu 651747035), for sessions A and A-B-C with a mean over "
                    "samples: the responses count 2/3, 1/6, 1/6 in complete sessions and 17/24, "
                    "5/24, 1/12 if sessions are cut after each turn.",
                    "文章（知乎 651747035），会话 A 与 A-B-C，按样本平均：完整会话中回答的权重为 "
                    "2/3、1/6、1/6；每轮切分后为 17/24、5/24、1/12。",
                ),
                (
                    f"{_listed(a)}, and {_listed(b)}; with a mean over tokens, which training "
                    f"here uses, {_listed(found['complete, mean of tokens'])} in complete "
                    "sessions.",
                    f"分别为 {_listed(a)} 与 {_listed(b)}；本项目的训练按词元平均，完整会话为 "
                    f"{_listed(found['complete, mean of tokens'])}。",
                ),
                "reproduced" if exact else ("direction" if not usual else "not"),
            )
        ],
    )


def _talk(letters: str) -> Conversation:
    messages = []
    for letter in letters:
        messages += [
            {"role": "user", "content": "question"},
            {"role": "assistant", "content": letter},
        ]
    return Conversation(messages=messages, tools=None, location=f"session {letters}")


def _ids(letters: str, tokenizer: Tokenizer) -> list[int]:
    return [tokenizer.encode(letter)[0] for letter in letters]


def _weights(
    samples: list[Sample], letters: str, tokenizer: Tokenizer, *, by_token: bool
) -> list[float]:
    """Returns each response's share of the loss, whose tokens are a letter and its end of turn."""
    weights = dict.fromkeys(_ids(letters, tokenizer), 0.0)
    total = sum(s.num_trained for s in samples)
    for sample in samples:
        share = 1 / total if by_token else 1 / len(samples) / sample.num_trained
        for label in sample.labels:
            if label in weights:
                weights[label] += 2 * share
    return list(weights.values())


def _near(found: list[float], expected: tuple[float, ...]) -> bool:
    return len(found) == len(expected) and all(
        abs(a - b) < 1e-9 for a, b in zip(found, expected, strict=True)
    )


def _listed(weights: list[float]) -> str:
    return ", ".join(f"{w:.3f}" for w in weights)


LAB = Lab(
    name="sft-weights",
    rows=(36,),
    chapter="training",
    title=Text("SFT: what is trained, and how much it counts", "SFT：训练什么，各占多少权重"),
    seconds=3,
    parameters=Parameters,
    run=run,
)
