"""BLEU and ROUGE: clipped n-grams, the penalty of short answers, and what neither sees."""

from typing import ClassVar

from pydantic import Field, PositiveInt

from easyllm.core.json_types import JsonObject
from easyllm.evaluate.metric import Outcome, score, table
from easyllm.evaluate.text_metrics import bleu_details, modified_precision, text_metrics
from easyllm.lab.lab import Bars, Lab, LabConfig, Lines, Result, Text, claim, number

REFERENCE = (
    "the library opens at nine in the morning and closes at six in the evening on every day "
    "except sunday"
)
ANSWERS = {
    "the reference": REFERENCE,
    "a paraphrase": "except on sundays you can visit the library from nine until six",
    "wrong hours": REFERENCE.replace("nine", "ten").replace("six", "eight"),
    "words in any order": " ".join(sorted(REFERENCE.split())),
    "half of it": " ".join(REFERENCE.split()[:10]),
}
CHINESE = ("图书馆每天上午九点开门，下午六点关门。", "图书馆每天上午九点开放，傍晚六点闭馆。")
SHOWN = ("bleu", "rouge1", "rouge2", "rougeL")


class Parameters(LabConfig):
    """Parameters of the lab."""

    quick_values: ClassVar[JsonObject] = {"repeats": 7}

    repeats: PositiveInt = Field(
        default=7, ge=2, le=100, description="How often the degenerate answer repeats `the`."
    )


def run(parameters: Parameters) -> Result:
    """Scores answers of different faults against one reference."""
    count, total = modified_precision(
        " ".join(["the"] * parameters.repeats), ["the cat is on the mat"], 1
    )
    values = {name: _scores(answer, REFERENCE) for name, answer in ANSWERS.items()}
    lengths, words = [], REFERENCE.split()
    for kept in range(4, len(words) + 1):
        answer = " ".join(words[:kept])
        outcome = Outcome(answer=answer, references=(REFERENCE,))
        details = bleu_details(table(text_metrics()["bleu"], [outcome]))
        lengths.append((kept / len(words), float(details["brevity_penalty"])))
    chinese = {tokens: _chinese(tokens) for tokens in ("en", "zh")}
    half = values["half of it"]
    return Result(
        numbers=[
            number(
                "clipped",
                count,
                f"clipped count of {parameters.repeats} × `the`",
                f"{parameters.repeats} 个 the 的截断计数",
            ),
            number("of", total, "of", "总数"),
            *(
                number(
                    f"{name.replace(' ', '_')}_{metric}",
                    values[name][metric],
                    f"{metric}, {name}",
                    f"{metric}，{zh}",
                )
                for name, zh in (
                    ("a paraphrase", "改写"),
                    ("wrong hours", "时间错误"),
                    ("words in any order", "打乱词序"),
                    ("half of it", "只有一半"),
                )
                for metric in ("bleu", "rougeL")
            ),
            number(
                "chinese_zh",
                chinese["zh"],
                "ROUGE-L of the Chinese pair, by characters",
                "中文例句的 ROUGE-L，按字",
            ),
            number(
                "chinese_en",
                chinese["en"],
                "the same with the English tokenizer",
                "同上，使用英文分词",
            ),
        ],
        figures=[
            Bars(
                title="Scores by fault",
                x="answer",
                y="score (BLEU / 100)",
                groups=list(values),
                series={
                    metric: [
                        each[metric] / (100 if metric == "bleu" else 1) for each in values.values()
                    ]
                    for metric in SHOWN
                },
            ),
            Lines(
                title="Brevity penalty",
                x="length / length of the reference",
                y="factor on BLEU",
                lines={"exp(1 − r/c)": lengths},
            ),
        ],
        claims=[
            claim(
                (
                    "BLEU counts an n-gram at most as often as the reference has it: seven times "
                    "`the` scores 2/7; short answers are multiplied by exp(1 − r/c).",
                    "BLEU 对 n-gram 的计数不超过它在参考中的次数：七个 the 得 2/7；"
                    "短答案乘以 exp(1 − r/c)。",
                ),
                (
                    f"{count}/{total}; the first half of the reference has BLEU "
                    f"{half['bleu']:.0f} with all its n-grams right.",
                    f"{count}/{total}；参考的前一半 n-gram 全对，BLEU 只有 {half['bleu']:.0f}。",
                ),
                "reproduced" if count == 2 and total == parameters.repeats else "not",
            ),
            claim(
                (
                    "The article (zhihu 647310970) introduces BLEU as precision and ROUGE as "
                    "recall "
                    "of n-grams.",
                    "文章（知乎 647310970）把 BLEU 介绍为 n-gram 的精确率，ROUGE 为召回率。",
                ),
                (
                    f"Neither reads meaning: wrong hours have ROUGE-L "
                    f"{values['wrong hours']['rougeL']:.2f}, a right paraphrase "
                    f"{values['a paraphrase']['rougeL']:.2f}. Chinese needs a tokenizer of its "
                    f"own: "
                    f"{chinese['zh']:.2f} instead of {chinese['en']:.2f}.",
                    f"两者都不理解含义：时间错误的答案 ROUGE-L 为 "
                    f"{values['wrong hours']['rougeL']:.2f}，正确的改写只有 "
                    f"{values['a paraphrase']['rougeL']:.2f}。中文需要自己的分词："
                    f"{chinese['zh']:.2f}，否则为 {chinese['en']:.2f}。",
                ),
                "direction",
                (
                    "ROUGE here is the F1 of precision and recall, as rouge-score reports it.",
                    "这里的 ROUGE 是精确率与召回率的 F1，与 rouge-score 一致。",
                ),
            ),
        ],
    )


def _scores(answer: str, reference: str) -> dict[str, float]:
    outcome = Outcome(answer=answer, references=(reference,))
    metrics = text_metrics()
    return {name: score(metrics[name], table(metrics[name], [outcome])).value for name in SHOWN}


def _chinese(language: str) -> float:
    metric = text_metrics("zh" if language == "zh" else "en")["rougeL"]
    outcome = Outcome(answer=CHINESE[1], references=(CHINESE[0],))
    return score(metric, table(metric, [outcome])).value


LAB = Lab(
    name="bleu-rouge",
    rows=(55,),
    chapter="training",
    title=Text("BLEU and ROUGE, and what they miss", "BLEU 与 ROUGE，以及它们的盲区"),
    seconds=5,
    parameters=Parameters,
    run=run,
    module=("rouge_score", "eval"),
)
