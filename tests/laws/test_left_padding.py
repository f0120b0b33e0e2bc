"""Law 2 against `transformers`: left-padded = packed = alone, and the loss ignores padding."""

import pytest
import torch
from torch.nn import functional as F

from easyllm.batches.collate import last_rows, left_pad, next_logits, right_pad, score_padded
from easyllm.batches.packing import pack
from easyllm.examples.sample import Sample
from easyllm.models import save_model
from easyllm.ops.cross_entropy import IGNORE_INDEX
from easyllm.train.objectives import LanguageModel
from tiny_models import build_tiny

PAD = 0
LENGTHS = [5, 1, 23, 14]
ATOL = 3e-5


@pytest.fixture(scope="module")
def model():
    return build_tiny(seed=9)


@pytest.fixture(scope="module")
def reference(model, tmp_path_factory):
    """The same weights in transformers."""
    from transformers import LlamaForCausalLM

    folder = save_model(model, tmp_path_factory.mktemp("padding") / "model")
    return LlamaForCausalLM.from_pretrained(folder).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(3, 320, (n,), generator=generator).tolist() for n in LENGTHS]


def theirs(reference, batch, *, positions=True):
    """Returns transformers' logits [B, L, V] for one of our padded batches."""
    return reference(
        input_ids=batch.token_ids,
        attention_mask=batch.mask,
        position_ids=batch.positions if positions else None,
    ).logits


@pytest.mark.parametrize("length", [None, 40], ids=["dynamic", "fixed"])
def test_last_logits_of_a_left_padded_batch_equal_those_packed_and_alone(
    model, reference, rows, length
):
    batch = left_pad(rows, PAD, length=length)
    padded = theirs(reference, batch)[:, -1]
    alone = torch.stack([model.logits(row)[-1] for row in rows])
    torch.testing.assert_close(padded, alone, atol=ATOL, rtol=0)
    packed = next_logits(model, batch.token_ids, batch.mask)
    torch.testing.assert_close(packed, alone, atol=ATOL, rtol=0)
    single = torch.cat([reference(torch.tensor([row])).logits[:, -1] for row in rows])
    torch.testing.assert_close(padded, single, atol=ATOL, rtol=0)


def test_last_column_of_a_right_padded_batch_is_not_the_last_token(model, reference, rows):
    """The naive mistake and its correction: the last real token of each row."""
    batch = right_pad(rows, PAD)
    logits = theirs(reference, batch)
    alone = torch.stack([model.logits(row)[-1] for row in rows])
    differs = (logits[:, -1] - alone).abs().amax(1)
    short = torch.tensor(LENGTHS) < max(LENGTHS)
    assert (differs[short] > 0.1).all()
    assert (differs[~short] < ATOL).all()
    torch.testing.assert_close(last_rows(logits, batch.mask), alone, atol=ATOL, rtol=0)
    packed = next_logits(model, batch.token_ids, batch.mask)
    torch.testing.assert_close(packed, alone, atol=ATOL, rtol=0)


def test_absolute_positions_counted_from_the_padding_are_wrong(rows):
    """Rotary positions are relative and tolerate a shift; learned positions do not."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=320, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3
    )
    learned = GPT2LMHeadModel(config).eval().requires_grad_(False)
    alone = torch.cat([learned(torch.tensor([row])).logits[:, -1] for row in rows])
    batch = left_pad(rows, PAD)
    torch.testing.assert_close(theirs(learned, batch)[:, -1], alone, atol=ATOL, rtol=0)
    columns = torch.arange(batch.mask.shape[1]).expand_as(batch.mask)
    shifted = learned(
        input_ids=batch.token_ids, attention_mask=batch.mask, position_ids=columns
    ).logits
    short = torch.tensor(LENGTHS) < max(LENGTHS)
    assert ((shifted[:, -1] - alone).abs().amax(1)[short] > 0.1).all()


def test_packed_scores_of_a_left_padded_batch_equal_transformers(model, reference, rows):
    batch = left_pad(rows, PAD)
    logprobs = theirs(reference, batch)[:, :-1].log_softmax(-1)
    expected = logprobs.gather(2, batch.token_ids[:, 1:, None]).squeeze(2)
    follows = (batch.mask[:, 1:] * batch.mask[:, :-1]).bool()
    scores = score_padded(model, batch.token_ids, batch.mask)
    torch.testing.assert_close(scores[:, 1:][follows], expected[follows], atol=ATOL, rtol=0)
    assert scores.count_nonzero() == follows.sum()


@pytest.mark.parametrize("pad", [left_pad, right_pad], ids=["left", "right"])
@pytest.mark.parametrize("length", [None, 50], ids=["dynamic", "fixed"])
def test_the_loss_of_a_padded_batch_equals_the_packed_loss(model, reference, rows, pad, length):
    """Labels are -100 in the padding: dynamic, fixed, on either side, or none."""
    masks = [[i % 3 != 1 for i in range(len(row))] for row in rows]
    samples = [
        Sample.from_mask(row, mask) for row, mask in zip(rows, masks, strict=True) if len(row) > 1
    ]
    ids = pad([sample.token_ids for sample in samples], PAD, length=length)
    labels = pad([sample.labels for sample in samples], IGNORE_INDEX, length=length).token_ids
    logits = theirs(reference, ids)
    loss = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
    packed = LanguageModel().loss(model, pack(samples))
    assert packed.num_tokens == (labels != IGNORE_INDEX).sum()
    torch.testing.assert_close(packed.sum, loss, atol=0, rtol=1e-5)
