"""Checkpoints whose files are written while the run continues.

    start     the state is copied to host memory; a thread begins to write the copy
    advance   once the threads of all ranks are done, rank 0 publishes the folder by renaming it
    finish    waits for them

All collectives are in the main threads, so that they keep their order among those of the steps.
"""

import os
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from copy import deepcopy
from pathlib import Path

from torch import Tensor

from easyllm.checkpoint.stream import stream_tensors
from easyllm.core.atomic import atomic_directory, write_json
from easyllm.core.errors import CheckpointError, EasyllmError, read_failure
from easyllm.core.json_types import JsonObject
from easyllm.parallel.parallel import Parallel
from easyllm.train.sharded_state import STATE, TENSORS, gather_layouts, part_file
from easyllm.train.state import RunState, prune, state_tensors, state_values, step_folder


class BackgroundSave:
    """The checkpoint of one step that is being written.

    In a divided run, all ranks must make it, and call its methods, in the same steps.

    Args:
        run: the run's folder.
        state: the state to save; it may change afterwards.
        keep_last: number of newest checkpoints that are kept once this one is published.

    Raises:
        OutputError: the operating system does not allow writing there.
    """

    def __init__(self, run: Path, state: RunState, *, keep_last: int) -> None:
        self._run, self._keep_last = run, keep_last
        self._folder = step_folder(run, state.progress.step)
        self._parallel = state.parallel
        self._publication = ExitStack()
        self._error: Exception | None = None
        values = state_values(state)
        tensors, layout = state_tensors(state)
        if state.parallel is None:
            work = self._publication.enter_context(atomic_directory(self._folder, replace=True))
            file = work / TENSORS
        else:
            world = state.parallel.mesh.world
            work = self._shared_folder(state.parallel)
            values |= {"layout": gather_layouts(layout, state.parallel)}
            file = work / part_file(world.rank, world.size)
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        is_first = state.parallel is None or state.parallel.is_first
        noted = deepcopy(values) if is_first else None
        self._thread = threading.Thread(
            target=self._write, args=(file, copies, noted), name="checkpoint", daemon=True
        )
        self._thread.start()

    def _shared_folder(self, parallel: Parallel) -> Path:
        """Returns the temporary folder of all ranks, which rank 0 makes."""
        work = ""
        if parallel.is_first:
            folder = atomic_directory(self._folder, replace=True)
            work = str(self._publication.enter_context(folder))
        return Path(parallel.mesh.world.gather_values(work)[0])

    def _write(self, file: Path, tensors: Mapping[str, Tensor], values: JsonObject | None) -> None:
        """Writes this rank's files to the disk; an error waits for `advance`."""
        try:
            stream_tensors(file, tensors, _keep)
            if values is not None:
                write_json(file.parent / STATE, values)
            with file.open("rb") as written:
                os.fsync(written.fileno())
        except Exception as error:
            self._error = error

    def advance(self) -> bool:
        """Publishes the checkpoint if all ranks have written it; returns whether they have.

        Raises:
            CheckpointError, OutputError: a rank could not write its file; the older checkpoints
                stay.
        """
        failed = not self._thread.is_alive() and self._error is not None
        waits = self._thread.is_alive()
        if self._parallel is not None:
            failed, waits = self._parallel.any_of([failed, waits])
        if failed:
            self.abandon()
            raise self._failure()
        if waits:
            return False
        self._publication.close()
        if self._parallel is None or self._parallel.is_first:
            prune(self._run, self._folder, keep_last=self._keep_last)
        return True

    def finish(self) -> None:
        """Waits until the checkpoint is published.

        Raises:
            CheckpointError, OutputError: as for `advance`.
        """
        self._thread.join()
        while not self.advance():
            pass

    def abandon(self) -> None:
        """Waits for this rank's thread, and removes what it has written."""
        self._thread.join()
        reason = self._error or CheckpointError("abandoned")
        try:
            self._publication.__exit__(type(reason), reason, reason.__traceback__)
        except Exception as error:  # the folder's own sentence about the same error
            self._error = error

    def _failure(self) -> EasyllmError:
        """Returns the error of the writer: this rank's own, or that another rank has one."""
        if isinstance(self._error, EasyllmError):
            return self._error
        reason = "another process could not write its part"
        if self._error is not None:
            reason = read_failure(self._error)
        return CheckpointError(
            f"the checkpoint {self._folder} could not be written ({reason}); the run stops, and "
            "the same command resumes it from the checkpoint before"
        )


def _keep(_: Tensor) -> None:
    """Releases nothing: the copies are freed with the thread."""


__all__ = ["BackgroundSave"]
