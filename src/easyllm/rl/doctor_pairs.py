"""The doctor's checks of preference and reward runs."""

from easyllm.rl.finding import Finding
from easyllm.rl.history import History


def loss_exploded(history: History) -> Finding | None:
    """The loss of a preference or reward run starts near ln 2 and falls."""
    values = history.values("train/loss_nats")
    worst = max(values[1:], default=0.0)
    if not values or worst <= 4.0 * max(values[0], 0.5):
        return None
    return Finding(
        "learning_rate",
        "train/loss_nats",
        worst,
        f"near or below the first value, {values[0]:.3g}",
        "the loss rose far above its start; lower optimizer.learning_rate, or raise the warm-up",
    )


def accuracy(history: History) -> Finding | None:
    """Chosen answers must get the higher reward on held-out pairs."""
    value = history.values("eval/reward_accuracy")[-1]
    if value >= 0.52:
        return None
    return Finding(
        "reward_accuracy",
        "eval/reward_accuracy",
        value,
        "0.6 to 0.9",
        "no better than chance on held-out pairs; check that chosen and rejected are not swapped, "
        "train longer, or raise the learning rate",
    )


def margin(history: History) -> Finding | None:
    """The margin on held-out pairs must rise."""
    values = history.values("eval/reward_margin")
    if values[-1] > 0 and values[-1] >= values[0]:
        return None
    return Finding(
        "reward_margin",
        "eval/reward_margin",
        values[-1],
        "above 0 and rising",
        "the margin on held-out pairs does not rise; stop earlier, lower the learning rate, or "
        "check the pairs",
    )


def chosen_falls(history: History) -> Finding | None:
    """The log-probability of chosen answers should not fall far."""
    value = history.last("rewards/chosen")
    if value >= -2.0 or value >= history.first("rewards/chosen"):
        return None
    return Finding(
        "chosen_falls",
        "rewards/chosen",
        value,
        "near or above 0",
        "chosen answers become less likely, too (the margin rises because rejected ones fall "
        "further); raise β, lower the learning rate, or add a language-model term",
    )


__all__ = ["accuracy", "chosen_falls", "loss_exploded", "margin"]
