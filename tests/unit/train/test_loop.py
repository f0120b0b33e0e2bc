"""The training loop without its arithmetic: skipped steps, stopped runs, and recorded events."""

import math

import torch

from easyllm.batches.loader import Loader
from easyllm.examples.sample import Sample
from easyllm.train.config import AdamWConfig, TrainConfig
from easyllm.train.loop import Diverged, PrecisionPolicy, is_spike, note_loss, run_steps
from easyllm.train.loss_scaler import LossScaler
from easyllm.train.objectives import LanguageModel, LossOutput
from easyllm.train.optim import MasterOptimizer
from easyllm.train.signals import StopRequest
from easyllm.train.state import Totals
from tiny_models import build_tiny

CONFIG = TrainConfig.model_validate({"data": {"train": ["-"]}, "schedule": {"kind": "constant"}})


class Notes:
    """A watch that records everything, and ends the run at a given step."""

    def __init__(self, end_at=None):
        self.steps, self.events, self.end_at = [], [], end_at

    def after_step(self, report):
        self.steps.append(report)
        return "enough" if report.step == self.end_at else None

    def event(self, step, kind, detail):
        self.events.append((step, kind, detail))


class Spoiled(LanguageModel):
    """A language-model loss that is multiplied by a factor at given calls."""

    def __init__(self, factors):
        super().__init__()
        self.factors, self.calls = factors, 0

    def loss(self, model, batch):
        out = super().loss(model, batch)
        self.calls += 1
        return LossOutput(out.sum * self.factors.get(self.calls, 1.0), out.num_tokens)


def run(factors, *, total_steps=8, scaler=None, end_at=None, stop=None, config=CONFIG):
    generator = torch.Generator().manual_seed(0)
    rows = [tuple(torch.randint(3, 320, (12,), generator=generator).tolist()) for _ in range(4)]
    loader = Loader(
        [Sample.from_mask(row) for row in rows], batch_size=1, micro_batch_tokens=64, seed=0
    )
    model = build_tiny().requires_grad_(True)
    optimizer = MasterOptimizer(dict(model.named_parameters()), AdamWConfig(learning_rate=1e-3))
    notes, totals = Notes(end_at), Totals()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    try:
        reason = run_steps(
            model,
            Spoiled(factors),
            optimizer,
            loader,
            config,
            precision=PrecisionPolicy(scaler=scaler),
            totals=totals,
            total_steps=total_steps,
            watch=notes,
            stop=stop or StopRequest(),
        )
    except Diverged as error:
        reason = error
    moved = any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    return reason, notes, totals, moved


def test_a_non_finite_step_is_skipped_counted_and_named():
    reason, notes, totals, moved = run({3: math.nan, 5: math.inf})
    assert reason == "finished"
    assert (totals.step, totals.skipped) == (8, 2)
    assert [(step, kind) for step, kind, _ in notes.events] == [(3, "skipped"), (5, "skipped")]
    assert "samples [" in notes.events[0][2]
    assert moved
    assert all(
        math.isfinite(report.loss_nats) for report in notes.steps if report.step not in (3, 5)
    )


def test_a_skipped_step_changes_no_weight():
    reason, _, totals, moved = run({1: math.nan, 2: math.nan}, total_steps=2)
    assert (reason, totals.skipped, moved) == ("finished", 2, False)


def test_three_skipped_steps_in_a_row_end_the_run():
    reason, _, totals, _ = run({4: math.nan, 5: math.nan, 6: math.nan})
    assert isinstance(reason, Diverged)
    assert "3 consecutive steps, up to step 6" in str(reason)
    assert totals.step == 6


def test_an_overflow_of_fp16_lowers_the_scale_and_does_not_end_the_run():
    scaler = LossScaler(initial_scale=2.0**75, hysteresis=1)
    reason, notes, totals, moved = run({}, scaler=scaler, total_steps=40)
    assert reason == "finished"
    assert moved
    assert totals.skipped > 3
    assert scaler.scale == 2.0 ** (75 - totals.skipped)
    assert notes.steps[-1].metrics["loss_scale"] == scaler.scale


def test_a_spike_is_marked_with_the_samples_of_its_batch():
    _, notes, _, _ = run({30: 5.0}, total_steps=32)
    ((step, kind, detail),) = notes.events
    assert (step, kind) == (30, "spike")
    assert "samples [" in detail


def test_the_usual_loss_is_known_after_twenty_steps():
    totals = Totals()
    for _ in range(19):
        note_loss(totals, 1.0)
    assert not is_spike(totals, 100.0, 2.0)
    note_loss(totals, 1.0)
    assert is_spike(totals, 2.01, 2.0)
    assert not is_spike(totals, 1.99, 2.0)


def test_a_watch_can_end_the_run():
    reason, notes, totals, _ = run({}, end_at=3)
    assert (reason, totals.step, len(notes.steps)) == ("enough", 3, 3)


def test_a_stop_request_ends_the_run_after_its_step():
    stop = StopRequest()
    stop.signal = 15
    reason, _, totals, _ = run({}, stop=stop)
    assert (reason, totals.step) == ("interrupted", 1)
