"""KTO: optimisation on single responses with a binary label (arXiv 2402.01306, eqs. 7 and 8).

    Δ(x, y) = log π(y|x) - log π_ref(y|x)
    z       = max(0, mean of Δ(x, y') over the step)         y': a response to another prompt
    good    λ_D (1 - σ(β (Δ - z)))
    bad     λ_U (1 - σ(β (z - Δ)))

z estimates KL(π || π_ref) and has no gradient. The paper takes the mean over a micro-batch; here it
is over all micro-batches of a step, so that the loss does not depend on how the step is split.
Pairs are read as a good and a bad response, rankings as the best and the others.
"""

from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor

from easyllm.batches.packing import Batch
from easyllm.core.errors import DataError
from easyllm.examples.preferences import encode_labelled, read_labelled
from easyllm.examples.prepare import Encoded, PreparationStats, check_samples
from easyllm.examples.sample import AnySample, Sample, SampleGroup
from easyllm.nn.decoder import Decoder
from easyllm.tokenizer.tokenizer import Tokenizer
from easyllm.train.data_config import (
    GeneratedConfig,
    PreferenceDataConfig,
    RowsConfig,
    UnpairedPreferenceDataConfig,
)
from easyllm.train.evaluating import evaluating
from easyllm.train.objectives.objective import LossOutput, Objective, register_objective
from easyllm.train.objectives.pairs import read_pairs
from easyllm.train.objectives.reference import (
    ReferenceConfig,
    reference_sums,
    use_reference,
)
from easyllm.train.objectives.router import routing_of, with_router_losses
from easyllm.train.objectives.sequence_logprobs import sequence_logprobs

IS_GOOD, MATCH = "is_good", "match"
"""Extras of a sequence: the label of the response; 1 if it answers the prompt, 2 if another one."""


class KTOConfig(ReferenceConfig):
    """Kahneman-Tversky optimisation on responses with binary labels, or on pairs."""

    kind: Literal["kto"] = "kto"
    beta: PositiveFloat = Field(
        default=0.1, description="Strength of the implicit KL constraint, as in DPO."
    )
    desirable_weight: NonNegativeFloat = Field(
        default=1.0, description="Weight of good responses (λ_D)."
    )
    undesirable_weight: NonNegativeFloat = Field(
        default=1.0,
        description="Weight of bad responses (λ_U); the paper advises λ_D n_good = 1 to 4/3 times "
        "λ_U n_bad.",
    )


class KTO(Objective):
    """The loss of labelled responses relative to a reference point; see the module.

    A sample is a response and a mismatched one, which share their prompt.
    """

    def __init__(self, config: KTOConfig | None = None) -> None:
        self.config = config or KTOConfig()
        use_reference(self, self.config)
        self.kl = 0.0
        """z of the current step."""

    def prepare(
        self, data: RowsConfig | GeneratedConfig, files: Sequence[Path], tokenizer: Tokenizer
    ) -> tuple[Sequence[AnySample], PreparationStats]:
        """Reads labelled responses or pairs and tokenizes them; see `Objective.prepare`.

        Raises:
            DataError: as there, or all rows have the same prompt.
        """
        if isinstance(data, PreferenceDataConfig):
            pairs, account = read_pairs(data, files, tokenizer, margins=False)
            given = [
                (encoded, rank == min(pair.ranks))
                for pair in pairs
                for encoded, rank in zip(pair.sequences, pair.ranks, strict=True)
            ]
        else:
            assert isinstance(data, UnpairedPreferenceDataConfig), "checked by the configuration"
            account = PreparationStats()
            rows = chain.from_iterable(read_labelled(file) for file in files)
            encoded_rows = encode_labelled(
                rows, tokenizer, account, max_seq_len=data.max_seq_len, overlong=data.overlong
            )
            given = list(encoded_rows)
            check_samples(account, data.max_seq_len)
        samples = with_mismatched(given, max_seq_len=data.max_seq_len)
        account.tokens = sum(sample.num_tokens for sample in samples)
        return samples, account

    def num_terms(self, batch: Batch) -> int:
        """Returns the number of responses, without mismatched ones."""
        return len(_sequences(batch, mismatched=False))

    @torch.no_grad()
    def begin_step(self, model: Decoder, batches: Sequence[Batch]) -> None:
        """Estimates z from the mismatched responses of all micro-batches, of all ranks."""
        total, count = 0.0, 0
        with evaluating(model):
            for batch in batches:
                part = batch.select(_sequences(batch, mismatched=True)).to(model.device)
                ratios = sequence_logprobs(model, part).sums - reference_sums(self, part)
                if not batch.is_filler:
                    total, count = total + float(ratios.double().sum()), count + len(ratios)
        if self.ranks is not None:
            sums = self.ranks.gather((total, count))
            total, count = sum(t for t, _ in sums), sum(n for _, n in sums)
        self.kl = max(0.0, total / max(1, count))

    def loss(self, model: Decoder, batch: Batch) -> LossOutput:
        """Returns the loss summed over responses; `begin_step` has set z."""
        part = batch.select(_sequences(batch, mismatched=False))
        routing = routing_of(model)
        policy = sequence_logprobs(model, part, routing=routing)
        ratios = policy.sums - reference_sums(self, part)
        good = part.extras[IS_GOOD] > 0
        losses = kto_losses(ratios, good, self.kl, self.config)
        rewards = self.config.beta * ratios.detach()
        signed = torch.where(good, 1.0, -1.0) * (rewards - self.config.beta * self.kl)
        metrics = {
            "kl_nats": self.kl,
            "reward_margin": float(signed.mean()),
            "reward_accuracy": float((signed > 0).float().mean()),
        }
        counts: dict[str, int] = {}
        for side, of_side in (("chosen", good), ("rejected", ~good)):
            if bool(of_side.any()):
                metrics[f"rewards/{side}"] = float(rewards[of_side].mean())
                metrics[f"logprobs/{side}"] = float(policy.sums.detach()[of_side].mean())
                number = int(of_side.sum())
                counts |= {f"rewards/{side}": number, f"logprobs/{side}": number}
        output = LossOutput(losses.sum(), len(part.lengths), metrics=metrics, counts=counts)
        return with_router_losses(output, routing)

    def evaluate(self, model: Decoder, batches: Iterable[Batch]) -> dict[str, float]:
        """Returns the mean loss and metrics, with z estimated from all batches."""
        held = list(batches)
        with self.products():
            self.begin_step(model, held)
        return super().evaluate(model, held)


def kto_losses(ratios: Tensor, good: Tensor, kl: float, config: KTOConfig) -> Tensor:
    """Returns the loss of each response, [N].

    Args:
        ratios: [N], Δ in nats.
        good: [N] bool, the labels.
        kl: z in nats.
        config: β and the weights.
    """
    above = config.beta * (ratios - kl)
    desirable = config.desirable_weight * (1 - torch.sigmoid(above))
    undesirable = config.undesirable_weight * (1 - torch.sigmoid(-above))
    return torch.where(good, desirable, undesirable)


def with_mismatched(
    given: Sequence[tuple[Encoded, bool]], *, max_seq_len: int
) -> list[SampleGroup]:
    """Returns each labelled sequence with one of the same prompt and another row's response.

    The response is that of the next row with another prompt, and of the first after the last.

    Raises:
        DataError: all rows have the same prompt.
    """
    prompts = [tuple(e.token_ids[: _num_prompt(e)]) for e, _ in given]
    if len(set(prompts)) < 2:
        raise DataError(
            "KTO compares each prompt with a response to another one, but all rows have the same "
            "prompt; give rows of at least two prompts"
        )
    samples = []
    for number, (encoded, label) in enumerate(given):
        at = (number + 1) % len(given)
        while prompts[at] == prompts[number]:
            at = (at + 1) % len(given)
        other, prompt = given[at][0], prompts[number]
        start = len(prompts[at])
        ids = (*prompt, *other.token_ids[start:])[:max_seq_len]
        mask = (*[False] * len(prompt), *other.mask[start:])[:max_seq_len]
        both = (encoded.sample(), Sample.from_mask(ids, mask))
        parts = [
            Sample(
                sample.token_ids,
                sample.labels,
                {IS_GOOD: float(label), MATCH: match},
            )
            for sample, match in zip(both, (1, 2), strict=True)
        ]
        samples.append(SampleGroup(tuple(parts)))
    return samples


def _num_prompt(encoded: Encoded) -> int:
    """Returns the number of ids before the first trained one."""
    return list(encoded.mask).index(True, 1)


def _sequences(batch: Batch, *, mismatched: bool) -> list[int]:
    """Returns the numbers of the batch's matched or mismatched sequences, without padding."""
    wanted = 2 if mismatched else 1
    kinds = batch.extras[MATCH].tolist()
    return [number for number, kind in enumerate(kinds) if kind == wanted]


register_objective(KTOConfig, build=KTO, data=(UnpairedPreferenceDataConfig, PreferenceDataConfig))

__all__ = ["KTO", "KTOConfig", "kto_losses", "with_mismatched"]
