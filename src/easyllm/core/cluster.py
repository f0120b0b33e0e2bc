"""Ray: connecting to a cluster, or starting one node here, and dividing its CPU cores."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from easyllm.core.errors import ConfigError

if TYPE_CHECKING:
    from easyllm.core.json_types import JsonObject

STORE_BYTES = 256 * 2**20
"""Ray's object store on a single node; what is passed through it here is far smaller."""


def connect_ray() -> None:
    """Connects to the cluster that RAY_ADDRESS names, or starts Ray on this machine.

    Raises:
        ConfigError: Ray could not be started.
    """
    import ray

    options: JsonObject = {"include_dashboard": False, "logging_level": "warning"}
    if "RAY_ADDRESS" not in os.environ:
        options["object_store_memory"] = STORE_BYTES
    try:
        ray.init(log_to_driver=False, **options)
    except Exception as error:  # a node that does not start in time raises Exception itself
        raise ConfigError(f"Ray could not be started: {error}") from None


def cpus_each(node_cpus: Sequence[float], workers: int) -> float:
    """Returns the CPU cores of a worker: the largest number with which all of them fit.

    A whole number of cores, or the same fraction of one if there are more workers than cores.

    >>> cpus_each([8, 8], 2), cpus_each([8, 8], 3), cpus_each([2], 4)
    (8, 4, 0.5)
    """
    for cores in range(int(max(node_cpus)), 0, -1):
        if sum(int(cpus) // cores for cpus in node_cpus) >= workers:
            return cores
    return int(1000 * sum(node_cpus) / workers) / 1000


__all__ = ["connect_ray", "cpus_each"]
