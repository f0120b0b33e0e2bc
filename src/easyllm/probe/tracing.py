"""Causal tracing: where in the model a fact about a subject is recalled.

The embeddings of the subject's tokens are corrupted with noise; then the state of one layer at one
token is restored to what it was, and the probability of the answer that comes back is measured
(Meng et al. 2022, arXiv 2202.05262, section 2.1).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from easyllm.core.errors import ConfigError
from easyllm.nn.context import ForwardContext
from easyllm.nn.decoder import Decoder

NOISE = 3.0
"""Standard deviation of the noise, in standard deviations of the embeddings (as in the paper)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """The probability of the answer with a corrupted subject and one state restored.

    Attributes:
        answer: the token that the model predicts.
        clean: its probability.
        corrupted: its probability with the corrupted subject.
        restored: its probability with the state of layer l at token t restored, `[L][T]`.
    """

    answer: int
    clean: float
    corrupted: float
    restored: list[list[float]]


@torch.no_grad()
def causal_trace(
    model: Decoder,
    token_ids: Sequence[int],
    subject: tuple[int, int],
    *,
    samples: int = 4,
    seed: int = 0,
) -> Trace:
    """Traces the recall of the token that follows a text.

    Args:
        model: the model.
        token_ids: the text, T tokens.
        subject: the first token of the subject, and the one after its last.
        samples: number of draws of the noise; probabilities are means over them.
        seed: seed of the noise.

    Raises:
        ConfigError: the subject is not a part of the text.
    """
    start, end = subject
    if not 0 <= start < end <= len(token_ids):
        raise ConfigError(
            f"the subject spans tokens {start} to {end}, but the text has {len(token_ids)} tokens"
        )
    ids = torch.tensor(token_ids, device=model.device)
    run = _Run(model, ids, samples)
    clean = run.probabilities()
    answer = int(clean[0].argmax())
    states = run.states
    generator = torch.Generator().manual_seed(seed)
    scale = NOISE * float(model.embed_tokens.storage.rows(ids).float().std())
    scale *= model.config.embedding_scale
    noise = torch.randn(samples, end - start, model.config.hidden_size, generator=generator)
    run.noise = noise.to(model.device) * scale
    run.subject = subject
    corrupted = float(run.probabilities()[:, answer].mean())
    restored = []
    for layer in range(len(model.layers)):
        row = []
        for token in range(len(ids)):
            run.restore = (layer, token, states[layer][token])
            row.append(float(run.probabilities()[:, answer].mean()))
        restored.append(row)
    return Trace(
        answer=answer,
        clean=float(clean[0, answer]),
        corrupted=corrupted,
        restored=restored,
    )


class _Run:
    """Forward passes of copies of one text, with noise on a subject and a state restored."""

    def __init__(self, model: Decoder, ids: Tensor, copies: int) -> None:
        self.model, self.ids, self.copies = model, ids, copies
        self.noise: Tensor | None = None
        self.subject = (0, 0)
        self.restore: tuple[int, int, Tensor] | None = None
        self.states: list[Tensor] = []

    def probabilities(self) -> Tensor:
        """Returns the probabilities [copies, V] of the token after the text."""
        length = len(self.ids)
        handles = [self.model.embedding_norm.register_forward_hook(self._corrupt)]
        for number, layer in enumerate(self.model.layers):
            hook = self._after(number)
            handles.append(layer.register_forward_hook(hook))
        self.states = []
        try:
            context = ForwardContext.packed([length] * self.copies, device=self.model.device)
            hidden = self.model(self.ids.repeat(self.copies), context)
        finally:
            for handle in handles:
                handle.remove()
        return self.model.head(hidden[length - 1 :: length]).softmax(-1)

    def _corrupt(self, _module: nn.Module, _inputs: object, out: Tensor) -> Tensor:
        if self.noise is None:
            return out
        rows = out.clone().view(self.copies, len(self.ids), -1)
        rows[:, self.subject[0] : self.subject[1]] += self.noise.to(out.dtype)
        return rows.view_as(out)

    def _after(self, number: int) -> Callable[..., tuple[Tensor, Tensor | None]]:
        def hook(
            _module: nn.Module, _inputs: object, out: tuple[Tensor, Tensor | None]
        ) -> tuple[Tensor, Tensor | None]:
            total = out[0] if out[1] is None else out[0] + out[1]
            rows = total.view(self.copies, len(self.ids), -1)
            self.states.append(rows[0].clone())
            if self.restore is None or self.restore[0] != number:
                return out
            rows = rows.clone()
            rows[:, self.restore[1]] = self.restore[2]
            return rows.view_as(total), None

        return hook


__all__ = ["Trace", "causal_trace"]
