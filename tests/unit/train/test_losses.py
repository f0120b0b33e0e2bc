"""Mean losses and bits per byte: all terms have the same weight."""

import math

import pytest
import torch

from easyllm.batches.packing import pack
from easyllm.examples.sample import Sample
from easyllm.train.objectives import LanguageModel
from easyllm.train.objectives.losses import LossOutput, MeanLoss, bits_per_byte, evaluate_loss
from tiny_models import build_tiny


def output(loss, terms, **metrics):
    return LossOutput(torch.tensor(loss), terms, metrics=metrics)


@pytest.mark.parametrize("num_terms", [None, 4])
def test_the_mean_is_over_terms_not_over_batches(num_terms):
    mean = MeanLoss(num_terms)
    mean.add(output(6.0, 3, accuracy=1.0))
    mean.add(output(4.0, 1, accuracy=0.0))
    assert (mean.nats, mean.num_terms, mean.metrics) == (2.5, 4, {"accuracy": 0.75})


def test_the_mean_of_nothing_is_zero():
    assert (MeanLoss().nats, MeanLoss().metrics) == (0.0, {})


def test_bits_per_byte_convert_nats():
    assert bits_per_byte(8 * math.log(2), 4) == 2.0


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_keeps_the_mode_of_the_model_even_after_an_error(training):
    model = build_tiny().train(training)
    batch = pack([Sample.from_mask(tuple(range(3, 20)))])
    loss = evaluate_loss(model, [batch], LanguageModel().loss)
    assert loss.nats == LanguageModel().evaluate(model, [batch])["loss_nats"]
    assert model.training is training

    def fails(model, batch):
        assert not model.training
        raise KeyError("failed")

    with pytest.raises(KeyError, match="failed"):
        evaluate_loss(model, [batch], fails)
    assert model.training is training
