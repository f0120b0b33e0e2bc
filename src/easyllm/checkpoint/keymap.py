"""Key maps: translation between parameter names of the model ("ours") and of a file ("theirs").

A key map is a list of rules with name templates in which `{i}` (and `{e}`) stand for numbers:

    Rename("layers.{i}.mixer.q_proj.weight", "model.layers.{i}.self_attn.q_proj.weight")
    Fused(("...q_proj.weight", "...k_proj.weight"), "...qk.weight")   # several of ours in one

Every rule works in both directions, so that loading and saving always agree.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from easyllm.core.errors import CheckpointError


@dataclass(frozen=True)
class Rename:
    """One parameter of ours is one tensor of the file.

    Attributes:
        ours, theirs: name templates.
        transposed: whether the file stores the weight as [in, out].
    """

    ours: str
    theirs: str
    transposed: bool = False

    @property
    def templates(self) -> tuple[str, ...]:
        """Templates of our names."""
        return (self.ours,)

    def split(self, tensor: Tensor) -> Sequence[Tensor]:
        """Returns our parameters, given the file's tensor."""
        return (tensor.T if self.transposed else tensor,)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Returns the file's tensor, given our parameters."""
        return parts[0].T if self.transposed else parts[0]


@dataclass(frozen=True)
class Fused:
    """Several parameters of ours are concatenated along their rows in one tensor of the file.

    Attributes:
        ours: name templates, in order.
        theirs: the template of the file's name.
        sizes: the number of rows of each parameter, or of each group of its rows.
        transposed: whether the file stores [in, out]; the parts are then concatenated as columns.
        groups: number of groups of rows; the file contains a group of each parameter in turn
            (the queries, keys and values of one head after another).
    """

    ours: tuple[str, ...]
    theirs: str
    sizes: tuple[int, ...]
    transposed: bool = False
    groups: int = 1

    @property
    def templates(self) -> tuple[str, ...]:
        """Templates of our names."""
        return self.ours

    def split(self, tensor: Tensor) -> Sequence[Tensor]:
        """Returns our parameters, given the file's tensor."""
        rows = tensor.T if self.transposed else tensor
        if rows.shape[0] != self.groups * sum(self.sizes):
            return (rows,) * len(self.ours)  # the shape mismatch is reported later
        grouped = rows.unflatten(0, (self.groups, -1))
        return tuple(part.flatten(0, 1) for part in grouped.split(self.sizes, dim=1))

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Returns the file's tensor, given our parameters."""
        grouped = [part.unflatten(0, (self.groups, -1)) for part in parts]
        rows = torch.cat(grouped, dim=1).flatten(0, 1)
        return rows.T if self.transposed else rows


@dataclass(frozen=True)
class Converted:
    """Parameters whose values the file stores in another form, such as another order of rows.

    Attributes:
        rule: names, and how the file combines the parameters.
        read: converts each parameter of the file to ours; the values are in the order of
            `rule.templates`, None for those that are the same.
        write: the inverse.
    """

    rule: Rename | Fused
    read: tuple[Callable[[Tensor], Tensor] | None, ...]
    write: tuple[Callable[[Tensor], Tensor] | None, ...]

    @property
    def theirs(self) -> str:
        """The template of the file's name."""
        return self.rule.theirs

    @property
    def templates(self) -> tuple[str, ...]:
        """Templates of our names."""
        return self.rule.templates

    @property
    def transposed(self) -> bool:
        """Whether the file stores the weight as [in, out]."""
        return self.rule.transposed

    def split(self, tensor: Tensor) -> Sequence[Tensor]:
        """Returns our parameters, given the file's tensor."""
        return _applied(self.read, self.rule.split(tensor))

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Returns the file's tensor, given our parameters."""
        return self.rule.join(_applied(self.write, parts))


def _applied(
    functions: Sequence[Callable[[Tensor], Tensor] | None], parts: Sequence[Tensor]
) -> list[Tensor]:
    each = zip(functions, parts, strict=True)
    return [part if function is None else function(part) for function, part in each]


Rule = Rename | Fused | Converted


@dataclass(frozen=True, slots=True)
class Binding:
    """A rule with its numbers filled in: our names and the file's name.

    Attributes:
        packed: if the file stores this weight in a quantized format, the names of the tensors of
            that format by the last part of the name
            (`{"qweight": "model.layers.0.mlp.up_proj.qweight", ...}`).
    """

    ours: tuple[str, ...]
    theirs: str
    rule: Rule
    packed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class KeyMap:
    """Rules for all parameters of a model, and names of file tensors to ignore."""

    rules: Sequence[Rule]
    ignored: tuple[str, ...] = ()
    """Regular expressions of additional tensors that a file may contain (recomputed buffers)."""

    def bindings(self, names: Iterable[str]) -> list[Binding]:
        """Returns the bindings of our parameter names to the tensors of the file.

        Raises:
            CheckpointError: a name has no rule, since the model has a part that its family lacks.
        """
        found: dict[str, Binding] = {}
        for name in names:
            binding = self._bind(name)
            found[binding.theirs] = binding
        return list(found.values())

    def theirs(self, name: str) -> str:
        """Returns the file's name for one of our parameters."""
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
            f"the checkpoint format of the model's family has no name for {name!r}; "
            "set its family to 'easyllm', whose format can represent every model"
        )

    def packed_tensors(self, name: str, endings: Iterable[str]) -> dict[str, str]:
        """Returns the file's names of the tensors that store our weight `name` quantized.

        Args:
            endings: last parts of the tensors' names, which are the keys of the result.

        Raises:
            CheckpointError: the file's format fuses the weight with others, or transposes it.
        """
        binding = self._bind(name)
        stem, dot, last = binding.theirs.rpartition(".")
        plain = isinstance(binding.rule, Rename) and not binding.rule.transposed
        if not plain or last != "weight":
            raise CheckpointError(
                f"{binding.theirs} is transposed or contains several weights in the checkpoint "
                "format of this family, which cannot represent it quantized; save the full weights"
            )
        return {ending: f"{stem}{dot}{ending}" for ending in endings}

    def check(
        self,
        expected: Mapping[str, Sequence[int]],
        present: Mapping[str, Sequence[int]],
        *,
        source: str,
        file_tensors: Sequence[str] = (),
        optional_tensors: Sequence[str] = (),
    ) -> list[Binding]:
        """Returns the bindings after checking that all tensors exist and have the right shapes.

        Args:
            expected: shapes by our names.
            present: shapes by the file's names.
            source: the name of the checkpoint, for error messages.
            file_tensors: last parts of the names of the tensors of a quantized format; a weight is
                taken to be quantized if the file contains any of its tensors.
            optional_tensors: the same for tensors that may be missing.

        Raises:
            CheckpointError: a tensor is missing, unexpected or has the wrong shape.
        """
        matrices = {name for name, shape in expected.items() if len(shape) == 2}
        bindings = [
            self._packed(b, present, file_tensors, optional_tensors)
            if matrices.issuperset(b.ours)
            else b
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
                ("unexpected", left),
                ("with wrong shape", wrong),
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
                f"the tensors of {source} do not match its {said_by} "
                f"({'; '.join(complaints)}); {remedy}"
            )
        return bindings

    def _packed(
        self,
        binding: Binding,
        present: Mapping[str, Sequence[int]],
        file_tensors: Sequence[str],
        optional_tensors: Sequence[str],
    ) -> Binding:
        """The binding of a weight, with `packed` set if the file stores it quantized."""
        stem, _, last = binding.theirs.rpartition(".")
        signs = {ending for ending in file_tensors if ending != "weight"}
        if last != "weight" or not any(f"{stem}.{ending}" in present for ending in signs):
            return binding
        there = [ending for ending in optional_tensors if f"{stem}.{ending}" in present]
        return replace(
            binding, packed=self.packed_tensors(binding.ours[0], [*file_tensors, *there])
        )

    def to_file(
        self,
        state: Mapping[str, Tensor],
        packed: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> dict[str, Tensor]:
        """Returns our parameters under the file's names.

        Args:
            state: full parameters, by our names.
            packed: the tensors of quantized weights, by our names of the full weights.

        Raises:
            CheckpointError: the file's format cannot represent a parameter.
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
    """The key map of a file with the same parameter names as the model."""

    def _bind(self, name: str) -> Binding:
        return Binding((name,), name, Rename(name, name))


def renames(pairs: Iterable[tuple[str, str]]) -> list[Rule]:
    """Returns a `Rename` rule for each pair (ours, theirs)."""
    return [Rename(ours, theirs) for ours, theirs in pairs]


def _pattern(template: str) -> re.Pattern[str]:
    escaped = re.escape(template)
    return re.compile(re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", escaped))


def _fill(template: str, numbers: Mapping[str, str]) -> str:
    for name, value in numbers.items():
        template = template.replace(f"{{{name}}}", value)
    return template


def _few(names: Sequence[str], most: int = 10) -> str:
    shown = ", ".join(names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
