"""Serves the newest checkpoint of a training run while the run continues."""

import asyncio
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from easyllm.core.json_types import JsonMapping
from easyllm.engine.llm import LLM
from easyllm.serve.service import EngineFailure, EngineService
from easyllm.train.checkpoint_model import CheckpointModel

logger = logging.getLogger(__name__)
EVERY_S = 2.0
"""Seconds between two looks at the folder of the run."""


class WatchedRun:
    """A run whose newest checkpoint is served.

    Args:
        run: the run's folder.
        options: options of the engine.

    Attributes:
        llm: the model with its engine.
        step: step of the checkpoint whose weights it has.
        scores: the run's evaluation metrics at that step.

    Raises:
        ConfigError: the folder contains no run, or one whose model generates no text.
    """

    def __init__(self, run: Path, options: JsonMapping | None = None) -> None:
        self._checkpoint = CheckpointModel.open(run)
        self._load_newest()
        model, tokenizer = self._checkpoint.model, self._checkpoint.tokenizer
        self.llm = LLM(model=model, tokenizer=tokenizer, source=str(run), **(options or {}))

    def _load_newest(self) -> None:
        if found := self._checkpoint.newer():
            self._checkpoint.load(*found)
        self.step, self.scores = self._checkpoint.step, self._checkpoint.scores()

    async def follow(self, service: EngineService) -> None:
        """Loads each new checkpoint; returns when the engine is stopped.

        The weights are replaced between two steps of the engine, in its thread. Answers that are
        being generated are computed again up to where they are, and continue with the new weights.
        """
        while True:
            await asyncio.sleep(EVERY_S)
            found = await asyncio.to_thread(self._checkpoint.newer)
            if found is None:
                continue
            try:
                await service.call(partial(self._replace, *found))
            except EngineFailure:
                return
            self.scores = await asyncio.to_thread(self._checkpoint.scores)
            self.step = found[0]
            logger.info("serving step %d of %s", self.step, self._checkpoint.run)

    def _replace(self, step: int, weights: Mapping[str, Tensor]) -> None:
        self._checkpoint.load(step, weights)
        self.llm.engine.clear_prefix_cache()
