"""A prefix that all sequences of a batch have in common, such as a system prompt, is computed once.

For every part of a decoder see `test_every_mixer_and_position`.
"""

from dataclasses import replace

import torch

from easyllm.adapters import LoRAConfig, attach
from easyllm.batches.packing import pack
from easyllm.examples.sample import Sample
from easyllm.train import Callback, TrainConfig, train
from easyllm.train.objectives import LanguageModel
from easyllm.train.training_run import step_flops
from prefix_batches import PREFIX, batch_of, loss_gradients_and_rows
from tiny_models import build_tiny


def test_an_adapter_is_trained_through_the_prefix():
    model = build_tiny().double()
    attach(model, LoRAConfig(rank=4), seed=0)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator).double()
    batch = batch_of(320)
    shared, found, rows = loss_gradients_and_rows(model, batch)
    whole, expected, _ = loss_gradients_and_rows(model, replace(batch, common_prefix=0))
    assert rows == [len(batch.token_ids) - 3 * PREFIX]
    torch.testing.assert_close(shared.sum, whole.sum, atol=1e-9, rtol=0)
    torch.testing.assert_close(found, expected, atol=1e-8, rtol=1e-9)


def test_with_dropout_and_for_a_short_prefix_all_tokens_are_computed():
    model = build_tiny().requires_grad_(True).train()
    batch = batch_of(320)
    model.layers[0].dropout.p = 0.1
    assert loss_gradients_and_rows(model, batch)[2] == [len(batch.token_ids)]
    assert LanguageModel().shared_lengths(model, [batch]) == ()
    model.eval()  # no noise
    assert loss_gradients_and_rows(model, batch)[2] == [len(batch.token_ids) - 3 * PREFIX]
    assert LanguageModel().shared_lengths(model, [batch]) == (PREFIX,) * 3
    short = batch_of(320, common=0)
    assert short.common_prefix == 0
    assert loss_gradients_and_rows(model, short)[2] == [len(short.token_ids)]


def test_the_last_token_of_a_sequence_is_its_own():
    same = Sample((5, 6, 7), (6, 7, 8))
    assert pack([same, same]).common_prefix == 2
    assert pack([same]).common_prefix == pack([same, Sample((5,), (6,))]).common_prefix == 0
    assert pack([same, Sample((5, 6), (6, 7))]).common_prefix == 1


class Reports(Callback):
    """Takes the reports of the steps, and their FLOPs."""

    def __init__(self):
        self.found = []

    def after_step(self, run, report):
        self.found.append((report, run.flops(report), run.model.config))


def test_a_run_counts_what_it_computes(tiny_folder, tmp_path):
    rows = tmp_path / "rows.jsonl"
    system = '{"role": "system", "content": "You are a helpful assistant that answers."}'
    lines = (
        f'{{"messages": [{system}, {{"role": "user", "content": "{n}?"}}, '
        f'{{"role": "assistant", "content": "{n * n}."}}]}}\n'
        for n in range(8)
    )
    rows.write_text("".join(lines))
    values = {"model": str(tiny_folder), "data": {"train": [str(rows)], "max_seq_len": 128}}
    values |= {"batch_size": 4, "max_steps": 2, "precision": "fp32"}
    config, reports = TrainConfig.model_validate(values), Reports()
    train(config, tmp_path / "run", callbacks=[reports])
    for report, flops, model in reports.found:
        (prefix, *others) = report.shared
        assert others == [prefix] * 2
        assert report.tokens == sum(report.lengths)
        count = step_flops(model, config)
        once = count(replace(report, lengths=(prefix,), shared=()))
        assert flops == count(replace(report, shared=())) - 3 * once > 0
