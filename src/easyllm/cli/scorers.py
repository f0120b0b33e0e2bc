"""Scores of answers as commands name them: a trained reward model, or a rule.

reward:FOLDER              a model with a head of one output, or its adapter
rule:NAME[,KEY=VALUE...]   a reward function of reinforcement learning, with its options:
                           rule:exact, rule:length,target=40, rule:mine.py:score
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from easyllm.evaluate.sampled_answers import SampledAnswer
    from easyllm.evaluate.scorers import Scorer

METAVAR = "reward:FOLDER|rule:NAME"
KINDS = ("reward:", "rule:")


def load_scorer(source: str) -> "Scorer":
    """Returns the scorer that `source` names; it refuses scores that are not finite.

    Raises:
        ConfigError: it is in neither form, there is no such rule or option, or the model has not
            one output.
        SourceError, CheckpointError: the model cannot be loaded.
    """
    from easyllm.core.errors import ConfigError
    from easyllm.evaluate.scorers import finite, reward_model_scorer

    kind, _, name = source.partition(":")
    if f"{kind}:" not in KINDS or not name:
        raise ConfigError(f"{source!r} is not a score; give reward:FOLDER or rule:NAME")
    return finite(source, reward_model_scorer(name) if kind == "reward" else _rule(name))


def _rule(text: str) -> "Scorer":
    """Returns the scorer of a reward function with options: `length,target=40`."""
    import yaml

    from easyllm.core.errors import ConfigError, DataError
    from easyllm.rl.rewards import Answer, RewardFunctionConfig, load_reward

    name, *words = text.split(",")
    options = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"rule:{text}: {word!r} is not an option; write KEY=VALUE")
        options[key] = yaml.safe_load(value)
    function = load_reward(RewardFunctionConfig(function=name, options=options))

    def scores(answers: "Sequence[SampledAnswer]") -> list[float]:
        found = []
        for each in answers:
            seen = Answer(
                prompt=str(each.prompt.messages[-1].get("content") or ""),
                text=each.text,
                num_tokens=each.num_tokens,
                truncated=each.truncated,
                row=each.row,
                token_ids=each.token_ids,
            )
            try:
                found.append(float(function(seen)))
            except Exception as error:
                raise DataError(
                    f"rule:{text} raised {type(error).__name__}: {error} for the answer "
                    f"{each.text[:100]!r} ({each.prompt.location}); fix the row or the rule"
                ) from None
        return found

    return scores


__all__ = ["KINDS", "METAVAR", "load_scorer"]
