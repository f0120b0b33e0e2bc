"""The progress of a training run: counters, the usual loss, and the evaluations that decide."""

from dataclasses import asdict, dataclass

from easyllm.core.json_types import JsonMapping, JsonObject

SPIKE_MEMORY, SPIKE_AFTER = 0.98, 20
"""Decay per step of the running mean that losses are compared with to detect spikes, and the number
of steps before it is used."""
_DECISIONS = (
    *("best_loss_nats", "best_step", "stopping_loss_nats", "patience_used", "stopped"),
    "retention_before",
)


@dataclass(slots=True, kw_only=True)
class TrainProgress:
    """What has happened since the first step of the run; part of every checkpoint.

    Attributes:
        step: optimizer steps, skipped ones included.
        tokens, trained_tokens: all tokens, and the labelled ones among them.
        skipped, skipped_in_a_row: steps skipped because of a NaN or infinite loss or gradient.
        usual_loss_nats: running mean of the loss over `usual_steps` steps, used to detect spikes.
        best_loss_nats, best_step: the lowest evaluation loss, and its step.
        stopping_loss_nats: the loss that the next evaluation must fall below, for early stopping.
        patience_used: consecutive evaluations without such a fall.
        retention_before: loss on the retention set before training, in nats.
        stopped: why the run ended before its last step; a callback that sets it ends the run.
    """

    step: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    usual_loss_nats: float = 0.0
    usual_steps: int = 0
    best_loss_nats: float | None = None
    best_step: int | None = None
    stopping_loss_nats: float | None = None
    patience_used: int | None = None
    retention_before: float | None = None
    stopped: str | None = None

    def count(self, tokens: int, trained_tokens: int) -> None:
        """Adds one step to the counters."""
        self.step += 1
        self.tokens += tokens
        self.trained_tokens += trained_tokens

    def is_spike(self, loss_nats: float, factor: float) -> bool:
        """Returns whether a loss exceeds `factor` times its running mean, after enough steps."""
        return self.usual_steps >= SPIKE_AFTER and loss_nats > factor * self.usual_loss_nats

    def note_loss(self, loss_nats: float) -> None:
        """Updates the exponential moving average of the loss."""
        self.usual_steps += 1
        memory = min(SPIKE_MEMORY, 1 - 1 / self.usual_steps)
        self.usual_loss_nats = memory * self.usual_loss_nats + (1 - memory) * loss_nats

    def restore(self, other: "TrainProgress") -> None:
        """Takes over all values of `other`."""
        for name, value in asdict(other).items():
            setattr(self, name, value)

    def to_json(self) -> tuple[JsonObject, JsonObject]:
        """Returns the counters, and what evaluations have decided, as stored in a checkpoint."""
        values = asdict(self)
        decided = {name: values.pop(name) for name in _DECISIONS}
        return values, {name: value for name, value in decided.items() if value is not None}

    @classmethod
    def from_json(cls, totals: JsonMapping, extra: JsonMapping) -> "TrainProgress":
        """Returns the progress that `to_json` described; `extra` may have other keys as well.

        Raises:
            TypeError: a counter is unknown.
        """
        return cls(**totals, **{name: extra[name] for name in _DECISIONS if name in extra})
