"""Writes the Chinese texts and instruction rows of the recipes `continue-zh` and `sft-zh`.

    python tools/zh_data.py            # writes recipes/data/zh_*.jsonl, the same for the same seed

zh_text.jsonl     documents: sentences of `zh_tables.py`, and prose of the Chinese docs pages
zh_train.jsonl    questions on the tables with their answers, three phrasings of each fact
zh_heldout.jsonl  one more phrasing of each fact, with the `key` that a right answer contains
"""

import argparse
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import zh_tables
from json_lines import write

ROOT = Path(__file__).parents[1]
DATA = ROOT / "recipes" / "data"
SENTENCES_PER_DOCUMENT = 6
PREFIXES = ("", "", "请问，", "你知道吗，", "告诉我，", "我想知道，")
"""What a question begins with, chosen at random for each row."""
PROSE = re.compile(r"[\u4e00-\u9fff].*[。！？：]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Topic:
    """How the rows of a table are written; `{0}` is the first field of a row, and so on.

    Attributes:
        rows: the table's rows.
        texts: sentences that state a row.
        questions: phrasings of a question to train on.
        heldout: the phrasing to evaluate on.
        answer: the answer to each phrasing.
        key: the field that a right answer contains.
    """

    rows: Sequence[tuple[str, ...]]
    texts: Sequence[str]
    questions: Sequence[str]
    heldout: str
    answer: str
    key: int


TOPICS = {
    "country": Topic(
        rows=zh_tables.rows(zh_tables.COUNTRIES),
        texts=(
            "{0}位于{2}，首都是{1}，那里的人主要说{3}。说起{0}，人们会想到{4}。",
            "{1}是{0}的首都。{0}在{2}，通用{3}，以{4}闻名。",
            "去{0}旅行，可以先到首都{1}。当地使用{3}，最有名的是{4}。",
        ),
        questions=("{0}的首都是哪里？", "{0}的首都叫什么？", "哪座城市是{0}的首都？"),
        heldout="{0}的首都在哪儿？",
        answer="{0}的首都是{1}。",
        key=1,
    ),
    "province": Topic(
        rows=zh_tables.rows(zh_tables.PROVINCES),
        texts=(
            "{0}省位于中国{3}地区，简称{1}，省会是{2}，以{4}著称。",
            "{2}是{0}省的省会。{0}省简称{1}，在{3}，那里有{4}。",
            "到了{3}的{0}省，不能错过{4}。省会{2}交通方便，车牌上的简称是{1}。",
        ),
        questions=("{0}省的省会是哪里？", "{0}省的省会叫什么？", "哪座城市是{0}省的省会？"),
        heldout="{0}省的省会在哪儿？",
        answer="{0}省的省会是{2}。",
        key=2,
    ),
    "solar_term": Topic(
        rows=zh_tables.rows(zh_tables.SOLAR_TERMS),
        texts=(
            "{0}是二十四节气之一，在{1}。{2}。",
            "每年{1}是{0}，这时{2}。",
            "农历的节气里，{0}落在{1}，意思是{2}。",
        ),
        questions=("{0}在什么时候？", "{0}是哪一天前后？", "节气{0}大约在几月几日？"),
        heldout="{0}是什么时候？",
        answer="{0}在{1}。",
        key=1,
    ),
    "element": Topic(
        rows=zh_tables.rows(zh_tables.ELEMENTS),
        texts=(
            "{0}的元素符号是{1}，原子序数是{2}。{0}是{3}。",
            "{1}是{0}的符号，{0}排在元素周期表第{2}位，{3}。",
            "在元素周期表中，第{2}号元素是{0}，写作{1}。它的特点：{3}。",
        ),
        questions=("{0}的元素符号是什么？", "{0}元素用什么符号表示？", "怎样写{0}的元素符号？"),
        heldout="{0}的符号怎么写？",
        answer="{0}的元素符号是{1}。",
        key=1,
    ),
    "animal": Topic(
        rows=zh_tables.rows(zh_tables.ANIMALS),
        texts=(
            "{0}属于{1}，生活在{3}，主要吃{2}。它的特点是{4}。",
            "在{3}可以见到{0}。{0}是{1}，以{2}为食，{4}。",
            "{0}爱吃{2}。作为{1}，它住在{3}，{4}。",
        ),
        questions=("{0}吃什么？", "{0}主要吃什么？", "{0}以什么为食？"),
        heldout="{0}爱吃什么？",
        answer="{0}主要吃{2}。",
        key=2,
    ),
    "person": Topic(
        rows=zh_tables.rows(zh_tables.PEOPLE),
        texts=(
            "{0}是{1}的{2}，{3}。",
            "{1}有一位{2}叫{0}，他{3}。",
            "说到{1}的{2}，人们会想起{0}：{3}。",
        ),
        questions=("{0}是谁？", "{0}是怎样的人？", "{0}是什么人？"),
        heldout="{0}是做什么的？",
        answer="{0}是{1}的{2}，{3}。",
        key=2,
    ),
    "idiom": Topic(
        rows=zh_tables.rows(zh_tables.IDIOMS),
        texts=(
            "成语{0}的意思是{1}。例如：{2}。",
            "{0}这个成语比喻{1}。可以这样用：{2}。",
            "人们常说：{2}。这里的{0}，是说{1}。",
        ),
        questions=("{0}是什么意思？", "成语{0}怎么解释？", "成语{0}比喻什么？"),
        heldout="{0}说的是什么？",
        answer="{0}的意思是{1}。",
        key=1,
    ),
    "dish": Topic(
        rows=zh_tables.rows(zh_tables.DISHES),
        texts=(
            "{0}是一道{1}，用{2}做成，味道{3}。",
            "做{0}要准备{2}。这道{1}的味道是{3}。",
            "{1}里有一道{0}，主料是{2}，吃起来{3}。",
        ),
        questions=("{0}是什么菜？", "{0}属于哪种菜？", "{0}是哪里的菜？"),
        heldout="{0}算什么菜？",
        answer="{0}是一道{1}，用{2}做成。",
        key=1,
    ),
    "poem": Topic(
        rows=zh_tables.rows(zh_tables.POEMS),
        texts=(
            "《{0}》是{2}诗人{1}的作品：{3}",
            "{2}的{1}写过一首《{0}》。诗中说：{3}",
            "{3}这首诗的题目是《{0}》，作者是{2}的{1}。",
        ),
        questions=("《{0}》是谁写的？", "《{0}》的作者是谁？", "谁写了《{0}》这首诗？"),
        heldout="《{0}》的作者叫什么？",
        answer="《{0}》是{2}诗人{1}写的。",
        key=1,
    ),
}


def documents(seed: int) -> list[dict[str, str]]:
    """Returns documents of a few sentences on rows of the same table, in random order."""
    rng, found = random.Random(seed), []
    for name, topic in TOPICS.items():
        for pattern in topic.texts:
            sentences = [pattern.format(*row) for row in topic.rows]
            rng.shuffle(sentences)
            for start in range(0, len(sentences), SENTENCES_PER_DOCUMENT):
                text = "\n".join(sentences[start : start + SENTENCES_PER_DOCUMENT])
                found.append({"id": name, "text": text})
    rng.shuffle(found)
    return found


def docs_pages(paths: Iterable[Path]) -> Iterator[dict[str, str]]:
    """Yields the prose of Chinese Markdown pages, a document a page."""
    for path in paths:
        text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        blocks = (" ".join(block.split()) for block in text.split("\n\n"))
        prose = [b for b in blocks if PROSE.search(b) and not b.startswith(("|", "#", "!"))]
        if prose:
            plain = re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", "\n".join(prose)).replace("`", "")
            yield {
                "id": "docs",
                "text": re.sub(r"(?<=[\u4e00-\u9fff，。；、]) (?=[\u4e00-\u9fff])", "", plain),
            }


def instructions(seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Returns the rows to train on and the held-out ones, each in random order."""
    rng = random.Random(seed)
    train, heldout = [], []
    for name, topic in TOPICS.items():
        for row in topic.rows:
            answer = topic.answer.format(*row)
            for question in topic.questions:
                prompt = rng.choice(PREFIXES) + question.format(*row)
                train.append({"id": name, "prompt": prompt, "completion": answer})
            prompt = rng.choice(PREFIXES) + topic.heldout.format(*row)
            asked = {"id": name, "prompt": prompt, "completion": answer}
            heldout.append(asked | {"key": row[topic.key]})
    rng.shuffle(train)
    rng.shuffle(heldout)
    return train, heldout


def main() -> None:
    """Writes the three files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=DATA)
    options = parser.parse_args()
    pages = [ROOT / "README.zh-CN.md", *sorted((ROOT / "docs").glob("*.zh.md"))]
    train, heldout = instructions(options.seed)
    write(options.output / "zh_text.jsonl", [*documents(options.seed), *docs_pages(pages)])
    write(options.output / "zh_train.jsonl", train)
    write(options.output / "zh_heldout.jsonl", heldout)


if __name__ == "__main__":
    main()
