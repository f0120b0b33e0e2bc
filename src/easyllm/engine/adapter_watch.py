"""Notices which adapters of a model were attached or removed while an engine serves it."""

from typing import TYPE_CHECKING

from easyllm.core.errors import ConfigError
from easyllm.nn.decoder import Decoder
from easyllm.nn.deterministic import check_deterministic

if TYPE_CHECKING:
    from easyllm.adapters.adapter_set import AdapterSet


class AdapterWatch:
    """The adapters of a model as an engine last saw them.

    Args:
        model: the model.
        deterministic: whether adapters must be batch-invariant.
        drafts: whether the engine uses speculative decoding, which supports no named adapters.

    Raises:
        ConfigError: the engine cannot serve the model with its adapters.
    """

    def __init__(self, model: Decoder, *, deterministic: bool, drafts: bool) -> None:
        self.model, self.deterministic, self.drafts = model, deterministic, drafts
        self.num_virtual = model.num_virtual_tokens
        self.check()
        self._changes = model.adapter_changes
        self._seen: dict[str, AdapterSet] = dict(model.adapter_sets)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the adapters that a request may select."""
        return tuple(name for name in self.model.adapter_sets if name)

    @property
    def stale(self) -> bool:
        """Whether adapters were attached or removed since the last call of `changed_names`."""
        return self._changes != self.model.adapter_changes

    def check(self) -> None:
        """Refuses a model with adapters that the engine cannot serve.

        Raises:
            ConfigError: the engine cannot serve the model with its adapters.
        """
        if self.model.num_virtual_tokens != self.num_virtual:
            raise ConfigError(
                "an adapter with virtual tokens was attached to, or removed from, a model that is "
                "being served; create a new engine for it"
            )
        if self.drafts and (self.num_virtual or self.names):
            raise ConfigError(
                "speculative decoding does not support a model with virtual tokens or named "
                "adapters; leave out the draft, or merge the adapter"
            )
        if self.deterministic:
            check_deterministic(self.model)

    def changed_names(self) -> frozenset[str]:
        """Returns the names of the adapters that were attached, removed or replaced.

        `""` among them means that the base itself has changed: an adapter without a name, or one
        that replaces base parameters.

        Raises:
            ConfigError: as for `check`.
        """
        self.check()
        before, now = self._seen, dict(self.model.adapter_sets)
        self._changes, self._seen = self.model.adapter_changes, now
        names = {name for name in (*before, *now) if before.get(name) is not now.get(name)}
        sets = [its[name] for its in (before, now) for name in names if name in its]
        return frozenset(names | ({""} if any(its.base_parameters for its in sets) else set()))


__all__ = ["AdapterWatch"]
