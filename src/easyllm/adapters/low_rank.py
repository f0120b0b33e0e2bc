"""Settings that LoRA and its variants share: rank, scale, targets, and what is trained with them.

The scale s of an update is α / r, or α / √r with rank stabilisation (rsLoRA; Kalajdzievski 2023,
arXiv 2312.03732).
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal, Self, TypeVar

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from easyllm.adapters.adapter import Adapter, AdapterConfig, EmbeddingAdapter
from easyllm.adapters.embedding import TOKEN_ROWS, LoRAEmbedding, TrainedTokens
from easyllm.adapters.file_module import FileModule
from easyllm.adapters.peft_keys import check_keys, matches
from easyllm.adapters.targets import check_patterns, differs_by_layer, name_matches
from easyllm.core.errors import CheckpointError, ConfigError
from easyllm.core.json_types import JsonMapping, JsonObject
from easyllm.nn.moe import ROUTERS

logger = logging.getLogger(__name__)
BuiltT = TypeVar("BuiltT", bound=Adapter)
BIAS = {"none": "none", "all": "all", "adapted": "lora_only"}
"""Our values of `bias`, and peft's."""


class LowRankConfig(AdapterConfig):
    """Rank, scale and targets of low-rank updates."""

    rank: PositiveInt = Field(
        default=16, description="Rank r of every linear that matches no key of rank_pattern."
    )
    alpha: PositiveFloat = Field(
        default=32.0,
        description="α of every linear that matches no key of alpha_pattern; the update is scaled "
        "by α / r.",
    )
    dropout: float = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="Dropout probability on the adapter's input in training.",
    )
    rslora: bool = Field(
        default=False,
        description="Whether the scale is α / √r instead of α / r (rsLoRA; Kalajdzievski 2023, "
        "arXiv 2312.03732).",
    )
    rank_pattern: dict[str, PositiveInt] = Field(
        default={},
        description="Ranks of individual linears, keyed by a linear's full name, its trailing "
        "part or a pattern; the first match applies.",
    )
    alpha_pattern: dict[str, PositiveFloat] = Field(
        default={},
        description="Values of α of individual linears, keyed by a linear's full name, its "
        "trailing part or a pattern; the first match applies.",
    )
    bias: Literal["none", "all", "adapted"] = Field(
        default="none",
        description="Base biases that are trained and saved too: `all` of the model, or those of "
        "the `adapted` linears (peft's `lora_only`).",
    )
    trained_tokens: tuple[NonNegativeInt, ...] = Field(
        default=(),
        description="Token ids whose embedding rows are trained and saved with the adapter; a "
        "tied head follows (peft's `trainable_token_indices`).",
    )
    rate_ratio: PositiveFloat = Field(
        default=1.0,
        description="Factor on the learning rate of the matrix that starts at zero (LoRA+; Hayou "
        "et al. 2024, arXiv 2402.12354).",
    )

    adapts_embeddings: ClassVar[bool] = True
    suffixes: ClassVar[frozenset[str]] = frozenset({"lora_A.weight", "lora_B.weight"})
    """Last parts of the names of a linear's tensors in peft's file."""

    @model_validator(mode="after")
    def _each_token_once(self) -> Self:
        twice = [t for n, t in enumerate(self.trained_tokens) if t in self.trained_tokens[:n]]
        if twice:
            raise ValueError(f"trained_tokens names token {twice[0]} twice; name each token once")
        return self

    @model_validator(mode="after")
    def _one_adapter_of_the_embedding(self) -> Self:
        if self.trained_tokens and self.adapts("embed_tokens"):
            raise ValueError(
                "the embedding is a target and trained_tokens trains rows of it; choose one"
            )
        if self.trained_tokens and self.trains("embed_tokens.weight"):
            raise ValueError(
                "also_trained trains the whole embedding and trained_tokens rows of it; choose one"
            )
        return self

    def rank_of(self, name: str) -> int:
        """Returns the rank r for the layer with this name."""
        found = (r for pattern, r in self.rank_pattern.items() if name_matches(name, pattern))
        return next(found, self.rank)

    def alpha_of(self, name: str) -> float:
        """Returns α for the layer with this name."""
        found = (a for pattern, a in self.alpha_pattern.items() if name_matches(name, pattern))
        return next(found, self.alpha)

    def scale_of(self, name: str) -> float:
        """Returns the scale s for the layer with this name."""
        rank = self.rank_of(name)
        return self.alpha_of(name) / (math.sqrt(rank) if self.rslora else rank)

    def build_as(
        self, module: Callable[..., BuiltT], name: str, in_features: int, out_features: int
    ) -> BuiltT:
        """Builds the adapter of one linear as a `LoRA` or a class with the same arguments."""
        rank, scale = self.rank_of(name), self.scale_of(name)
        return module(rank, scale, in_features, out_features, dropout=self.dropout)

    def build_embedding(self, name: str, num_tokens: int, width: int) -> EmbeddingAdapter | None:
        """Builds the adapter of the embedding; None if it is not a target and no rows are trained.

        Raises:
            ConfigError: a trained token id is not in the vocabulary.
        """
        if self.trained_tokens:
            if max(self.trained_tokens) >= num_tokens:
                raise ConfigError(
                    f"adapter.trained_tokens names token {max(self.trained_tokens)}, but the "
                    f"model's ids end at {num_tokens - 1}; extend the vocabulary first"
                )
            return TrainedTokens(self.trained_tokens, width)
        if not self.adapts_embeddings or not self.adapts(name):
            return None
        return LoRAEmbedding(self.rank_of(name), self.scale_of(name), num_tokens, width)

    def trains(self, parameter: str) -> bool:
        """Returns whether the base parameter with this full name is fully trained."""
        return super().trains(parameter) or self.trains_bias(parameter)

    def trains_bias(self, parameter: str) -> bool:
        """Returns whether `bias` selects a base parameter."""
        owner, _, leaf = parameter.rpartition(".")
        if leaf != "bias" or self.bias == "none":
            return False
        return self.bias == "all" or self.adapts(owner)

    def rate_factor(self, name: str, *, starts_at_zero: bool) -> float:
        """Returns `rate_ratio` for a low-rank matrix that starts at zero, else 1."""
        is_low_rank = name.rpartition(".")[2].startswith("lora_")
        return self.rate_ratio if is_low_rank and starts_at_zero else 1.0

    def check_base(self, names: Sequence[str]) -> None:
        """Checks that `bias` selects a bias of the model.

        Raises:
            ConfigError: it selects none.
        """
        if self.bias != "none" and not any(self.trains_bias(name) for name in names):
            what = "the model has" if self.bias == "all" else "the adapted linears have"
            raise ConfigError(
                f"adapter.bias={self.bias} trains biases, but {what} none; leave it out"
            )

    def check(self, name: str, in_features: int, out_features: int) -> None:
        """Checks that the adapter's rank does not exceed the rank of the layer's weight.

        Raises:
            ConfigError: the rank is too large; routers are exempt.
        """
        rank, most = self.rank_of(name), min(in_features, out_features)
        # all-linear includes routers, which have few outputs; they are allowed
        if rank > most and not name.endswith(ROUTERS):
            leaf = name.rsplit(".", 1)[-1]
            raise ConfigError(
                f"adapter.rank={rank} is more than the rank of {leaf} ({out_features} x "
                f"{in_features}), which is at most {most}; lower adapter.rank, or leave {leaf} out "
                "of adapter.targets"
            )

    def differs_by_layer(self) -> bool:
        """Returns whether layers of the same shape may have different ranks, scales or targets."""
        names = (*self.rank_pattern, *self.alpha_pattern)
        return super().differs_by_layer() or differs_by_layer(names)

    def check_names(self, names: Sequence[str]) -> None:
        """Checks that each key of `rank_pattern` and `alpha_pattern` matches an adapted layer.

        Raises:
            ConfigError: a key matches no adapted layer.
        """
        for key in ("rank_pattern", "alpha_pattern"):
            keys: Mapping[str, float] = getattr(self, key)
            check_patterns(keys, names, key=f"adapter.{key}", what="adapted linear")

    def to_peft(self, modules: Mapping[str, str]) -> JsonObject:
        """Returns the LoRA entries of `adapter_config.json`, patterns by the file's full names."""
        own = {ours: theirs for ours, theirs in modules.items() if self.adapts(ours)}
        ranks = {theirs: self.rank_of(ours) for ours, theirs in own.items()}
        alphas = {theirs: self.alpha_of(ours) for ours, theirs in own.items()}
        return {
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.rslora,
            "rank_pattern": {name: r for name, r in ranks.items() if r != self.rank},
            "alpha_pattern": {name: a for name, a in alphas.items() if a != self.alpha},
            "bias": BIAS[self.bias],
            "trainable_token_indices": list(self.trained_tokens) or None,
            "fan_in_fan_out": False,
        }

    @classmethod
    def from_peft(cls, description: JsonMapping, modules: Mapping[str, FileModule]) -> Self:
        """Returns the configuration of a peft LoRA file, with a rank and α for each module.

        Raises:
            CheckpointError: an unsupported key changes the result, or tensors and configuration
                disagree.
        """
        check_keys(description, honoured=HONOURED, neutral=cls.neutral_keys())
        rank, alpha = description["r"], description["lora_alpha"]
        tokens = trained_tokens(description, modules)
        ranks, alphas = dict[str, int](), dict[str, float]()
        several = dict[str, list[float]]()
        own = {ours: m for ours, m in modules.items() if set(m.tensors) != {TOKEN_ROWS}}
        for ours, module in own.items():
            of_file = cls._rank_in_file(module)
            said = matches(description.get("rank_pattern"), module.name) or [rank]
            if of_file not in said:
                raise CheckpointError(
                    f"{module.name} has rank {of_file} in the adapter's file and {said[0]} in its "
                    "configuration; copy the adapter again"
                )
            if of_file != rank:
                ranks[ours] = of_file
            its_alphas = matches(description.get("alpha_pattern"), module.name) or [alpha]
            if its_alphas[0] != alpha:
                alphas[ours] = its_alphas[0]
            if len(set(its_alphas)) > 1:
                several[module.name] = its_alphas
        _warn_of_ambiguous_alphas(several)
        return cls(
            rank=rank,
            alpha=alpha,
            dropout=description.get("lora_dropout") or 0.0,
            rslora=bool(description.get("use_rslora")),
            rank_pattern=ranks,
            alpha_pattern=alphas,
            bias=_our_bias(description.get("bias")),
            trained_tokens=tokens,
            targets=tuple(own) or ("no linear",),
        )  # type: ignore[call-arg]

    @classmethod
    def neutral_keys(cls) -> JsonObject:
        """Returns peft's keys that the method ignores, with the values they must have."""
        return NEUTRAL

    @classmethod
    def _rank_in_file(cls, module: FileModule) -> int:
        """Returns the rank of a module's matrices, whose names are checked."""
        of_table = {"lora_embedding_A", "lora_embedding_B"}
        found = set(module.tensors)
        if found == of_table:
            return len(module.tensors["lora_embedding_A"])
        if found != cls.suffixes:
            raise module.unexpected(" and ".join(sorted(cls.suffixes)))
        return len(module.tensors["lora_A.weight"])


def trained_tokens(description: JsonMapping, modules: Mapping[str, FileModule]) -> tuple[int, ...]:
    """Returns the token ids of `trainable_token_indices`.

    Raises:
        CheckpointError: rows of another layer than the embedding are trained, or their number
            differs from that of the file.
    """
    given = description.get("trainable_token_indices")
    if not given:
        return ()
    by_layer = {"embed_tokens": given} if isinstance(given, list) else dict(given)
    others = [name for name in by_layer if not str(name).endswith(("embed_tokens", "wte"))]
    if others:
        raise CheckpointError(
            f"the adapter's configuration sets trainable_token_indices of {others[0]!r}, which is "
            "not implemented (expected rows of the token embedding)"
        )
    ids = tuple(next(iter(by_layer.values())))
    rows = [len(m.tensors[TOKEN_ROWS]) for m in modules.values() if TOKEN_ROWS in m.tensors]
    if rows != [len(ids)]:
        raise CheckpointError(
            f"the adapter's configuration trains {len(ids)} token rows, but its file has "
            f"{rows[0] if rows else 'none'}; copy the adapter again"
        )
    return ids


def _our_bias(value: object) -> Literal["none", "all", "adapted"]:
    ours = {theirs: ours for ours, theirs in BIAS.items()}
    if value is not None and value not in ours:
        raise CheckpointError(
            f"the adapter's configuration sets bias={value!r}, which is not known (expected "
            f"{' or '.join(map(repr, ours))})"
        )
    return "none" if value is None else ours[str(value)]  # type: ignore[return-value]


def _warn_of_ambiguous_alphas(several: Mapping[str, Sequence[float]]) -> None:
    if not several:
        return
    name, values = next(iter(several.items()))
    logger.warning(
        "the adapter's alpha_pattern has several values for %s (%s) and %d more modules; "
        "using the first, as peft does, but peft sorts the patterns when it saves, so it "
        "may differ from the value used in training",
        name,
        ", ".join(map(str, values)),
        len(several) - 1,
    )


HONOURED = (
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("bias", "trainable_token_indices"),
)
"""Keys of peft's LoRA that are read."""
NEUTRAL: JsonObject = {
    # initialisation, irrelevant once values are loaded; schemes that also change the base are
    # rejected
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "mica"),
    "use_dora": False,
    "use_qalora": False,
    "lora_bias": False,
    "fan_in_fan_out": (True, False),  # concerns the base's layout, not the file's matrices
    "qalora_group_size": None,  # unused without use_qalora
    "megatron_core": None,
    "runtime_config": None,  # where tensors are placed while computing
    "loftq_config": ({},),
    "ensure_weight_tying": (True, False),  # tying follows from the file's tensors
    "eva_config": None,  # initialisation
}
"""Keys of peft's LoRA that are ignored at these values; None accepts any value."""

__all__ = ["LowRankConfig", "trained_tokens"]
