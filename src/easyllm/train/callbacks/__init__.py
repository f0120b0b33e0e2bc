"""The callbacks of every training run, one job each.

They are called in the order of `build_callbacks`: metrics are logged before the evaluation that
follows them, and a checkpoint is written last, so that it contains what the others decided.
"""

from collections.abc import Sequence

from easyllm.train.callbacks.adapter_hooks import AdapterHooks
from easyllm.train.callbacks.checkpoints import BestCheckpoint, Checkpoints
from easyllm.train.callbacks.compile_time import CompileTime
from easyllm.train.callbacks.evaluation import EarlyStopping, Evaluation
from easyllm.train.callbacks.logs import ConsoleNotes, LogMetrics
from easyllm.train.callbacks.retention import Retention, retention_samples
from easyllm.train.callbacks.samples import Samples, check_samples
from easyllm.train.config import TrainConfig
from easyllm.train.training_run import Callback


def build_callbacks(
    config: TrainConfig, additional: Sequence[Callback] = (), *, is_first: bool = True
) -> tuple[Callback, ...]:
    """Returns the callbacks of a run, the additional ones before evaluations and checkpoints.

    Args:
        config: the run's configuration.
        additional: further callbacks.
        is_first: whether this is the rank that logs; the others take part in evaluations and
            checkpoints only.
    """
    callbacks: list[Callback] = []
    if config.adapter is not None:
        callbacks.append(AdapterHooks())
    if config.compile:
        callbacks.append(CompileTime())
    if is_first:
        callbacks += [LogMetrics(), ConsoleNotes(), *additional]
    if config.samples is not None:
        callbacks.append(Samples(config.samples))
    callbacks.append(Evaluation())
    callbacks.append(BestCheckpoint())
    if config.retention:
        callbacks.append(Retention())
    if config.early_stopping is not None:
        callbacks.append(EarlyStopping(config.early_stopping))
    if config.backend == "torch":
        callbacks.append(Checkpoints())
    return tuple(callbacks)


__all__ = [
    "AdapterHooks",
    "BestCheckpoint",
    "Checkpoints",
    "CompileTime",
    "ConsoleNotes",
    "EarlyStopping",
    "Evaluation",
    "LogMetrics",
    "Retention",
    "Samples",
    "build_callbacks",
    "check_samples",
    "retention_samples",
]
