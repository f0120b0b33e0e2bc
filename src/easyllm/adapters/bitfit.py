"""BitFit: trains the biases of the base model, or any other parameters chosen by name.

(Ben Zaken et al. 2021, arXiv 2106.10199.) Many decoders of today have no biases; for those,
`parameters: ["*norm*"]` trains the norms. All other parameters are frozen.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from easyllm.adapters.adapter import AdapterConfig, EmbeddingAdapter
from easyllm.adapters.file_module import FileModule
from easyllm.adapters.peft_keys import check_keys
from easyllm.adapters.registry import register_adapter
from easyllm.adapters.targets import name_matches
from easyllm.core.errors import CheckpointError, ConfigError
from easyllm.core.json_types import JsonMapping
from easyllm.nn.config import ModelConfig


class BitFitConfig(AdapterConfig):
    """The base parameters to train."""

    kind: Literal["bitfit"] = "bitfit"
    parameters: tuple[str, ...] = Field(
        default=("*bias",),
        min_length=1,
        description="Base parameters to train, by name or pattern: `*bias`, `*norm*`, "
        "`layers.[0-3].*`.",
    )

    saves_modules: ClassVar[bool] = False

    @model_validator(mode="after")
    def _adapts_no_linear(self) -> Self:
        self.require_no_targets(
            "bitfit, which adds no module to a linear", "name what is trained in parameters, and "
        )
        return self

    def adapts(self, name: str) -> bool:  # noqa: ARG002 - interface
        """Returns False: no module is added."""
        return False

    def build_embedding(self, name: str, num_tokens: int, width: int) -> EmbeddingAdapter | None:
        """Returns None: no module is added."""

    def trains(self, parameter: str) -> bool:
        """Returns whether a pattern selects the base parameter with this full name."""
        return super().trains(parameter) or any(
            name_matches(parameter, pattern) for pattern in self.parameters
        )

    def check_base(self, names: Sequence[str]) -> None:
        """Checks that each pattern selects a parameter.

        Raises:
            ConfigError: one selects none.
        """
        for pattern in self.parameters:
            if not any(name_matches(name, pattern) for name in names):
                raise ConfigError(
                    f"adapter.parameters {pattern!r} matches no parameter of this model, which "
                    f"has {names[0]}, {names[-1]} and {len(names) - 2} more; name some of them, "
                    "such as '*norm*'"
                )

    @classmethod
    def from_peft(cls, description: JsonMapping, modules: Mapping[str, FileModule]) -> Self:
        """Returns the configuration of a file, whose tensors say what was trained.

        Raises:
            CheckpointError: an unsupported key changes the result.
        """
        check_keys(description, honoured=("parameters",), neutral={"bias": "none"})
        return cls(parameters=tuple(modules) or ("*bias",))

    def check_file(
        self,
        description: JsonMapping,
        tensors: Mapping[str, Tensor],
        model: ModelConfig,  # noqa: ARG002 - of the interface
    ) -> None:
        """Checks that a file contains all parameters that it lists.

        Raises:
            CheckpointError: one is missing.
        """
        missing = sorted(set(description.get("parameters") or ()) - set(tensors))
        if missing:
            raise CheckpointError(
                f"parameters lists {missing[0]}, which the adapter's file does not contain; "
                "copy the adapter again"
            )


register_adapter(BitFitConfig, peft_type="BITFIT")

__all__ = ["BitFitConfig"]
