"""The interface of a parameter-efficient method: its configuration, its per-linear module, its set.

A method is one file with one call to `register_adapter`:

    class ScaleConfig(AdapterConfig):
        kind: Literal["scale"] = "scale"
        def build(self, name, in_features, out_features): return Scale(in_features)
    register_adapter(ScaleConfig, peft_type="SCALE")

After that, `adapter: {kind: scale}` can be trained, resumed, saved and loaded in peft's format,
merged, planned and served.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Self

from pydantic import Field
from torch import Generator, Tensor, nn

from easyllm.adapters.file_module import FileModule
from easyllm.adapters.targets import check_patterns, differs_by_layer, name_matches
from easyllm.core.config import Config
from easyllm.core.errors import ConfigError
from easyllm.core.json_types import JsonMapping, JsonObject
from easyllm.nn.config import ModelConfig
from easyllm.nn.cost import Activation, CostTrace, LinearShape
from easyllm.nn.decoder import Decoder
from easyllm.nn.linear import BaseLinear, Embedding, Linear
from easyllm.nn.virtual_tokens import ModelAdapter
from easyllm.ops.low_rank import LowRank

ALL_LINEAR = "all-linear"


class Adapter(nn.Module):
    """The adapter module attached to one linear layer.

    `forward(x, base)` returns the layer's output [..., out] for `x: [..., in]`. `base(x)` computes
    the layer's own output, bias included, and `base.weight` is its weight. The adapter decides
    whether to call `base`, and on what input.

    Attributes:
        passes_input_unchanged: whether `forward` calls `base` exactly once, with `x` itself, so
            that layers with the same input can share one fused matrix product (GEMM).
        batch_invariant: whether each row's result is bitwise independent of the other rows of the
            batch in deterministic mode (`base.context`).
        selected_by_row: whether it is a bank of named adapters (`AdapterBank`).
    """

    passes_input_unchanged: bool = False
    batch_invariant: bool = False
    selected_by_row: bool = False

    def forward(self, x: Tensor, base: BaseLinear) -> Tensor:
        """Returns the adapted layer's output [..., out] for `x: [..., in]`."""
        raise NotImplementedError

    def reset_parameters(self, generator: Generator) -> None:
        """Initialises the parameters so that the adapted layer's output equals the base's."""
        raise NotImplementedError

    def start(self, layer: Linear, generator: Generator) -> None:
        """Completes the initialisation from the base layer; called after `reset_parameters`.

        An adapter that is loaded from a file is not initialised.

        Args:
            layer: the adapted layer, with its weight.
            generator: the source of random numbers, on the CPU.
        """

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Returns weight [out, in] and bias [out] of an equivalent plain linear, in fp32.

        Args:
            weight: the base weight [out, in], in fp32.
            bias: the base bias [out], in fp32; None if the layer has no bias.
        """
        raise NotImplementedError

    def update_factors(self) -> tuple[Tensor, Tensor] | None:
        """Returns A' [r, in] and B' [out, r], fp32, if merging adds B' A' to any weight.

        None means that the update depends on the weight; it is then computed as `merged(W)` - W.
        """
        return None

    def low_rank(self) -> LowRank | None:
        """Returns A [r, in], B [out, r] and s if `forward` is base(x) + s B A x, else None.

        Such adapters are computed for all rows of a batch in one call, and in the compiled decoding
        step of the engine.
        """
        return None

    def loss_factors(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Returns x' [T, k] and W' [out, k] such that x' W'ᵀ is the adapted layer's output.

        A fused linear cross-entropy, which never materialises all logits, takes these two factors.
        The default implementation merges the adapter into the weight.

        Args:
            x: [T, in].
            weight: the base weight [out, in], in its own dtype.

        Raises:
            ConfigError: the output cannot be written in this form.
        """
        try:
            merged, bias = self.merged(weight.float(), None)
        except NotImplementedError:
            merged, bias = weight, weight
        if bias is not None:
            raise ConfigError(
                "the adapter of lm_head cannot be expressed as a weight alone, which the loss "
                "requires; leave lm_head out of its targets"
            )
        return x, merged.to(weight.dtype)

    def cost(
        self, trace: CostTrace, linear: LinearShape, x: Activation, rows: int, name: str
    ) -> None:
        """Records in the trace the FLOPs and saved activations of `forward`, the base excluded.

        The default implementation assumes that all rows are multiplied by every matrix; a method
        that computes something else overrides it.

        Args:
            linear: the adapted layer, or one of several identical layers that share the rows.
            x: the layer's input.
            rows: number of input rows.
            name: prefix for the names of the saved tensors.
        """
        trace.keep_all(x)
        for own, parameter in self.named_parameters():
            if parameter.ndim < 2:
                continue
            flops = 2 * rows * parameter.numel()
            trace.product("adapters", flops, flops * (1 + x.grad))
            inner = min(parameter.shape[0], parameter.shape[1])
            trace.keep(f"{name}.{own}.inner", rows * inner * trace.work.itemsize)
            trace.keep(f"{name}.{own}", trace.cast_bytes(parameter.numel() * linear.copies))

    def file_tensors(self) -> Mapping[str, nn.Parameter]:
        """Returns its parameters, keyed by their suffix in peft's file (`lora_A.weight`)."""
        raise NotImplementedError

    def saved_tensors(self) -> Mapping[str, Tensor]:
        """Returns the tensors to write to a file, by default those of `file_tensors`.

        A method that trains more than it needs afterwards overrides it (pruned ranks).
        """
        return self.file_tensors()


class EmbeddingAdapter(nn.Module):
    """The adapter module attached to an embedding.

    With tied embeddings, the embedding's weight is also the output head's; `project` and
    `loss_factors` say whether the head follows the adapter.
    """

    batch_invariant: bool = True

    def forward(
        self, token_ids: Tensor, base: Callable[[Tensor], Tensor], *, deterministic: bool = False
    ) -> Tensor:
        """Returns the adapted vectors [T, D] of `token_ids: [T]`.

        Args:
            token_ids: [T].
            base: looks up the embedding's own vectors.
            deterministic: as in `ForwardContext`.
        """
        raise NotImplementedError

    def project(
        self,
        hidden: Tensor,
        base: Callable[[Tensor], Tensor],
        *,
        deterministic: bool = False,  # noqa: ARG002 - for overrides
    ) -> Tensor:
        """Returns the logits [N, V] of a tied head; by default the base's, without the adapter.

        Args:
            hidden: [N, D].
            base: computes the logits with the embedding's own weight.
            deterministic: as in `ForwardContext`.
        """
        return base(hidden)

    def reset_parameters(self, generator: Generator) -> None:
        """Initialises the parameters so that the adapted embedding equals the base's."""
        raise NotImplementedError

    def start(self, layer: Embedding, generator: Generator) -> None:
        """As for `Adapter.start`."""

    def merged(self, weight: Tensor, bias: None = None) -> tuple[Tensor, None]:
        """Returns the weight [V, D] of an equivalent plain embedding, in fp32."""
        raise NotImplementedError

    def update_factors(self) -> tuple[Tensor, Tensor] | None:
        """Returns A' [r, D] and B' [V, r], as for `Adapter.update_factors`."""
        return None

    def loss_factors(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """As for `Adapter.loss_factors`, for a tied head."""
        return x, weight

    def file_tensors(self) -> Mapping[str, nn.Parameter]:
        """Returns its parameters, keyed by their suffix in peft's file (`lora_embedding_A`)."""
        raise NotImplementedError

    def saved_tensors(self) -> Mapping[str, Tensor]:
        """As for `Adapter.saved_tensors`."""
        return self.file_tensors()

    @property
    def moves_head(self) -> bool:
        """Whether a tied head follows the adapter."""
        return False


class AdapterConfig(Config):
    """Settings shared by all methods.

    A method overrides `build` or `build_model_adapter`, plus the hooks below that apply to it.
    """

    kind: str = Field(description="Name of the method; each subclass sets its own.")
    targets: tuple[str, ...] = Field(
        default=(ALL_LINEAR,),
        min_length=1,
        description="Linears to adapt, by full name (`layers.0.mixer.q_proj`), its trailing part "
        "(`q_proj`) or a pattern with `*`, `?` and `[...]` (`layers.[0-3].mixer.*`), or "
        "`all-linear` for all linears inside the layers.",
    )
    exclude: tuple[str, ...] = Field(
        default=(), description="Linears among the targets that are not adapted, named as those."
    )
    also_trained: tuple[str, ...] = Field(
        default=(),
        description="Base modules or parameters that are fully trained and saved with the adapter "
        "(`score`, `norm`), named as the targets; peft's `modules_to_save`.",
    )

    level: ClassVar[str] = "linear"
    """`linear` for methods that adapt layers, `model` for those that add virtual tokens."""
    adapts_embeddings: ClassVar[bool] = False
    """Whether the token embedding can be a target; the method then overrides `build_embedding`."""
    saves_modules: ClassVar[bool] = True
    """Whether files hold all parameters of a module of which one is fully trained, as peft's do."""

    trains_keys: ClassVar[bool] = False
    """Whether a model-level method trains keys and values of every layer, not the first input."""

    def adapts(self, name: str) -> bool:
        """Returns whether the layer with this full name (`layers.0.mixer.q_proj`) is adapted."""
        if self.level != "linear" or self._is_whole(name):
            return False
        if any(name_matches(name, pattern) for pattern in self.exclude):
            return False
        if ALL_LINEAR in self.targets and name.startswith("layers."):
            return True
        return any(name_matches(name, target) for target in self.targets)

    def trains(self, parameter: str) -> bool:
        """Returns whether the base parameter with this full name is fully trained."""
        return self._is_whole(parameter)

    def trains_bias(self, parameter: str) -> bool:  # noqa: ARG002 - for overrides
        """Returns whether peft's files store a trained base parameter under `bias`."""
        return False

    def _is_whole(self, name: str) -> bool:
        """Returns whether `also_trained` names a module or parameter, or a module around it."""
        parts = name.split(".")
        around = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
        return any(name_matches(n, pattern) for n in around for pattern in self.also_trained)

    def build(self, name: str, in_features: int, out_features: int) -> Adapter:
        """Builds the adapter of one linear with uninitialised parameters."""
        raise NotImplementedError

    def build_embedding(self, name: str, num_tokens: int, width: int) -> EmbeddingAdapter | None:
        """Builds the adapter of an embedding, with uninitialised parameters; None if it has none.

        It is called for the token embedding, whether it is a target or not.
        """

    def build_model_adapter(self, model: ModelConfig) -> ModelAdapter:
        """Builds a model-level adapter with uninitialised parameters."""
        raise NotImplementedError

    def build_for_file(self, model: ModelConfig) -> ModelAdapter:
        """Builds a model-level adapter that a file is loaded into.

        A method whose files contain what its encoder computed builds it without the encoder.
        """
        return self.build_model_adapter(model)

    def with_token_ids(self, encode: Callable[[str], list[int]]) -> Self:  # noqa: ARG002
        """Returns the configuration with its texts encoded; called before `attach` by a recipe.

        Args:
            encode: the encoding of the model's tokenizer, special tokens included.

        Raises:
            ConfigError: a text has no tokens.
        """
        return self

    def start_from_base(self, adapter: nn.Module, model: Decoder, generator: Generator) -> None:
        """Initialises a model-level adapter from the base model, after its `reset_parameters`.

        Raises:
            ConfigError: the settings do not suit the base model.
        """

    def model_cost(self, trace: CostTrace, model: ModelConfig) -> None:
        """Records what a model-level adapter computes and saves once per forward pass."""

    def unsupported_reason(self, format: str) -> str | None:  # noqa: ARG002 - for overrides
        """Returns why the method cannot adapt weights in a storage format; None if it can."""
        return None

    def merge_unsupported_reason(self) -> str | None:
        """Returns why the adapter cannot be merged into the weights; None if it can."""
        return None

    def check(self, name: str, in_features: int, out_features: int) -> None:
        """Validates a new adapter's settings against one target linear.

        Raises:
            ConfigError: the settings do not suit the linear, which the message names.
        """

    def check_names(self, names: Sequence[str]) -> None:
        """Validates the layers named in the settings against the adapted ones.

        Raises:
            ConfigError: a named layer is not adapted; the message contains the name.
        """

    def check_base(self, names: Sequence[str]) -> None:
        """Validates the settings against the names of all base parameters.

        Raises:
            ConfigError: the settings name a parameter that does not exist.
        """

    def check_targets(self, layers: Mapping[str, Linear | Embedding]) -> None:
        """Checks that every target, and every exclusion, matches a layer of the model.

        Args:
            layers: all linears and embeddings of the model, by full name.

        Raises:
            ConfigError: one matches nothing.
        """
        possible = [
            name
            for name, layer in layers.items()
            if self.adapts_embeddings or isinstance(layer, Linear)
        ]
        named = [target for target in self.targets if target != ALL_LINEAR]
        what = "linear layer of this model"
        check_patterns(named, possible, key="adapter target", what=what, hint=f"{ALL_LINEAR} or ")
        check_patterns(self.exclude, possible, key="adapter.exclude", what=what)

    def require_no_targets(self, because: str, advice: str) -> None:
        """Raises ValueError if layers are selected, for a method that adapts none.

        Args:
            because: the method and why it adapts none, for the message.
            advice: what to do apart from removing the key; empty for nothing.
        """
        for key in ("targets", "exclude"):
            value = getattr(self, key)
            if value != type(self).model_fields[key].default:
                raise ValueError(
                    f"{key}={list(value)} has no effect on {because}; {advice}remove {key}"
                )

    def differs_by_layer(self) -> bool:
        """Returns whether layers of the same shape may have different adapters."""
        return differs_by_layer((*self.targets, *self.exclude, *self.also_trained))

    def check_steps(self, total_steps: int) -> None:
        """Validates the settings against the number of optimizer steps of the run.

        Raises:
            ConfigError: a schedule of the method does not fit into the run.
        """

    def rate_factor(self, name: str, *, starts_at_zero: bool) -> float:  # noqa: ARG002
        """Returns the factor on the learning rate of one of the adapter's matrices.

        Args:
            name: its name in the model.
            starts_at_zero: whether all values of the matrix are initially zero.
        """
        return 1.0

    def to_peft(self, modules: Mapping[str, str]) -> JsonObject:  # noqa: ARG002 - for overrides
        """Returns the method-specific entries of `adapter_config.json`.

        Args:
            modules: the adapted linears, as a mapping from our names to the file's names.
        """
        return {}

    def base_to_peft(self, model: ModelConfig) -> JsonObject:  # noqa: ARG002 - for overrides
        """Returns the entries of `adapter_config.json` that describe the base model."""
        return {}

    def check_file(
        self, description: JsonMapping, tensors: Mapping[str, Tensor], model: ModelConfig
    ) -> None:
        """Validates an adapter file, of which this is the configuration, against the base model.

        Args:
            description: the parsed `adapter_config.json`.
            tensors: the file's tensors.

        Raises:
            CheckpointError: the file contradicts itself, or belongs to another base model.
        """

    @classmethod
    def from_peft(
        cls,
        description: JsonMapping,  # noqa: ARG003 - for overrides
        modules: Mapping[str, FileModule],
    ) -> Self:
        """Returns the configuration of an adapter file; its `targets` are exactly `modules`.

        Args:
            description: the parsed `adapter_config.json`.
            modules: the adapted linears of the file, by our names.

        Raises:
            CheckpointError: a key that changes the result is not supported.
        """
        return cls(targets=tuple(modules) or (ALL_LINEAR,))  # type: ignore[call-arg]


__all__ = ["ALL_LINEAR", "Adapter", "AdapterConfig", "EmbeddingAdapter"]
