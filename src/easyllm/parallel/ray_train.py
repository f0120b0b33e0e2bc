"""Runs a training as the workers of Ray Train, and starts it again after a failure.

    easyllm train RECIPE --ray 4    four workers, on the cluster that RAY_ADDRESS names or here

A worker is a rank as `--nproc` starts them: the same code trains. What Ray adds is where the ranks
run, and that they run again: a run that has lost a worker resumes its last checkpoint.
"""

import logging
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from easyllm.core.cluster import connect_ray, cpus_each
from easyllm.core.errors import ConfigError, EasyllmError, install
from easyllm.parallel.failures import CollectiveError


class WorkersFailed(RuntimeError):
    """A run failed more often than it may be started again.

    Args:
        rank: the rank that failed, the lowest if there are several.
        reason: its traceback or, if it has none, what became of it.
    """

    def __init__(self, rank: int, reason: str) -> None:
        super().__init__(f"rank {rank}: {reason.rstrip()}")
        self.rank, self.reason = rank, reason


def train_on_ray(
    body: Callable[[], object],
    workers: int,
    *,
    output: Path,
    restarts: int,
    restarted: Callable[[WorkersFailed], None] = lambda _: None,
) -> None:
    """Calls `body` in each of `workers` processes that find each other as the ranks of a run.

    Args:
        body: trains, and resumes what it finds in the output folder; what it returns is dropped.
        workers: number of ranks. Each has a GPU, if the cluster has that many.
        output: output folder of the run, which every node must reach under this path.
        restarts: how often the run is started again after a failure. A user's mistake
            (`EasyllmError`) ends it at once.
        restarted: is told why, before the run is started again.

    Raises:
        ConfigError: Ray is not installed or could not be started, or has too few CPU cores.
        EasyllmError: a worker raised it.
        WorkersFailed: the run failed once more than `restarts`.
    """
    try:
        import ray
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
    except ImportError as error:
        raise ConfigError(f"--ray needs Ray Train ({error}); {install('ray')}") from None
    was_up = ray.is_initialized()
    if not was_up:
        connect_ray()
    # a machine without a network resolves its own name to an address that nobody listens on
    local = {} if "RAY_ADDRESS" in os.environ else {"GLOO_SOCKET_IFNAME": "lo"}
    environment = {"env_vars": local}
    # Ray's own account of the attempts; what matters is in the output folder
    record = output.parent / f".{output.name}.ray"
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    try:
        scaling = ScalingConfig(**_resources(workers))
        for attempt in range(restarts + 1):
            run = RunConfig(
                name=f"attempt-{attempt}", storage_path=str(record), worker_runtime_env=environment
            )
            trainer = TorchTrainer(_in_this_folder(body), scaling_config=scaling, run_config=run)
            try:
                trainer.fit()
                return
            except Exception as error:
                failure = _failure(error)
                if attempt == restarts:
                    raise failure from None
                restarted(failure)
    finally:
        shutil.rmtree(record, ignore_errors=True)
        if not was_up:
            ray.shutdown()


def _resources(workers: int) -> dict[str, object]:
    """Returns the arguments of `ScalingConfig`: the cores of a worker, and whether it has a GPU."""
    import ray

    nodes = [each["Resources"] for each in ray.nodes() if each["Alive"]]
    cores = [each.get("CPU", 0) for each in nodes]
    if workers > sum(int(each) for each in cores):
        raise ConfigError(
            f"--ray {workers} needs {workers} CPU cores, but the cluster has "
            f"{sum(int(each) for each in cores)}; lower it, or add nodes"
        )
    gpus = sum(each.get("GPU", 0) for each in nodes) >= workers
    # the controller of Ray Train takes none
    own = {"CPU": cpus_each(cores, workers)}
    return {"num_workers": workers, "use_gpu": gpus, "resources_per_worker": own}


def _in_this_folder(body: Callable[[], object]) -> Callable[[], None]:
    """Returns what a worker runs: `body`, in the folder that relative paths refer to."""
    folder = os.getcwd()

    def work() -> None:
        with suppress(OSError):  # a node without the folder: paths must then be absolute
            os.chdir(folder)
        body()

    return work


def _failure(error: Exception) -> WorkersFailed:
    """Returns why a run failed, with the traceback of the first rank.

    Raises:
        EasyllmError: a worker raised it.
        Exception: `error` itself, if no worker failed.
    """
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    if not failures:
        raise error
    for found in failures.values():
        cause = getattr(found, "_base_exc", found)
        if isinstance(cause, EasyllmError) and not isinstance(cause, CollectiveError):
            raise cause from None
    # a rank that was killed, or that failed by itself, is the cause of what the others say
    dead = [rank for rank, found in failures.items() if not hasattr(found, "_base_exc")]
    alone = [rank for rank in failures if not _is_secondary(failures[rank])]
    rank = min(dead or alone or failures)
    return WorkersFailed(rank, str(failures[rank]))


def _is_secondary(error: Exception) -> bool:
    return isinstance(getattr(error, "_base_exc", error), CollectiveError)


__all__ = ["WorkersFailed", "train_on_ray"]
