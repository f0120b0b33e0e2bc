"""Transformer-XL's and DeBERTa's scores, pair by pair; pRMSNorm; the shrunk embedding gradient."""

import pytest
import torch
from torch.nn import functional as F

from easyllm.nn.config import PartialRMSNormConfig, RMSNormConfig
from easyllm.nn.norm import build_norm, deep_norm_constants
from easyllm.nn.position import build_position
from easyllm.nn.position_config import DebertaRelative, TransformerXL
from tiny_models import build_tiny

HEADS, DIM = 3, 4
WIDTH = HEADS * DIM


def position_of(config, seed=0):
    module = build_position(config, num_heads=HEADS, head_dim=DIM, causal=False).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    return module


def inputs(n_q=5, n_k=9):
    generator = torch.Generator().manual_seed(3)
    q, k = (torch.randn(HEADS, n, DIM, generator=generator).double() for n in (n_q, n_k))
    return q, k, torch.arange(n_k - n_q, n_k), torch.arange(n_k)


def test_transformer_xl_is_the_sum_of_its_four_terms():
    module = position_of(TransformerXL())
    q, k, query, key = inputs()
    scores = module.scores(q, k, query, key)
    w, u, v = module.distance_proj, module.content_bias, module.distance_bias
    frequencies = 10000.0 ** (-torch.arange(0, WIDTH, 2).double() / WIDTH)
    for i in range(len(query)):
        for j in range(len(key)):
            angles = float(query[i] - key[j]) * frequencies
            r = (w @ torch.cat([angles.sin(), angles.cos()])).view(HEADS, DIM)
            for h in range(HEADS):
                expected = q[h, i] @ k[h, j] + q[h, i] @ r[h] + u[h] @ k[h, j] + v[h] @ r[h]
                assert scores[h, i, j].item() == pytest.approx(expected.item(), abs=1e-9)


def test_deberta_equals_the_three_terms_of_its_equation():
    most = 3
    module = position_of(DebertaRelative(max_distance=most))
    q, k, query, key = inputs()
    scores = module.scores(q, k, query, key) * DIM**-0.5

    def delta(a, b):
        return 0 if a - b <= -most else 2 * most - 1 if a - b >= most else a - b + most

    keys = (module.distances @ module.key_proj.T).view(-1, HEADS, DIM)
    queries = (module.distances @ module.query_proj.T).view(-1, HEADS, DIM)
    for i, a in enumerate(query.tolist()):
        for j, b in enumerate(key.tolist()):
            for h in range(HEADS):
                expected = q[h, i] @ k[h, j] + q[h, i] @ keys[delta(a, b), h]
                expected = (expected + k[h, j] @ queries[delta(b, a), h]) / (3 * DIM) ** 0.5
                assert scores[h, i, j].item() == pytest.approx(expected.item(), abs=1e-9)


def test_prms_norm_measures_the_first_dims_alone():
    x = torch.randn(4, 10, dtype=torch.float64)
    norm = build_norm(PartialRMSNormConfig(share=0.25, eps=1e-6), 10).double()
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    scale = (x[:, :3].square().mean(-1, keepdim=True) + 1e-6).sqrt()  # ⌈2.5⌉ dims
    torch.testing.assert_close(norm(x), x / scale * norm.weight)
    whole, plain = (build_norm(c, 10) for c in (PartialRMSNormConfig(share=1.0), RMSNormConfig()))
    for each in (whole, plain):
        torch.nn.init.ones_(each.weight)
    torch.testing.assert_close(whole(x.float()), plain(x.float()))


def test_deep_norm_constants_of_glm_130b():
    alpha, beta = deep_norm_constants(70)
    assert (round(alpha, 3), round(beta, 5)) == (11.832, 0.08452)
    alpha, beta = deep_norm_constants(18, rule="decoder")
    assert alpha == pytest.approx(36**0.25)
    assert beta == pytest.approx(144**-0.25)


def test_the_embedding_gradient_is_shrunk_for_its_input_side_alone():
    ids = torch.tensor([3, 4, 5, 3])

    def gradients(factor, tied):
        model = build_tiny(tie_word_embeddings=tied).requires_grad_(True)
        model.embedding_gradient.factor = factor
        from easyllm.nn.context import ForwardContext

        context = ForwardContext.packed([4])
        logits = model.head(model(ids, context))
        F.cross_entropy(logits, ids).backward()
        return model.embed_tokens.weight.grad, model.layers[0].mixer.q_proj.weight.grad

    whole, inner = gradients(1.0, tied=False)
    small, same = gradients(0.1, tied=False)
    torch.testing.assert_close(small, whole * 0.1)
    torch.testing.assert_close(same, inner)
    tied_whole, _ = gradients(1.0, tied=True)
    tied_small, _ = gradients(0.1, tied=True)
    unseen = [i for i in range(320) if i not in (3, 4, 5)]
    torch.testing.assert_close(tied_small[unseen], tied_whole[unseen])
    assert not torch.allclose(tied_small[3], tied_whole[3])
