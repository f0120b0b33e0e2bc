"""Computes the log-probabilities of the reference model once, before the first step of a run.

run/reference.json   {"key": hash of model, data and precision, "logprobs": {sequence: nats}}
"""

import json
from collections.abc import Sequence
from pathlib import Path

from easyllm.batches.loader import Loader
from easyllm.core.atomic import write_json
from easyllm.core.manifest import hash_path, hash_value
from easyllm.examples.sample import AnySample
from easyllm.train.factories import Trained, build_reference, check_reference
from easyllm.train.objectives import Reference
from easyllm.train.objectives.reference import compute_reference, sequence_digests
from easyllm.train.training_run import Run

REFERENCE_FILE = "reference.json"


def cache_reference(run: Run) -> None:
    """Sets the objective's cached log-probabilities of the run's sequences.

    They are read from the run's folder if its file has the same key, else computed and stored.

    Args:
        run: a run that has taken no step yet, or one that has been resumed.
    """
    file, key = run.output / REFERENCE_FILE, _key(run)
    samples = _samples(run)
    found = _read(file, key, samples)
    if found is None:
        found = compute_reference(
            run.objective, _reference(run), samples, run.config.micro_batch_tokens
        )
        write_json(file, {"key": key, "logprobs": found})
    run.objective.cached_reference = found


def _samples(run: Run) -> Sequence[AnySample]:
    """Returns the samples of all steps of the run, and those it is evaluated on."""
    loader = run.data.loader
    assert isinstance(loader, Loader), "preferences are rows"
    return [*loader.samples_of(run.total_steps), *run.data.held]


def _reference(run: Run) -> Reference:
    """Returns the reference model; before the first step it is the model itself."""
    is_initial = run.progress.step == 0 and run.adapters is None
    if is_initial and run.objective.reference_source is None:
        return Reference(run.model, without_adapter=False)
    trained = Trained(run.model, run.optimizer, run.adapters)
    return build_reference(run.config, run.source, run.objective, trained)


def _key(run: Run) -> str:
    source = run.objective.reference_source
    other = None if source is None else hash_path(check_reference(run.source, source).path)
    values = [dict(run.inputs), run.data.identity, other, str(run.model.dtype), run.config.quantize]
    return hash_value([*values, run.config.micro_batch_tokens, run.total_steps])


def _read(file: Path, key: str, samples: Sequence[AnySample]) -> dict[str, float] | None:
    """Returns the stored values; None if there are none of this key, or some are missing."""
    try:
        stored = json.loads(file.read_text("utf-8"))
        if stored["key"] != key:
            return None
        found = {str(name): float(value) for name, value in stored["logprobs"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return found if found.keys() >= set(sequence_digests(samples)) else None


__all__ = ["REFERENCE_FILE", "cache_reference"]
