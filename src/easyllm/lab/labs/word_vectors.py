"""Word vectors: a lookup is a product with a one-hot vector; similar contexts make neighbours."""

import random
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field, PositiveInt

from easyllm.core.json_types import JsonObject
from easyllm.embed.skip_gram import SkipGram, train_word_vectors
from easyllm.embed.word_config import SkipGramConfig
from easyllm.embed.word_vectors import WordVectors
from easyllm.lab.lab import Grid, Lab, LabConfig, Lines, Result, Text, claim, number

GROUPS = {
    "animals": ("cat", "dog", "fox", "cow", "hen"),
    "cities": ("rome", "oslo", "lima", "kyiv", "bern"),
    "foods": ("rice", "soup", "bread", "cheese", "plums"),
    "colours": ("red", "green", "blue", "white", "brown"),
}
TEMPLATES = (
    "the {colours} {animals} eats {foods} every day",
    "we travel to {cities} by train and buy {foods}",
    "in {cities} a {colours} home has a garden with one {animals}",
    "my {animals} sleeps next to the {colours} chair",
    "people from {cities} cook {foods} with salt",
)


class Parameters(LabConfig):
    """Parameters of the lab."""

    quick_values: ClassVar[JsonObject] = {"sentences": 200, "epochs": (1, 4)}

    sentences: PositiveInt = Field(
        default=1000, ge=50, le=100_000, description="Sentences of the training text."
    )
    dim: PositiveInt = Field(default=16, le=300, description="Dimensions of the vectors.")
    window: PositiveInt = Field(default=3, le=10, description="Reach of a context, in words.")
    epochs: tuple[PositiveInt, ...] = Field(
        default=(1, 2, 4, 8, 16),
        min_length=2,
        max_length=8,
        description="Passes over the text of each training run.",
    )


def run(parameters: Parameters) -> Result:
    """Trains vectors on sentences whose words of one group stand in the same places."""
    table = SkipGram(50, parameters.dim, torch.Generator().manual_seed(parameters.seed)).centre
    ids = torch.tensor([3, 0, 49, 3])
    one_hot = torch.nn.functional.one_hot(ids, 50).float()
    apart = float((table(ids) - one_hot @ table.weight).detach().abs().max())
    sentences = _sentences(parameters.sentences, parameters.seed)
    curve, vectors = [], None
    for epochs in parameters.epochs:
        vectors = train_word_vectors(sentences, _config(parameters, epochs))
        curve.append((float(epochs), _purity(vectors)))
    assert vectors is not None, "there is at least one number of epochs"
    words = [word for group in GROUPS.values() for word in group]
    guess = (len(GROUPS["foods"]) - 1) / (len(words) - 1)
    purity = curve[-1][1]
    return Result(
        numbers=[
            number("apart", apart, "lookup against one-hot · W", "查表与 one-hot · W 之差", 2),
            number("purity", purity, "neighbours of the same group", "近邻属于同组的比例"),
            number("guess", guess, "the same by chance", "随机时的比例"),
            number("vocabulary", len(vectors.words), "words with a vector", "有向量的词数"),
        ],
        figures=[
            Lines(
                title="Neighbours of the same group",
                x="passes over the text",
                y="share of the 4 nearest",
                lines={"trained": curve, "chance": [(e, guess) for e, _ in curve]},
                log_x=True,
                marks=True,
            ),
            Grid(
                title="Cosines after the last run",
                x="word",
                y="word",
                values=_cosines(vectors, words),
                x_labels=words,
                y_labels=words,
            ),
        ],
        claims=[
            claim(
                (
                    "An embedding layer is a matrix product with one-hot vectors, done as a "
                    "lookup.",
                    "嵌入层就是与 one-hot 向量的矩阵乘积，只是用查表实现。",
                ),
                (f"The two differ by {apart:g}.", f"两者相差 {apart:g}。"),
                "reproduced" if apart == 0 else "not",
            ),
            claim(
                (
                    "Skip-gram with negative sampling gives words of similar contexts similar "
                    "vectors.",
                    "带负采样的 skip-gram 使上下文相似的词得到相似的向量。",
                ),
                (
                    f"{purity:.0%} of the nearest 4 words are of the same group; by chance "
                    f"{guess:.0%}.",
                    f"最近的 4 个词有 {purity:.0%} 属于同组；随机时为 {guess:.0%}。",
                ),
                "reproduced" if purity > 3 * guess else "direction",
                (
                    "The sentences are made of templates: real text has weaker contexts.",
                    "句子由模板生成，真实文本的上下文规律更弱。",
                ),
            ),
        ],
    )


def _config(parameters: Parameters, epochs: int) -> SkipGramConfig:
    return SkipGramConfig(
        dim=parameters.dim,
        window=parameters.window,
        min_count=1,
        subsample=1.0,
        epochs=epochs,
        batch_size=512,
        seed=parameters.seed,
    )


def _sentences(count: int, seed: int) -> list[list[str]]:
    draw = random.Random(seed)
    return [
        draw.choice(TEMPLATES)
        .format(**{name: draw.choice(words) for name, words in GROUPS.items()})
        .split()
        for _ in range(count)
    ]


def _purity(vectors: WordVectors) -> float:
    """Returns the share of the nearest words, among all groups' words, of a word's own group."""
    all_words = {word for group in GROUPS.values() for word in group}
    hits = []
    for group in GROUPS.values():
        for word in group:
            near = [w for w, _ in vectors.neighbours([word], k=len(vectors.words) - 1)]
            best = [w for w in near if w in all_words][: len(group) - 1]
            hits.append(sum(w in group for w in best) / len(best))
    return sum(hits) / len(hits)


def _cosines(vectors: WordVectors, words: list[str]) -> list[list[float]]:
    rows = np.stack([vectors.vectors[vectors.number(word)] for word in words])
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    found: list[list[float]] = (rows @ rows.T).round(3).tolist()
    return found


LAB = Lab(
    name="word-vectors",
    rows=(4,),
    chapter="tokens",
    title=Text("Embeddings: lookups and neighbours", "嵌入：查表与近邻"),
    seconds=10,
    parameters=Parameters,
    run=run,
)
