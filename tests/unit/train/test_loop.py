"""The training loop without its arithmetic: skipped steps, stopped runs, and recorded events."""

import math
from types import SimpleNamespace

import torch

from easyllm.batches.loader import Loader
from easyllm.examples.sample import Sample
from easyllm.train.config import AdamWConfig, TrainConfig
from easyllm.train.loop import Diverged, run_steps
from easyllm.train.loss_scaler import LossScaler
from easyllm.train.objectives import LanguageModel, LossOutput
from easyllm.train.optim import MasterOptimizer
from easyllm.train.precision import PrecisionPolicy
from easyllm.train.progress import TrainProgress
from easyllm.train.signals import StopRequest
from easyllm.train.training_run import Callback, Run
from tiny_models import build_tiny

CONFIG = TrainConfig.model_validate({"data": {"train": ["-"]}, "schedule": {"kind": "constant"}})


class Notes(Callback):
    """Records everything, and ends the run at a given step."""

    def __init__(self, end_at=None):
        self.steps, self.events, self.end_at = [], [], end_at

    def after_step(self, run, report):
        self.steps.append(report)
        if report.step == self.end_at:
            run.progress.stopped = "enough"

    def on_event(self, run, kind, detail):
        self.events.append((run.progress.step, kind, detail))


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
    notes, progress = Notes(end_at), TrainProgress()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    training = Run(
        config=config,
        output=None,
        source=None,
        model=model,
        adapters=None,
        optimizer=MasterOptimizer(dict(model.named_parameters()), AdamWConfig(learning_rate=1e-3)),
        objective=Spoiled(factors),
        data=SimpleNamespace(loader=loader),
        precision=PrecisionPolicy(scaler=scaler),
        plan=SimpleNamespace(steps=total_steps, flops_per_s=1e12),
        inputs={},
        progress=progress,
        callbacks=(notes,),
        flops=sum,
    )
    error = None
    try:
        run_steps(training, stop or StopRequest())
    except Diverged as raised:
        error = raised
    moved = any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    return error, notes, progress, moved


def test_a_non_finite_step_is_skipped_counted_and_named():
    error, notes, progress, moved = run({3: math.nan, 5: math.inf})
    assert error is None
    assert (progress.step, progress.skipped) == (8, 2)
    assert [(step, kind) for step, kind, _ in notes.events] == [(3, "skipped"), (5, "skipped")]
    assert "samples [" in notes.events[0][2]
    assert moved
    assert all(
        math.isfinite(report.loss_nats) for report in notes.steps if report.step not in (3, 5)
    )


def test_a_skipped_step_changes_no_weight():
    error, notes, progress, moved = run({1: math.nan, 2: math.nan}, total_steps=2)
    assert (error, progress.skipped, moved) == (None, 2, False)
    assert [report.skipped for report in notes.steps] == [True, True]


def test_three_skipped_steps_in_a_row_end_the_run():
    error, _, progress, _ = run({4: math.nan, 5: math.nan, 6: math.nan})
    assert isinstance(error, Diverged)
    assert "3 consecutive steps, up to step 6" in str(error)
    assert progress.step == 6


def test_an_overflow_of_fp16_lowers_the_scale_and_does_not_end_the_run():
    scaler = LossScaler(initial_scale=2.0**75, hysteresis=1)
    error, notes, progress, moved = run({}, scaler=scaler, total_steps=40)
    assert error is None
    assert moved
    assert progress.skipped > 3
    assert scaler.scale == 2.0 ** (75 - progress.skipped)
    assert notes.steps[-1].metrics["loss_scale"] == scaler.scale


def test_a_spike_is_marked_with_the_samples_of_its_batch():
    _, notes, _, _ = run({30: 5.0}, total_steps=32)
    ((step, kind, detail),) = notes.events
    assert (step, kind) == (30, "spike")
    assert "samples [" in detail


def test_the_usual_loss_is_known_after_twenty_steps():
    progress = TrainProgress()
    for _ in range(19):
        progress.note_loss(1.0)
    assert not progress.is_spike(100.0, 2.0)
    progress.note_loss(1.0)
    assert progress.is_spike(2.01, 2.0)
    assert not progress.is_spike(1.99, 2.0)


def test_a_callback_can_end_the_run():
    _, notes, progress, _ = run({}, end_at=3)
    assert (progress.stopped, progress.step, len(notes.steps)) == ("enough", 3, 3)


def test_a_stop_request_ends_the_run_after_its_step():
    stop = StopRequest()
    stop.signal = 15
    _, _, progress, _ = run({}, stop=stop)
    assert (progress.stopped, progress.step) == (None, 1)
