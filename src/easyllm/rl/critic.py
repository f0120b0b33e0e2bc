"""The critic of PPO: predicts the return at each token, with a body of its own or the actor's."""

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from easyllm.batches.packing import Batch
from easyllm.models import to_classifier
from easyllm.rl.logprobs import answer_hidden
from easyllm.rl.ppo_config import CriticConfig
from easyllm.train.objectives import RunSetup
from easyllm.train.optim import MasterOptimizer

if TYPE_CHECKING:
    from easyllm.nn.decoder import Decoder


class Critic:
    """Values of tokens, and the optimizer that trains them.

    The head starts at zero, so that the first values are 0.

    Args:
        config: the body, and how fast it learns.
        setup: the actor and its optimizer's configuration.
    """

    def __init__(self, config: CriticConfig, setup: RunSetup) -> None:
        self.config, self.clip_norm = config, setup.clip_norm
        self._own: Decoder | None = None
        trained: dict[str, nn.Parameter] = {}
        if config.body == "own":
            self._own = own = to_classifier(copy.deepcopy(setup.model), 1)
            assert own.score is not None, "to_classifier adds it"
            self._head: nn.Module = own.score
            trained |= {n: p for n, p in own.named_parameters() if p.requires_grad}
        else:
            size, device = setup.model.config.hidden_size, setup.model.device
            self._head = nn.Linear(size, 1, device=device)
        nn.init.zeros_(self._head.get_parameter("weight"))
        if config.body == "shared":
            nn.init.zeros_(self._head.get_parameter("bias"))
        for name, parameter in self._head.named_parameters():
            parameter.requires_grad_(True)
            trained[f"score.{name}"] = parameter
        rate = setup.optimizer.learning_rate * config.rate_factor
        rule = setup.optimizer.model_copy(update={"learning_rate": rate})
        self.optimizer = MasterOptimizer(trained, rule)

    @property
    def is_shared(self) -> bool:
        """Whether the critic reads the actor's hidden states."""
        return self._own is None

    def of_hidden(self, hidden: Tensor) -> Tensor:
        """Returns the values [N] of the actor's hidden states [N, D], for a shared body."""
        states = hidden if self.config.trains_body else hidden.detach()
        values: Tensor = self._head(states.float()).squeeze(-1)
        return values

    def of_batch(self, batch: Batch, rows: Tensor) -> Tensor:
        """Returns the values [N] of the tokens `rows` of a batch, for an own body."""
        assert self._own is not None, "the body is shared; use of_hidden"
        return self._own.head(answer_hidden(self._own, batch, rows)).squeeze(-1)

    def step(self, gradient_scale: float, rate_factor: float) -> None:
        """Applies the accumulated gradients."""
        self.optimizer.scale_gradients(gradient_scale)
        if self.clip_norm is not None:
            self.optimizer.clip(self.optimizer.grad_norm(), self.clip_norm)
        self.optimizer.step(rate_factor)

    def clear(self) -> None:
        """Discards gradients, such as those of a step that was skipped."""
        self.optimizer.clear()

    def tensors(self) -> dict[str, Tensor]:
        """Returns weights and optimizer state by name, for a checkpoint."""
        return self.optimizer.tensors()

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores what `tensors` returned."""
        self.optimizer.load_tensors(tensors)


@torch.no_grad()
def stored_values(critic: Critic, batch: Batch, rows: Tensor) -> Tensor:
    """Returns the values of tokens without a gradient, for a rollout."""
    return critic.of_batch(batch, rows).float().cpu()


__all__ = ["Critic", "stored_values"]
