"""What the page's engine view shows: pages, batch, queue and totals of each engine."""

from collections.abc import Collection
from contextlib import suppress
from functools import partial

from easyllm.core.json_types import JsonObject
from easyllm.engine.scheduler import Sequence
from easyllm.serve.exposition import Counter
from easyllm.serve.metrics import Metrics
from easyllm.serve.models import ServedModels
from easyllm.serve.service import EngineService, ServerShuttingDown

MAX_CELLS = 1024
"""Cells of the map of pages; with more pages, each cell stands for several of them."""


async def engine_view(models: ServedModels, metrics: Metrics) -> JsonObject:
    """Returns the state of each loaded engine, as it is between two of its steps."""
    names: dict[str, list[str]] = {}
    for name, found in models.names.items():
        if found.slot.service is not None:
            names.setdefault(found.slot.service.name, []).append(name)
    engines = list[JsonObject]()
    for service in models.services:
        if service.name in names:
            work = partial(_engine, service, names[service.name], metrics)
            with suppress(ServerShuttingDown):  # unloaded meanwhile
                engines.append(await service.call(work))
    return {"engines": engines}


def _engine(service: EngineService, names: Collection[str], metrics: Metrics) -> JsonObject:
    engine, labels = service.llm.engine, {*names, service.name}
    scheduler, pool = engine.scheduler, engine.pool

    def total(counter: Counter) -> int:
        return int(sum(counter.value((name,)) for name in labels))

    states = pool.states()
    return {
        "name": service.name,
        "serves": list(names),
        "pages": {
            "total": pool.num_pages,
            "size": pool.page_size,
            "used": pool.num_pages - pool.available,
            "shared": states.count(3),
            "idle": pool.idle,
            "free": pool.available - pool.idle,
            "map": page_map(states),
        },
        "running": [_sequence(each, service.name) for each in scheduler.running],
        "waiting": service.num_waiting,
        "max_running": scheduler.max_running,
        "preemptions": scheduler.num_preemptions,
        "prompt_tokens": total(metrics.prompt_tokens),
        "cached_tokens": total(metrics.cached_tokens),
        "generated_tokens": total(metrics.generation_tokens),
    }


def page_map(states: bytes, cells: int = MAX_CELLS) -> str:
    """Returns a digit for each page, or the highest of each group of pages if there are many.

    >>> page_map(bytes([0, 1, 2, 3, 0]), cells=3)
    '130'
    """
    group = -(-len(states) // cells)
    groups = (states[at : at + group] for at in range(0, len(states), group))
    return "".join(str(max(each)) for each in groups)


def _sequence(sequence: Sequence, base: str) -> JsonObject:
    return {
        "sequence": sequence.id,
        "model": sequence.namespace.adapter or base,
        "decoding": sequence.computed >= sequence.prompt_length,
        "tokens": len(sequence.tokens),
        "computed": sequence.computed,
        "cached": sequence.cached or 0,
    }
