"""Parameter groups: the update rule, learning-rate factor and weight decay of each parameter."""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from easyllm.core.errors import ConfigError
from easyllm.train.optim_config import (
    AdamWConfig,
    MuonConfig,
    Optimizer,
    ParameterGroup,
    SGDConfig,
)

MATRIX_LEAVES = frozenset({"weight", "lora_A", "lora_B"})
"""Last name parts of the weight matrices of linears; position embedding tables have other names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Parameters with the same update rule and settings.

    Attributes:
        names: names of the parameters.
        rule: the optimizer's configuration; for parameters not updated by Muon, that of `others`.
        rate_factor: factor on the rule's learning rate; 0 freezes the parameters.
        weight_decay: weight decay of these parameters.
        label: name of the group in reports; empty for the main group.
    """

    names: tuple[str, ...]
    rule: AdamWConfig | MuonConfig | SGDConfig
    rate_factor: float
    weight_decay: float
    label: str

    @property
    def learning_rate(self) -> float:
        """The peak learning rate, before the schedule's factor."""
        return self.rule.learning_rate * self.rate_factor


def build_groups(
    parameters: Mapping[str, Tensor],
    optimizer: Optimizer,
    patterns: Sequence[ParameterGroup] = (),
    rate_factors: Mapping[str, float] | None = None,
) -> list[Group]:
    """Assigns every parameter to a group.

    Each parameter belongs to the first pattern found in its name. If that pattern sets no weight
    decay, matrices (embeddings and heads included) get the rule's, and norms and biases (tensors
    with fewer than two axes) get 0.

    Args:
        parameters: the trainable parameters, by name.
        optimizer: the optimizer's configuration.
        patterns: the parameter groups of the recipe, the first match winning.
        rate_factors: further factors on the learning rates of single parameters, by name.

    Returns:
        The groups, in the order of their first parameters.

    Raises:
        ConfigError: a pattern is not a regular expression, matches no parameter, or matches only
            parameters of earlier patterns; Muon finds no matrix; all parameters are frozen.
    """
    owners = _owners(tuple(parameters), patterns)
    members: dict[Group, list[str]] = {}
    factors = rate_factors or {}
    for name, parameter in parameters.items():
        rule = _rule(name, parameter, optimizer)
        owner = owners[name]
        decay = rule.weight_decay if parameter.ndim >= 2 else 0.0
        if owner is not None and owner.weight_decay is not None:
            decay = owner.weight_decay
        group = Group(
            names=(),
            rule=rule,
            rate_factor=factors.get(name, 1.0) * (1.0 if owner is None else owner.rate_factor),
            weight_decay=decay,
            label=_label(rule, optimizer, owner, factors.get(name, 1.0)),
        )
        members.setdefault(group, []).append(name)
    groups = [replace(group, names=tuple(names)) for group, names in members.items()]
    _check(groups, optimizer)
    return groups


def _owners(
    names: Sequence[str], patterns: Sequence[ParameterGroup]
) -> dict[str, ParameterGroup | None]:
    owners: dict[str, ParameterGroup | None] = dict.fromkeys(names)
    for index, group in enumerate(patterns):
        key = f"parameter_groups.{index}.pattern={group.pattern!r}"
        try:
            found = [name for name in names if re.search(group.pattern, name)]
        except re.error as error:
            raise ConfigError(
                f"{key} is not a regular expression ({error}); write a part of a name, with a "
                "backslash before characters that are meant literally"
            ) from None
        if not found:
            near = difflib.get_close_matches(group.pattern, names, n=3, cutoff=0.0)
            raise ConfigError(
                f"{key} matches no trained parameter; the closest names are {', '.join(near)}"
            )
        free = [name for name in found if owners[name] is None]
        if not free:
            raise ConfigError(
                f"{key} applies to no parameter, because earlier patterns already match "
                f"{found[0]} and all others that it matches; put the more specific pattern first"
            )
        owners.update(dict.fromkeys(free, group))
    return owners


def _rule(
    name: str, parameter: Tensor, optimizer: Optimizer
) -> AdamWConfig | MuonConfig | SGDConfig:
    if not isinstance(optimizer, MuonConfig):
        return optimizer
    is_matrix = parameter.ndim == 2 and name.rsplit(".", 1)[-1] in MATRIX_LEAVES
    return optimizer if is_matrix and name.startswith("layers.") else optimizer.others


def _label(
    rule: AdamWConfig | MuonConfig | SGDConfig,
    optimizer: Optimizer,
    owner: ParameterGroup | None,
    factor: float,
) -> str:
    words = [] if owner is None or owner.rate_factor == 1 else [owner.pattern]
    if factor != 1:
        words.append(f"times {factor:g}")
    return " ".join([*words, *(["others"] if rule is not optimizer else [])])


def _check(groups: Sequence[Group], optimizer: Optimizer) -> None:
    if not any(group.rate_factor for group in groups):
        raise ConfigError(
            "nothing is left to train: every parameter has rate_factor 0 in parameter_groups; "
            "raise one"
        )
    if isinstance(optimizer, MuonConfig) and not any(group.rule is optimizer for group in groups):
        raise ConfigError(
            "optimizer muon finds no matrix inside the layers among the trained parameters; "
            "use adamw"
        )
