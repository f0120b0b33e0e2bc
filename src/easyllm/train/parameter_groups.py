"""Which parameters an optimizer moves how: the rule, the factor on the rate and the weight decay of each."""

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
"""Last parts of the names of linears' matrices; tables of positions are called otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Parameters that are moved alike.

    Attributes:
        names: of the parameters.
        rule: the optimizer's configuration, or for what Muon leaves over that of its `others`.
        rate_factor: times the rule's learning rate; 0 freezes.
        weight_decay: of these parameters.
        label: tells the group from the main one in reports; empty for that.
    """

    names: tuple[str, ...]
    rule: AdamWConfig | MuonConfig | SGDConfig
    rate_factor: float
    weight_decay: float
    label: str

    @property
    def learning_rate(self) -> float:
        """The peak rate, before the schedule's factor."""
        return self.rule.learning_rate * self.rate_factor


def build_groups(
    parameters: Mapping[str, Tensor], optimizer: Optimizer, patterns: Sequence[ParameterGroup] = ()
) -> list[Group]:
    """Every parameter's group, in the order of the parameters.

    The first pattern found in a name takes it. Weight decay, where the pattern sets none, is the rule's for every
    matrix (embeddings and heads included) and 0 for norms and biases (whatever has fewer than two axes).

    Raises:
        ConfigError: a pattern is no regular expression, finds no parameter, or only such as an earlier one took; Muon
            finds no matrix; nothing is left to train.
    """
    owners = _owners(tuple(parameters), patterns)
    members: dict[Group, list[str]] = {}
    for name, parameter in parameters.items():
        rule = _rule(name, parameter, optimizer)
        owner = owners[name]
        decay = rule.weight_decay if parameter.ndim >= 2 else 0.0
        if owner is not None and owner.weight_decay is not None:
            decay = owner.weight_decay
        group = Group(
            names=(),
            rule=rule,
            rate_factor=1.0 if owner is None else owner.rate_factor,
            weight_decay=decay,
            label=_label(rule, optimizer, owner),
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
                f"{key} is no regular expression ({error}); write a part of a name, with a backslash before a sign "
                "that is meant itself"
            ) from None
        if not found:
            near = difflib.get_close_matches(group.pattern, names, n=3, cutoff=0.0)
            raise ConfigError(
                f"{key} is found in no trained parameter's name; the nearest are {', '.join(near)}"
            )
        free = [name for name in found if owners[name] is None]
        if not free:
            raise ConfigError(
                f"{key} is left with no parameter: earlier patterns took {found[0]} and every other it is found in; "
                "put the narrower pattern first"
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
    rule: AdamWConfig | MuonConfig | SGDConfig, optimizer: Optimizer, owner: ParameterGroup | None
) -> str:
    words = [] if owner is None or owner.rate_factor == 1 else [owner.pattern]
    return " ".join([*words, *(["others"] if rule is not optimizer else [])])


def _check(groups: Sequence[Group], optimizer: Optimizer) -> None:
    if not any(group.rate_factor for group in groups):
        raise ConfigError(
            "nothing is left to train: every parameter has rate_factor 0 in parameter_groups; raise one"
        )
    if isinstance(optimizer, MuonConfig) and not any(group.rule is optimizer for group in groups):
        raise ConfigError(
            "optimizer muon finds no matrix inside the layers among the trained parameters; use adamw"
        )
