"""The figure of where models have their parameters."""

from collections.abc import Mapping

from easyllm.lab.lab import Bars
from easyllm.plan.parameters import ParameterCount


def parameter_bars(counts: Mapping[str, ParameterCount], *, log_y: bool = False) -> Bars:
    """Returns bars of the parameters of each model, in 10⁹, by part.

    Args:
        counts: the parameters by the model's name.
        log_y: whether the axis is logarithmic.
    """
    return Bars(
        title="Parameters by part",
        x="model",
        y="parameters, 10⁹",
        groups=list(counts),
        series={
            "embedding and head": [(c.embedding + c.head) / 1e9 for c in counts.values()],
            "attention": [c.attention / 1e9 for c in counts.values()],
            "feed-forward": [c.feed_forward / 1e9 for c in counts.values()],
        },
        log_y=log_y,
    )


__all__ = ["parameter_bars"]
