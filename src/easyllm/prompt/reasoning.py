"""Reasoning with prompts: chain of thought, votes, least-to-most, tree of thought.

few-shot       examples with their steps (Wei et al. 2022, arXiv 2201.11903)
zero-shot      "Let's think step by step", then the answer (Kojima et al. 2022, arXiv 2205.11916)
vote           most frequent answer of several samples (Wang et al. 2022, arXiv 2203.11171)
least-to-most  subquestions, answered one after the other (Zhou et al. 2022, arXiv 2205.10625)
tree           steps that are proposed, valued and pruned (Yao et al. 2023, arXiv 2305.10601)

All methods work on many questions at once, and report the tokens that they have spent.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

from easyllm.core.errors import ConfigError
from easyllm.prompt.ask import Ask, Asker, Reply
from easyllm.prompt.extract import AnswerKind, extract, numbers

Method = Literal["direct", "few-shot", "zero-shot", "least-to-most", "tree"]
Language = Literal["en", "zh"]
METHODS: tuple[Method, ...] = ("direct", "few-shot", "zero-shot", "least-to-most", "tree")


@dataclass(frozen=True, slots=True)
class Example:
    """A question with its steps and its answer."""

    question: str
    steps: str
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Reasoned:
    """The answer to a question.

    Attributes:
        answer: the answer; None if no reply has one.
        text: the reply, or the steps, that it was read from.
        agreement: share of the replies with an answer that agree with it; None without a vote.
        votes: number of replies by answer.
        unparsed: number of replies without an answer.
        truncated: number of replies that reached the maximum length.
        tokens: number of tokens that were generated for this question.
    """

    answer: str | None
    text: str
    agreement: float | None = None
    votes: dict[str, int] = field(default_factory=dict)
    unparsed: int = 0
    truncated: int = 0
    tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Phrases:
    """What the methods say, in one language."""

    think: str
    conclude: str
    direct: str
    divide: str
    solve: str
    propose: str
    value: str


PHRASES: dict[Language, Phrases] = {
    "en": Phrases(
        think="Let's think step by step.",
        conclude="Therefore, the answer is",
        direct="Reply with the answer only.",
        divide="Divide this problem into simpler questions, each on a numbered line, the last of "
        "which is the problem itself. Do not answer them.",
        solve="Question: ",
        propose="Write only the next step of the solution, in one line. If the problem is solved, "
        "write: The answer is ...",
        value="Rate from 1 to 10 how likely these steps lead to the right answer. Reply with the "
        "number only.",
    ),
    "zh": Phrases(
        think="让我们一步一步地思考。",
        conclude="因此，答案是",
        direct="只回答答案。",
        divide="把这个问题分解成更简单的问题，每行一个并编号，最后一个就是原问题。不要回答。",
        solve="问题：",
        propose="只写出解答的下一步，一行。如果问题已经解决，请写：答案是……",
        value="请用 1 到 10 评价这些步骤得到正确答案的可能性。只回答数字。",
    ),
}


def check_method(
    method: Method, questions: Sequence[str], *, examples: int = 0, samples: int = 1
) -> None:
    """Checks what a method is given, before a model is loaded.

    Args:
        method, questions, samples: as for `reason`.
        examples: number of the examples.

    Raises:
        ConfigError: an option does not fit the method, or a question is empty.
    """
    if any(not question.strip() for question in questions):
        raise ConfigError("a question is empty; give one that the model can answer")
    if method == "few-shot" and not examples:
        raise ConfigError("few-shot needs examples; give --examples FILE, or use zero-shot")
    if examples and method != "few-shot":
        raise ConfigError(f"{method} reads no examples; leave them out, or use few-shot")
    if samples > 1 and method in ("tree", "least-to-most"):
        raise ConfigError(f"a vote is of independent replies, not of {method}; set samples to 1")


def reason(
    ask: Asker,
    questions: Sequence[str],
    method: Method = "zero-shot",
    *,
    kind: AnswerKind = "number",
    examples: Sequence[Example] = (),
    samples: int = 1,
    temperature: float = 0.7,
    language: Language = "en",
    breadth: int = 2,
    depth: int = 4,
) -> list[Reasoned]:
    """Answers questions with a method.

    Args:
        ask: asks the model.
        questions: the questions.
        method: see the module.
        kind: what an answer is.
        examples: few-shot: the examples.
        samples: above 1, a vote of so many replies (not of a tree or least-to-most).
        temperature: of the samples and of a tree's proposals.
        language: of the phrases.
        breadth, depth: tree: states that are kept, and steps.

    Raises:
        ConfigError: an option does not fit the method.
    """
    check_method(method, questions, examples=len(examples), samples=samples)
    words = PHRASES[language]
    if method == "tree":
        return _tree(ask, questions, kind, words, breadth, depth, temperature)
    if method == "least-to-most":
        return _least_to_most(ask, questions, kind, words)
    heat = temperature if samples > 1 else 0.0
    if method == "zero-shot":
        return _zero_shot(ask, questions, kind, words, samples, heat)
    prompts = [
        Ask(f"{question}\n{words.direct}" if method == "direct" else shown(examples, question))
        for question in questions
    ]
    return [
        vote([(r.text, extract(kind, r.text), r.tokens, r.truncated) for r in replies])
        for replies in ask(prompts, n=samples, temperature=heat)
    ]


def shown(examples: Sequence[Example], question: str) -> str:
    """Returns a question after examples with their steps."""
    parts = [f"Q: {e.question}\nA: {e.steps} The answer is {e.answer}." for e in examples]
    return "\n\n".join([*parts, f"Q: {question}\nA:"])


def vote(replies: Sequence[tuple[str, str | None, int, bool]]) -> Reasoned:
    """Returns the most frequent answer; of equally frequent ones, the first.

    Replies without an answer have no vote, and are counted.

    Args:
        replies: text, answer, number of tokens and truncation of each.
    """
    keys = [None if answer is None else vote_key(answer) for _, answer, _, _ in replies]
    counts = Counter(key for key in keys if key is not None)
    best = counts.most_common(1)[0][0] if counts else None
    chosen = keys.index(best) if best is not None else 0
    names = {key: answer for key, (_, answer, _, _) in zip(keys, replies, strict=True) if answer}
    return Reasoned(
        answer=replies[chosen][1] if best is not None else None,
        text=replies[chosen][0],
        agreement=counts[best] / counts.total() if best is not None and len(replies) > 1 else None,
        votes={names[key]: count for key, count in counts.most_common()},
        unparsed=sum(key is None for key in keys),
        truncated=sum(cut for _, _, _, cut in replies),
        tokens=sum(tokens for _, _, tokens, _ in replies),
    )


def vote_key(answer: str) -> str:
    """Returns the form in which answers agree: a number by its value, else lowercase text.

    >>> vote_key("1,000.0") == vote_key("1000"), vote_key(" Paris.")
    (True, 'paris')
    """
    found = numbers(answer)
    if len(found) == 1 and re.fullmatch(r"[\s$€¥￥£]*[-−]?[\d,.]+\s*", answer):
        return str(Fraction(found[0]))
    return answer.strip().strip(".。").lower()


def select_examples(
    pool: Sequence[Example],
    score: Callable[[Sequence[Example]], float],
    *,
    count: int,
) -> tuple[list[Example], list[float]]:
    """Selects examples greedily: in each round, the one that raises a metric most.

    It stops early if no further example raises the metric.

    Args:
        pool: the candidates.
        score: the metric of a list of examples, on questions that are not in the pool.
        count: maximum number of examples.

    Returns:
        The examples, and the metric with the first k of them, from k = 0 on.
    """
    chosen, history = list[Example](), [score([])]
    while len(chosen) < count:
        rest = [example for example in pool if example not in chosen]
        values = [score([*chosen, example]) for example in rest]
        if not values or max(values) <= history[-1]:
            break
        chosen.append(rest[values.index(max(values))])
        history.append(max(values))
    return chosen, history


def _zero_shot(
    ask: Asker,
    questions: Sequence[str],
    kind: AnswerKind,
    words: Phrases,
    samples: int,
    temperature: float,
) -> list[Reasoned]:
    """Lets the model think, then asks for the answer after its thoughts."""
    starts = [Ask(question, words.think) for question in questions]
    thoughts = ask(starts, n=samples, temperature=temperature)
    flat = [
        Ask(question, f"{words.think}{reply.text.rstrip()}\n{words.conclude}")
        for question, replies in zip(questions, thoughts, strict=True)
        for reply in replies
    ]
    ends = iter(ask(flat))
    found = []
    for replies in thoughts:
        group = []
        for reply in replies:
            (end,) = next(ends)
            text = f"{words.think}{reply.text.rstrip()}\n{words.conclude}{end.text}"
            tokens = reply.tokens + end.tokens
            answer = extract(kind, f"{words.conclude}{end.text}")
            group.append((text, answer, tokens, reply.truncated))
        found.append(vote(group))
    return found


def _least_to_most(
    ask: Asker, questions: Sequence[str], kind: AnswerKind, words: Phrases
) -> list[Reasoned]:
    """Divides each problem, and answers its parts in order, each after those before it."""
    divided = ask([Ask(f"{question}\n{words.divide}") for question in questions])
    parts = [
        [*subquestions(reply.text), question]
        for question, (reply,) in zip(questions, divided, strict=True)
    ]
    texts = [f"{question}\n" for question in questions]
    tokens = [reply.tokens for (reply,) in divided]
    cut = [int(reply.truncated) for (reply,) in divided]
    last: list[str] = ["" for _ in questions]
    for step in range(max(map(len, parts), default=0)):
        open_ones = [n for n, each in enumerate(parts) if step < len(each)]
        prompts = [f"{texts[n]}\n{words.solve}{parts[n][step]}" for n in open_ones]
        for n, prompt, (reply,) in zip(
            open_ones, prompts, ask([Ask(p) for p in prompts]), strict=True
        ):
            texts[n] = f"{prompt}\n{reply.text.strip()}\n"
            last[n], tokens[n], cut[n] = (
                reply.text,
                tokens[n] + reply.tokens,
                cut[n] + reply.truncated,
            )
    answers = [extract(kind, text) for text in last]
    return [
        Reasoned(
            answer=answer,
            text=text.strip(),
            unparsed=int(answer is None),
            truncated=truncated,
            tokens=spent,
        )
        for answer, text, truncated, spent in zip(answers, texts, cut, tokens, strict=True)
    ]


def subquestions(text: str) -> list[str]:
    """Returns the numbered lines of a reply, at most eight, without the last: the problem itself.

    >>> subquestions("1. How many?\\n2) How much?\\n3. The problem")
    ['How many?', 'How much?']
    """
    found = re.findall(r"^\s*\d+\s*[.)、:：]\s*(\S.*?)\s*$", text, re.MULTILINE)
    return [str(each) for each in found[:9][:-1]]


def _tree(
    ask: Asker,
    questions: Sequence[str],
    kind: AnswerKind,
    words: Phrases,
    breadth: int,
    depth: int,
    temperature: float,
) -> list[Reasoned]:
    """Searches breadth first: proposes steps, values the states, keeps the best `breadth`."""
    found = []
    for question in questions:
        states: list[tuple[float, tuple[str, ...]]] = [(0.0, ())]
        tokens = cut = 0
        for _ in range(depth):
            going = [(value, steps) for value, steps in states if not _solved(kind, steps)]
            if not going:
                break
            asks = [Ask(f"{_state(question, steps)}\n{words.propose}") for _, steps in going]
            replies = ask(asks, n=breadth, temperature=temperature)
            tokens += sum(r.tokens for group in replies for r in group)
            cut += sum(r.truncated for group in replies for r in group)
            grown = dict.fromkeys(
                (*steps, _line(reply))
                for (_, steps), group in zip(going, replies, strict=True)
                for reply in group
                if _line(reply)
            )
            values, spent = _values(ask, question, list(grown), words)
            tokens += spent
            done = [state for state in states if _solved(kind, state[1])]
            every = [*done, *zip(values, grown, strict=True)]
            states = sorted(every, key=lambda state: -state[0])[:breadth] or states
        solved = [steps for _, steps in states if _solved(kind, steps)]
        best = solved[0] if solved else states[0][1]
        answer = extract(kind, best[-1]) if best else None
        found.append(
            Reasoned(
                answer=answer,
                text="\n".join(best),
                unparsed=int(answer is None),
                truncated=cut,
                tokens=tokens,
            )
        )
    return found


def _values(
    ask: Asker, question: str, states: Sequence[tuple[str, ...]], words: Phrases
) -> tuple[list[float], int]:
    """Returns the model's rating of each state (0 if it gives none), and the tokens spent."""
    if not states:
        return [], 0
    replies = ask([Ask(f"{_state(question, steps)}\n{words.value}") for steps in states])
    values = []
    for (reply,) in replies:
        rated = numbers(reply.text)
        values.append(float(rated[0]) if rated and 1 <= float(rated[0]) <= 10 else 0.0)
    return values, sum(reply.tokens for (reply,) in replies)


def _state(question: str, steps: Sequence[str]) -> str:
    return "\n".join([question, *(f"{n}. {step}" for n, step in enumerate(steps, start=1))])


def _line(reply: Reply) -> str:
    return next((line.strip() for line in reply.text.splitlines() if line.strip()), "")


def _solved(kind: AnswerKind, steps: Sequence[str]) -> bool:
    """Whether the last step says that it is the answer, and has one."""
    says = bool(steps) and re.search(r"answer is|答案是|\\boxed", steps[-1], re.IGNORECASE)
    return bool(says) and extract(kind, steps[-1]) is not None


__all__ = [
    "METHODS",
    "Example",
    "Method",
    "Reasoned",
    "check_method",
    "reason",
    "select_examples",
    "shown",
    "subquestions",
    "vote",
    "vote_key",
]
