"""Word vectors: the loss and its lookup, neighbours, analogies, files."""

import numpy as np
import pytest
import torch

from easyllm.core.errors import CheckpointError, ConfigError, DataError
from easyllm.embed.skip_gram import SkipGram, train_word_vectors
from easyllm.embed.word_config import SkipGramConfig
from easyllm.embed.word_vectors import WordVectors, words_of


def test_a_lookup_is_the_product_of_a_one_hot_vector_and_the_table():
    table = SkipGram(7, 3, torch.Generator().manual_seed(0)).centre
    ids = torch.tensor([3, 0, 6, 3])
    one_hot = torch.nn.functional.one_hot(ids, 7).float()
    assert torch.equal(table(ids), one_hot @ table.weight)


def test_the_loss_is_that_of_the_paper():
    model = SkipGram(5, 4, torch.Generator().manual_seed(1))
    torch.nn.init.normal_(model.context.weight, generator=torch.Generator().manual_seed(2))
    v, u = model.centre.weight, model.context.weight
    wanted = -torch.log(torch.sigmoid(u[2] @ v[0])) - torch.log(torch.sigmoid(-(u[3] @ v[0])))
    wanted = wanted - torch.log(torch.sigmoid(-(u[4] @ v[0])))
    found = model(torch.tensor([0]), torch.tensor([2]), torch.tensor([[3, 4]]))
    torch.testing.assert_close(found, wanted)


def sentences(seed=0, count=400):
    """Sentences in which words of the same group occur in the same places."""
    random = np.random.default_rng(seed)
    animals, cities = ["cat", "dog", "fox"], ["rome", "oslo", "lima"]
    for _ in range(count):
        yield f"the {random.choice(animals)} eats and sleeps".split()
        yield f"travel to {random.choice(cities)} by train".split()


def test_words_in_the_same_places_become_neighbours():
    config = SkipGramConfig(dim=16, min_count=1, subsample=1.0, epochs=4, batch_size=256)
    vectors = train_word_vectors(sentences(), config)
    assert {w for w, _ in vectors.neighbours(["cat"], k=2)} == {"dog", "fox"}
    assert {w for w, _ in vectors.neighbours(["oslo"], k=2)} == {"rome", "lima"}
    again = train_word_vectors(sentences(), config)
    np.testing.assert_array_equal(vectors.vectors, again.vectors)


def test_an_analogy_adds_and_subtracts():
    named = {"man": (1, 0, 0), "woman": (1, 1, 0), "king": (1, 0, 1), "queen": (1, 1, 1)}
    vectors = WordVectors(tuple(named), np.asarray(list(named.values()), np.float32))
    assert vectors.neighbours(["king", "woman"], ["man"], 1)[0][0] == "queen"
    with pytest.raises(ConfigError, match=r"'qeen' has no vector.*'queen'"):
        vectors.neighbours(["qeen"])
    with pytest.raises(ConfigError, match="no word"):
        vectors.neighbours([])


def test_files_and_too_little_text(tmp_path):
    vectors = WordVectors(("a", "茶"), np.eye(2, dtype=np.float32))
    vectors.save(tmp_path / "v")
    read = WordVectors.load(tmp_path / "v")
    assert read.words == vectors.words
    np.testing.assert_array_equal(read.vectors, vectors.vectors)
    (tmp_path / "v" / "words.txt").write_text("a\n")
    with pytest.raises(CheckpointError, match="1 words but"):
        WordVectors.load(tmp_path / "v")
    with pytest.raises(CheckpointError, match="no word vectors"):
        WordVectors.load(tmp_path)
    with pytest.raises(DataError, match="1 words occur at least 2 times"):
        train_word_vectors([["a", "a", "b"]], SkipGramConfig(min_count=2))
    assert words_of("Tea，绿茶 x") == ["tea", "绿", "茶", "x"]
