"""Over-optimisation of a reward: gold against proxy reward of best-of-n, by KL divergence.

Choosing the best of n answers by a proxy reward (a trained reward model) moves the policy by

    KL(n) = ln n - (n - 1) / n          nats

from the model, without any training (Gao et al. 2022, arXiv 2210.10760, section 2; an upper bound:
Beirami et al. 2024, arXiv 2401.01879). The proxy reward rises with n; the gold reward, which
measures what is wanted, rises less, and falls where the proxy is over-optimised.

Both are estimated without bias for every n from the same N ≥ n answers to a prompt: the answer of
rank i by the proxy (from the lowest) is the best of n random ones with probability
C(i-1, n-1) / C(N, n) (Nakano et al. 2021, arXiv 2112.09332, appendix).
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from easyllm.core.errors import ConfigError
from easyllm.core.json_types import JsonObject
from easyllm.reporting.line_chart import line_chart

Floats: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class BestOfNPoint:
    """Rewards of the best of n answers.

    Attributes:
        n: number of answers, of which the proxy chooses one.
        kl_nats: KL divergence from the model.
        proxy, gold: mean rewards of the chosen answers.
        proxy_error, gold_error: their standard errors over prompts.
    """

    n: int
    kl_nats: float
    proxy: float
    proxy_error: float
    gold: float
    gold_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class OverOptimisation:
    """Gold and proxy reward by KL divergence.

    Attributes:
        points: for n = 1, 2, 4 … N.
        prompts, samples: number of prompts, and of answers to each.
        peak_n: the n with the highest gold reward.
        drop: gold reward at the peak minus that at N.
        drop_error: standard error of the drop over prompts.
        proxy_sd, gold_sd: standard deviations of the rewards of single answers.
    """

    points: tuple[BestOfNPoint, ...]
    prompts: int
    samples: int
    peak_n: int
    drop: float
    drop_error: float
    proxy_sd: float
    gold_sd: float

    @property
    def over_optimised(self) -> bool:
        """Whether the gold reward has fallen from its peak by more than two standard errors."""
        return self.drop > 2 * self.drop_error

    def as_dict(self) -> JsonObject:
        """Returns the fields as a dict."""
        return {**asdict(self), "over_optimised": self.over_optimised}


def over_optimisation(
    proxies: Sequence[Sequence[float]], golds: Sequence[Sequence[float]]
) -> OverOptimisation:
    """Returns gold and proxy reward of best-of-n for n = 1, 2, 4 … N.

    Args:
        proxies: [P, N], proxy reward of each of N answers to P prompts.
        golds: [P, N], gold reward of the same answers.

    Raises:
        ConfigError: there is only one answer to a prompt, or none.
    """
    proxy, gold = np.asarray(proxies, np.float64), np.asarray(golds, np.float64)
    assert proxy.shape == gold.shape, "two rewards of the same answers"
    if proxy.ndim != 2 or proxy.shape[0] < 1 or proxy.shape[1] < 2:
        raise ConfigError("best-of-n needs at least two answers to a prompt; raise --samples")
    samples = proxy.shape[1]
    sizes = sorted({*(2**i for i in range(samples.bit_length())), samples})
    sizes = [n for n in sizes if n <= samples]
    by_n = [(expected_best(proxy, proxy, n), expected_best(proxy, gold, n)) for n in sizes]
    points = tuple(
        BestOfNPoint(
            n=n,
            kl_nats=best_of_n_kl(n),
            proxy=float(its_proxy.mean()),
            proxy_error=_error(its_proxy),
            gold=float(its_gold.mean()),
            gold_error=_error(its_gold),
        )
        for n, (its_proxy, its_gold) in zip(sizes, by_n, strict=True)
    )
    peak = max(range(len(sizes)), key=lambda i: points[i].gold)
    drops = by_n[peak][1] - by_n[-1][1]
    return OverOptimisation(
        points=points,
        prompts=len(proxy),
        samples=samples,
        peak_n=sizes[peak],
        drop=float(drops.mean()),
        drop_error=_error(drops),
        proxy_sd=float(proxy.std()),
        gold_sd=float(gold.std()),
    )


def best_of_n_kl(n: int) -> float:
    """Returns the KL divergence of best-of-n from its model, in nats: ln n - (n - 1) / n."""
    return math.log(n) - (n - 1) / n


def expected_best(proxy: Floats, value: Floats, n: int) -> Floats:
    """Returns the expected value of the best of n answers by the proxy for each prompt, [P].

    Answers with equal proxy rewards share their probability.

    Args:
        proxy: [P, N], what decides.
        value: [P, N], what is averaged.
        n: number of answers, drawn without replacement; at most N.
    """
    samples = proxy.shape[1]
    # the probability that the best of n is among the i lowest is C(i, n) / C(N, n)
    below = np.array([math.comb(i, n) / math.comb(samples, n) for i in range(samples + 1)])
    first = (proxy[:, :, None] > proxy[:, None, :]).sum(-1)  # [P, N] number of lower rewards
    last = (proxy[:, :, None] >= proxy[:, None, :]).sum(-1)
    weights = (below[last] - below[first]) / (last - first)
    found: Floats = (weights * value).sum(-1)
    return found


def figure(result: OverOptimisation) -> str:
    """Returns the two curves as SVG: gains over one answer, in standard deviations of one."""

    def gains(name: str, spread: float) -> list[tuple[float, float]]:
        start = getattr(result.points[0], name)
        return [(p.kl_nats, (getattr(p, name) - start) / (spread or 1.0)) for p in result.points]

    return line_chart(
        "Best-of-n: gold against proxy reward",
        {"proxy": gains("proxy", result.proxy_sd), "gold": gains("gold", result.gold_sd)},
        x_title="KL divergence from the model, nats",
        y_title=f"gain over one answer, in standard deviations (n = 1 … {result.samples})",
    )


def _error(values: Floats) -> float:
    """Returns the standard error of a mean; NaN for a single value."""
    if len(values) < 2:
        return math.nan
    return float(values.std(ddof=1) / math.sqrt(len(values)))


__all__ = [
    "BestOfNPoint",
    "OverOptimisation",
    "best_of_n_kl",
    "expected_best",
    "figure",
    "over_optimisation",
]
