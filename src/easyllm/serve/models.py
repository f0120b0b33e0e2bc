"""The models and adapters that a server offers by name, loaded and unloaded while it runs."""

import asyncio
import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from easyllm.core.errors import EasyllmError, suggest
from easyllm.core.json_types import JsonMapping
from easyllm.engine.llm import LLM
from easyllm.serve.errors import APIError
from easyllm.serve.metrics import Metrics
from easyllm.serve.service import EngineFailure, EngineService

Loader = Callable[[], LLM]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A model or adapter under the name by which requests select it, ready to run.

    Attributes:
        name: the name.
        service: the engine that runs it.
        adapter: the adapter of the engine's model that its requests use; empty for the base model.
    """

    name: str
    service: EngineService
    adapter: str = ""

    @property
    def llm(self) -> LLM:
        """The model with its engine."""
        return self.service.llm

    @property
    def defaults(self) -> JsonMapping:
        """The model's own defaults of the sampling parameters."""
        return self.llm.sampling_defaults

    @property
    def max_tokens(self) -> int:
        """Maximum number of tokens of a prompt plus its completion.

        Bounded by the model's context and by the KV cache. The final token is never cached, hence
        the + 1.
        """
        pool = self.llm.engine.pool
        return min(self.llm.engine.max_seq_len, pool.num_pages * pool.page_size + 1)


@dataclass(slots=True)
class _Slot:
    """A model that may be loaded or not.

    Attributes:
        name: the first name under which it is served.
        load: loads it again after it was unloaded; None if it cannot be.
        service: its engine; None while it is not loaded.
        adapters: folders of the adapters that were added by request, by name.
        used_s: when a request last selected it.
    """

    name: str
    load: Loader | None
    service: EngineService | None
    adapters: dict[str, Path] = field(default_factory=dict)
    used_s: float = field(default_factory=time.monotonic)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Name:
    """A served name.

    Attributes:
        slot: the model.
        adapter: the adapter of the model that its requests use.
        created: time at which it was added, in seconds since 1970.
        max_tokens, defaults: as in `ServedModel`, also known while the model is not loaded.
    """

    slot: _Slot
    adapter: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    max_tokens: int
    defaults: JsonMapping


class ServedModels:
    """All served models by name; several names may share one engine.

    Args:
        models: the models by name. An engine runs in a single thread, regardless of how many names
            it is served under.
        adapters: for a served name, the adapter of its model that its requests select; without an
            entry, the base model answers.
        loaders: for a served name, how its model is loaded again; models without one stay loaded.
        adapters_folder: the folder from which adapters may be loaded; None loads none.
        metrics: receives the numbers of the engines.
    """

    def __init__(
        self,
        models: Mapping[str, LLM],
        *,
        adapters: Mapping[str, str] | None = None,
        loaders: Mapping[str, Loader] | None = None,
        adapters_folder: Path | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self._metrics, self._folder = metrics or Metrics(), adapters_folder
        slots: dict[int, _Slot] = {}
        self._names: dict[str, _Name] = {}
        self._loading: set[str] = set()  # names of adapters that are being loaded
        for name, llm in models.items():
            if id(llm) not in slots:
                service = EngineService(name, llm, metrics=self._metrics)
                slots[id(llm)] = _Slot(name, (loaders or {}).get(name), service)
            slot = slots[id(llm)]
            assert slot.service is not None, "all models are loaded at first"
            served = ServedModel(name=name, service=slot.service)
            self._names[name] = _Name(
                slot=slot,
                adapter=(adapters or {}).get(name, ""),
                max_tokens=served.max_tokens,
                defaults=served.defaults,
            )
        self._slots = list(slots.values())

    @property
    def services(self) -> list[EngineService]:
        """The engines that are loaded."""
        return [slot.service for slot in self._slots if slot.service is not None]

    @property
    def names(self) -> dict[str, _Name]:
        """The served names, in the order in which they were added."""
        return self._names

    def find(self, name: str | None) -> tuple[str, _Name]:
        """Returns a served name with what it stands for; without a name, the first.

        Raises:
            APIError: no model has this name.
        """
        if name is None:
            return next(iter(self._names.items()))
        if name in self._names:
            return name, self._names[name]
        hint = suggest(name, self._names) or f"; the served models are {', '.join(self._names)}"
        message = f"model {name!r} is not served{hint}"
        raise APIError(404, message, param="model", code="model_not_found")

    async def open(self, name: str | None) -> ServedModel:
        """Returns the model of a name, loaded if it was not; without a name, the first.

        Raises:
            APIError: no model has this name.
            EngineFailure: the model can no longer be loaded.
        """
        name, found = self.find(name)
        slot = found.slot
        slot.used_s = time.monotonic()
        async with slot.lock:  # several requests wait for one loading
            service = slot.service or await self._load(slot)
        return ServedModel(name=name, service=service, adapter=found.adapter)

    async def _load(self, slot: _Slot) -> EngineService:
        assert slot.load is not None, "a model without a loader is never unloaded"
        load = slot.load

        def loaded() -> LLM:
            llm = load()
            for name, folder in slot.adapters.items():
                llm.load_adapter(name, folder)
            return llm

        try:
            llm = await asyncio.to_thread(loaded)
        except EasyllmError as error:
            raise EngineFailure(f"model {slot.name!r} cannot be loaded again: {error}") from None
        slot.service = EngineService(slot.name, llm, metrics=self._metrics)
        return slot.service

    async def unload(self, name: str) -> None:
        """Unloads a model; its running requests end first. The next request loads it again.

        Raises:
            APIError: no model has this name, or it cannot be loaded again.
        """
        _, found = self.find(name)
        if found.slot.load is None:
            message = f"model {name!r} cannot be unloaded: its source is not known"
            raise APIError(400, message, param="model", code="invalid_value")
        await self._unload(found.slot)

    async def _unload(self, slot: _Slot, *, only_idle_for_s: float | None = None) -> None:
        async with slot.lock:
            service = slot.service
            if service is None:
                return
            while service.num_active:
                if only_idle_for_s is not None:
                    return
                await asyncio.sleep(0.05)
            if only_idle_for_s is not None and time.monotonic() - slot.used_s < only_idle_for_s:
                return
            slot.service = None
            await asyncio.to_thread(service.close)
        del service
        gc.collect()  # the engine and the model refer to each other

    async def unload_idle(self, idle_s: float) -> None:
        """Unloads models that no request has used for `idle_s` seconds; never returns."""
        while True:
            await asyncio.sleep(min(idle_s / 4, 10))
            for slot in self._slots:
                if slot.load is not None:
                    await self._unload(slot, only_idle_for_s=idle_s)

    async def load_adapter(self, name: str, path: str, base: str | None = None) -> None:
        """Adds an adapter under a name of its own.

        Args:
            name: the name by which requests select it.
            path: its folder, relative to the folder from which adapters may be loaded.
            base: name of the model to which it belongs; by default the first.

        Raises:
            APIError: adapters may not be loaded, the folder is outside the allowed one, the name is
                taken, or there is no such model.
            EasyllmError: the adapter cannot be read, or belongs to another model.
        """
        folder = self._allowed(path)
        if name in self._names or name in self._loading:
            message = f"the name {name!r} is taken; choose another"
            raise APIError(400, message, param="lora_name", code="invalid_value")
        self._loading.add(name)  # another request may come while this one waits
        try:
            served = await self.open(base)
            found = self._names[served.name]
            await served.service.call(lambda: served.llm.load_adapter(name, folder))
        finally:
            self._loading.discard(name)
        found.slot.adapters[name] = folder
        self._names[name] = _Name(
            slot=found.slot, adapter=name, max_tokens=found.max_tokens, defaults=found.defaults
        )

    async def unload_adapter(self, name: str) -> None:
        """Removes an adapter; its running requests are cancelled.

        Raises:
            APIError: no adapter has this name.
        """
        _, found = self.find(name)
        if not found.adapter:
            message = f"{name!r} is a model, not an adapter"
            raise APIError(400, message, param="lora_name", code="invalid_value")
        del self._names[name]
        found.slot.adapters.pop(found.adapter, None)
        service = found.slot.service
        if service is not None:
            await service.call(lambda: service.llm.unload_adapter(found.adapter))

    def _allowed(self, path: str) -> Path:
        """Returns the folder of an adapter, which must be inside the allowed one."""
        if self._folder is None:
            raise APIError(
                403,
                "adapters are not loaded by request; start the server with --adapters-folder",
                param="lora_path",
            )
        root = self._folder.resolve()
        try:
            found = (root / path).resolve()
            allowed = found.is_relative_to(root) and found.is_dir()
        except (OSError, ValueError):  # no path of this system: too long, or with a null character
            allowed = False
        if not allowed:
            message = f"there is no folder {path!r} in the folder of adapters"
            raise APIError(404, message, param="lora_path", code="not_found")
        return found

    def close(self) -> None:
        """Stops the engines' threads."""
        for service in self.services:
            service.close()
