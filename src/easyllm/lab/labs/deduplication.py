"""Near-duplicates: which pairs MinHash LSH finds, and test questions inside training text."""

import random
from typing import ClassVar

from pydantic import Field, PositiveInt

from easyllm.core.json_types import JsonObject
from easyllm.corpus.decontaminate import Decontaminator
from easyllm.corpus.dedup.config import DedupConfig, MinHashConfig, collision_probability
from easyllm.corpus.dedup.deduplicate import deduplicate
from easyllm.corpus.dedup.minhash import jaccard
from easyllm.corpus.document import Document
from easyllm.lab.lab import Lab, LabConfig, Lines, Result, Text, claim, number


class Parameters(LabConfig):
    """Parameters of the lab."""

    quick_values: ClassVar[JsonObject] = {"texts": 20}

    texts: PositiveInt = Field(default=120, ge=10, le=5000, description="Original texts.")
    bands: PositiveInt = Field(default=20, le=200, description="Bands b.")
    rows: PositiveInt = Field(default=5, le=50, description="Rows of a band r.")
    threshold: float = Field(default=0.7, gt=0, le=1, description="Similarity that is removed.")


def run(parameters: Parameters) -> Result:
    """Plants copies with more and more changed words, and test questions; looks for both."""
    draw = random.Random(parameters.seed)
    config = MinHashConfig(
        bands=parameters.bands, rows=parameters.rows, threshold=parameters.threshold
    )
    originals = [" ".join(_word(draw) for _ in range(120)) for _ in range(parameters.texts)]
    changes = (0, 1, 2, 4, 6, 10, 16, 24)
    documents, planted = [], []
    for number_of, text in enumerate(originals):
        documents.append(Document(id=f"o{number_of}", source="lab", text=text))
        count = changes[number_of % len(changes)]
        copy = _changed(text, count, draw)
        planted.append((count, jaccard(text, copy, config)))
        documents.append(Document(id=f"c{number_of}", source="lab", text=copy))
    found = deduplicate(documents, DedupConfig(steps=(config,)))
    kept = {document.id for document in found.documents}
    by_change: dict[int, list[tuple[float, bool]]] = {count: [] for count in changes}
    for number_of, (count, similarity) in enumerate(planted):
        by_change[count].append((similarity, f"c{number_of}" not in kept))
    seen = sorted(
        (sum(s for s, _ in each) / len(each), sum(r for _, r in each) / len(each))
        for each in by_change.values()
        if each
    )
    above = [r for each in by_change.values() for s, r in each if s >= parameters.threshold]
    below = [r for each in by_change.values() for s, r in each if s < parameters.threshold]
    originals_lost = sum(f"o{i}" not in kept for i in range(len(originals)))
    curve = [
        (s / 50, collision_probability(s / 50, parameters.bands, parameters.rows))
        for s in range(51)
    ]
    eighty, fifty = (collision_probability(s, 20, 5) for s in (0.8, 0.5))
    questions = [" ".join(_word(draw) for _ in range(20)) for _ in range(5)]
    index = Decontaminator.from_texts({"test": questions})
    inside = [
        Document(id=str(i), source="lab", text=f"{originals[i]} {question}")
        for i, question in enumerate(questions)
    ]
    caught = sum(index.check(document) is not None for document in inside)
    false = sum(index.check(document) is not None for document in documents)
    return Result(
        numbers=[
            number(
                "p_80",
                eighty,
                "P(candidate), similarity 0.8, 20 bands of 5",
                "相似度 0.8、20 段 × 5 行时成为候选的概率",
                5,
            ),
            number("p_50", fifty, "P(candidate), similarity 0.5", "相似度 0.5 时"),
            number(
                "removed_above",
                sum(above),
                f"copies removed of {len(above)} above the threshold",
                f"阈值以上的 {len(above)} 个副本中删除的个数",
            ),
            number(
                "removed_below",
                sum(below),
                f"copies removed of {len(below)} below it",
                f"阈值以下的 {len(below)} 个副本中删除的个数",
            ),
            number("originals_lost", originals_lost, "originals removed", "被删除的原文"),
            number(
                "caught",
                caught,
                f"of {len(questions)} planted test questions found",
                f"{len(questions)} 个埋入的测试题中找到的个数",
            ),
            number(
                "false_alarms",
                false,
                f"of {len(documents)} other documents rejected",
                f"其他 {len(documents)} 篇文档中误拒的篇数",
            ),
        ],
        figures=[
            Lines(
                title=f"{parameters.bands} bands of {parameters.rows} rows",
                x="Jaccard similarity",
                y="probability or share",
                lines={"P(candidate) = 1 − (1 − s^r)^b": curve, "copies removed": seen},
            ),
        ],
        claims=[
            claim(
                (
                    "A pair of similarity s becomes a candidate with probability 1 − (1 − s^r)^b: "
                    "0.99964 at 0.8 and 0.4701 at 0.5 for 20 bands of 5. The article of topic 32: "
                    "a text repeated ten times is regenerated about a thousand times as often.",
                    "相似度为 s 的一对以概率 1 − (1 − s^r)^b 成为候选：20 段 × 5 行时 0.8 为 "
                    "0.99964，"
                    "0.5 为 0.4701。第 32 条的文章：重复十次的文本被复述的次数约为千倍。",
                ),
                (
                    f"{eighty:.5f} and {fifty:.4f}; {sum(above)} of {len(above)} copies above "
                    f"{parameters.threshold:g} are removed, {sum(below)} of {len(below)} below, "
                    f"no original ({originals_lost}); {caught} of {len(questions)} test questions "
                    f"are found.",
                    f"{eighty:.5f} 与 {fifty:.4f}；相似度高于 {parameters.threshold:g} 的 "
                    f"{len(above)} 个副本删除 {sum(above)} 个，低于的 {len(below)} 个删除 "
                    f"{sum(below)} 个，原文 {originals_lost} 个；{len(questions)} 个测试题找到 "
                    f"{caught} 个。",
                ),
                "reproduced" if abs(eighty - 0.99964) < 1e-5 and not sum(below) else "direction",
                (
                    "Regeneration needs a trained model and is not measured here.",
                    "复述需要训练好的模型，这里没有测量。",
                ),
            )
        ],
    )


def _word(draw: random.Random) -> str:
    return "".join(draw.choice("abcdefghijklmnop") for _ in range(draw.randint(3, 7)))


def _changed(text: str, count: int, draw: random.Random) -> str:
    """Returns the text with `count` of its words replaced."""
    words = text.split()
    for place in draw.sample(range(len(words)), count):
        words[place] = _word(draw)
    return " ".join(words)


LAB = Lab(
    name="deduplication",
    rows=(72,),
    chapter="data",
    title=Text("Near-duplicates and test questions", "近似重复与测试题"),
    seconds=4,
    parameters=Parameters,
    run=run,
)
