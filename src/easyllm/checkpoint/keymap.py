"""Names of parameters, ours and a file's, in both directions.

A key map is a list of rules over templates in which `{i}` (and `{e}`) stand for numbers:

    Rename("layers.{i}.mixer.q_proj.weight", "model.layers.{i}.self_attn.q_proj.weight")
    Fused(("...q_proj.weight", "...k_proj.weight"), "...qk.weight")      several of ours are one of the file's

Every rule works both ways, so that what is saved is what would be loaded.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from easyllm.core.errors import CheckpointError

Split = Callable[[Tensor], Sequence[Tensor]]
Join = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Rename:
    """One parameter of ours is one tensor of the file's; `transposed` where the file keeps [in, out]."""

    ours: str
    theirs: str
    transposed: bool = False

    @property
    def templates(self) -> tuple[str, ...]:
        return (self.ours,)

    def split(self, tensor: Tensor) -> Sequence[Tensor]:
        return (tensor.T if self.transposed else tensor,)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0].T if self.transposed else parts[0]


@dataclass(frozen=True)
class Fused:
    """Several parameters of ours lie end to end, along their rows, in one tensor of the file's.

    Attributes:
        ours: templates, in order.
        sizes: rows of each.
        transposed: the file keeps [in, out], so the parts lie side by side.
    """

    ours: tuple[str, ...]
    theirs: str
    sizes: tuple[int, ...]
    transposed: bool = False

    @property
    def templates(self) -> tuple[str, ...]:
        return self.ours

    def split(self, tensor: Tensor) -> Sequence[Tensor]:
        rows = tensor.T if self.transposed else tensor
        if rows.shape[0] != sum(self.sizes):
            return (rows,) * len(self.ours)  # the shapes will not fit, and be reported
        return tuple(rows.split(self.sizes))

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        rows = torch.cat(list(parts))
        return rows.T if self.transposed else rows


Rule = Rename | Fused


@dataclass(frozen=True, slots=True)
class Binding:
    """A rule with its numbers filled in: our names, the file's name.

    Attributes:
        packed: where the file keeps this weight in another storage: the names of that storage's tensors, by the last part
            of the name (`{"qweight": "model.layers.0.mlp.up_proj.qweight", ...}`).
    """

    ours: tuple[str, ...]
    theirs: str
    rule: Rule
    packed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class KeyMap:
    """Rules for every parameter of a model, and names in files that carry nothing we need."""

    rules: Sequence[Rule]
    ignored: tuple[str, ...] = ()
    """Regular expressions of tensors a file may hold besides (recomputed buffers)."""

    def bindings(self, names: Iterable[str]) -> list[Binding]:
        """For our parameter names, the tensors of the file they are in.

        Raises:
            CheckpointError: a name has no rule: the model has a part that its family does not have.
        """
        found: dict[str, Binding] = {}
        for name in names:
            binding = self._bind(name)
            found[binding.theirs] = binding
        return list(found.values())

    def theirs(self, name: str) -> str:
        """The file's name for one of our parameters."""
        return self._bind(name).theirs

    def _bind(self, name: str) -> Binding:
        for rule in self.rules:
            for template in rule.templates:
                match = _pattern(template).fullmatch(name)
                if match:
                    numbers = match.groupdict()
                    ours = tuple(_fill(t, numbers) for t in rule.templates)
                    return Binding(ours, _fill(rule.theirs, numbers), rule)
        raise CheckpointError(
            f"the layout of the model's family has no name for {name!r}; "
            "set its family to 'easyllm', whose layout expresses every model"
        )

    def packed_tensors(self, name: str, endings: Iterable[str]) -> dict[str, str]:
        """The file's names for the tensors of a storage that holds our weight `name`, by their last parts.

        Raises:
            CheckpointError: the file has no name for such a weight alone (it is fused with others, or transposed).
        """
        binding = self._bind(name)
        stem, dot, last = binding.theirs.rpartition(".")
        plain = isinstance(binding.rule, Rename) and not binding.rule.transposed
        if not plain or last != "weight":
            raise CheckpointError(
                f"{binding.theirs} is transposed or holds several weights in this family's layout, which has no place "
                "for a quantized one; save the full weights"
            )
        return {ending: f"{stem}{dot}{ending}" for ending in endings}

    def check(
        self,
        expected: Mapping[str, Sequence[int]],
        present: Mapping[str, Sequence[int]],
        *,
        source: str,
        file_tensors: Sequence[str] = (),
    ) -> list[Binding]:
        """The bindings, once every tensor is known to be there and of the right shape.

        Args:
            expected: our names and shapes; present: the file's.
            file_tensors: the last parts of the names under which the file keeps a weight in another storage; a weight of
                which it has any is taken to be kept so.

        Raises:
            CheckpointError: a tensor is missing, left over or of another shape.
        """
        matrices = {name for name, shape in expected.items() if len(shape) == 2}
        bindings = [
            self._packed(b, present, file_tensors) if matrices.issuperset(b.ours) else b
            for b in self.bindings(expected)
        ]
        files = [name for b in bindings for name in (b.packed.values() or (b.theirs,))]
        missing = [name for name in files if name not in present]
        wrong = []
        for binding in bindings:
            if binding.packed or binding.theirs not in present:
                continue
            wanted = binding.rule.join(
                [torch.empty(tuple(expected[n]), device="meta") for n in binding.ours]
            )
            got = tuple(present[binding.theirs])
            if got != tuple(wanted.shape):
                wrong.append(f"{binding.theirs}: got {got}, expected {tuple(wanted.shape)}")
        used = set(files)
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
            said_by, remedy = (
                ("metadata", "convert the file again, or load the model's Hugging Face folder")
                if source.endswith(".gguf")
                else ("configuration", "use the config.json that belongs to these weights")
            )
            raise CheckpointError(
                f"the tensors of {source} do not fit its {said_by} ({'; '.join(complaints)}); {remedy}"
            )
        return bindings

    def _packed(
        self, binding: Binding, present: Mapping[str, Sequence[int]], file_tensors: Sequence[str]
    ) -> Binding:
        """The binding of a weight that the file keeps in another storage, if it does."""
        stem, _, last = binding.theirs.rpartition(".")
        signs = {ending for ending in file_tensors if ending != "weight"}
        if last != "weight" or not any(f"{stem}.{ending}" in present for ending in signs):
            return binding
        return replace(binding, packed=self.packed_tensors(binding.ours[0], file_tensors))

    def to_file(
        self,
        state: Mapping[str, Tensor],
        packed: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> dict[str, Tensor]:
        """Our parameters under the file's names.

        Args:
            state: full parameters by our names.
            packed: the tensors of other storages, by the names their full weights would have.

        Raises:
            CheckpointError: the file has no name for such a weight.
        """
        found = {
            b.theirs: b.rule.join([state[name] for name in b.ours]) for b in self.bindings(state)
        }
        for name, tensors in (packed or {}).items():
            for ending, theirs in self.packed_tensors(name, tensors).items():
                found[theirs] = tensors[ending]
        return found


@dataclass(frozen=True)
class SameNames(KeyMap):
    """A file that names parameters as we do."""

    def _bind(self, name: str) -> Binding:
        return Binding((name,), name, Rename(name, name))


def renames(pairs: Iterable[tuple[str, str]]) -> list[Rule]:
    """Plain renaming rules."""
    return [Rename(ours, theirs) for ours, theirs in pairs]


def _pattern(template: str) -> re.Pattern[str]:
    escaped = re.escape(template)
    return re.compile(re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", escaped))


def _fill(template: str, numbers: Mapping[str, str]) -> str:
    for name, value in numbers.items():
        template = template.replace(f"{{{name}}}", value)
    return template


def _few(names: Sequence[str], most: int = 4) -> str:
    shown = ", ".join(names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
