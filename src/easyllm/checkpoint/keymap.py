"""Names of parameters, ours and a file's, in both directions.

A key map is a list of rules; each pairs a template of ours with one of the file's. `{i}` stands for a number:

    Rename("layers.{i}.mixer.q_proj.weight", "model.layers.{i}.self_attn.q_proj.weight")

A rule may also transform (`to_ours`, `to_theirs`), as GGUF's row order of queries and keys needs.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from easyllm.core.errors import CheckpointError

Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Rename:
    """One parameter of ours is one tensor of the file's, perhaps transformed."""

    ours: str
    theirs: str
    to_ours: Transform | None = None
    to_theirs: Transform | None = None

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(re.escape(self.ours).replace(r"\{i\}", r"(\d+)"))

    def match(self, name: str) -> str | None:
        """The file's name for our parameter `name`, if this rule speaks of it."""
        found = self._pattern.fullmatch(name)
        if found is None:
            return None
        return self.theirs.replace("{i}", found.group(1)) if found.groups() else self.theirs


@dataclass(frozen=True)
class KeyMap:
    """Rules for every parameter of a model, and names in files that carry nothing we need."""

    rules: Sequence[Rename]
    ignored: tuple[str, ...] = ()
    """Regular expressions of tensors a file may hold besides (recomputed buffers)."""

    def find(self, name: str) -> tuple[str, Rename]:
        """The file's name and the rule for our parameter `name`."""
        for rule in self.rules:
            theirs = rule.match(name)
            if theirs is not None:
                return theirs, rule
        raise AssertionError(f"the key map has no rule for {name!r}")

    def from_file(
        self,
        expected: Mapping[str, Sequence[int]],
        present: Mapping[str, Sequence[int]],
        *,
        source: str,
    ) -> dict[str, tuple[str, Transform | None]]:
        """For each parameter of ours, the tensor to read and how to transform it.

        Args:
            expected: our names and shapes.
            present: the file's names and shapes.

        Raises:
            CheckpointError: a tensor is missing, left over or of another shape.
        """
        plan: dict[str, tuple[str, Transform | None]] = {}
        missing, wrong, used = [], [], set()
        for name, shape in expected.items():
            theirs, rule = self.find(name)
            if theirs not in present:
                missing.append(theirs)
                continue
            used.add(theirs)
            if tuple(present[theirs]) != tuple(shape):
                wrong.append(f"{theirs}: got {tuple(present[theirs])}, expected {tuple(shape)}")
            plan[name] = (theirs, rule.to_ours)
        left = [
            name
            for name in present
            if name not in used and not any(re.fullmatch(p, name) for p in self.ignored)
        ]
        complaints = [
            f"{len(names)} {what}: {_few(names)}"
            for what, names in (
                ("missing", missing),
                ("left over", left),
                ("of wrong shape", wrong),
            )
            if names
        ]
        if complaints:
            raise CheckpointError(
                f"the tensors of {source} do not fit its configuration ({'; '.join(complaints)}); "
                "use the config.json that belongs to these weights"
            )
        return plan

    def to_file(self, name: str, value: Tensor) -> tuple[str, Tensor]:
        """The file's name and value for our parameter."""
        theirs, rule = self.find(name)
        return theirs, value if rule.to_theirs is None else rule.to_theirs(value)


def renames(pairs: Iterable[tuple[str, str]]) -> list[Rename]:
    """Plain renaming rules."""
    return [Rename(ours, theirs) for ours, theirs in pairs]


def _few(names: Sequence[str], most: int = 4) -> str:
    shown = ", ".join(names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
