"""Configuration of feed-forwards: gated, without a gate, and mixtures of experts."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from easyllm.core.config import Config

Activation = Literal["relu", "gelu", "gelu_tanh", "silu", "sigmoid"]


class GLUConfig(Config):
    """Gated feed-forward: down(act(gate(x)) ⊙ up(x)) (Shazeer 2020, arXiv 2002.05202).

    It is SwiGLU with `silu`, GEGLU with `gelu`, ReGLU with `relu` and GLU with `sigmoid`.
    """

    kind: Literal["glu"] = "glu"
    intermediate_size: PositiveInt = Field(description="Width between the projections.")
    activation: Activation = Field(default="silu", description="Activation of the gate.")
    bias: bool = Field(default=False, description="Whether the projections have a bias.")


class MLPConfig(Config):
    """Feed-forward without a gate: down(act(up(x)))."""

    kind: Literal["mlp"] = "mlp"
    intermediate_size: PositiveInt = Field(description="Width between the projections.")
    activation: Activation = Field(
        default="gelu", description="Activation between the projections."
    )
    bias: bool = Field(default=True, description="Whether the projections have a bias.")


class MoEConfig(Config):
    """Mixture of experts: a router selects some experts for each token."""

    kind: Literal["moe"] = "moe"
    num_experts: PositiveInt = Field(description="Number of experts E.")
    experts_per_token: PositiveInt = Field(
        description="Number of experts k that the router selects for a token."
    )
    expert: GLUConfig = Field(description="Feed-forward of one expert.")
    routing: Literal["softmax_topk", "topk_softmax"] = Field(
        default="softmax_topk",
        description="`softmax_topk` takes the top k of the softmax over all experts (Switch, "
        "Qwen), `topk_softmax` takes the softmax over the top k logits (Mixtral).",
    )
    gate: Literal["top_k", "noisy_top_k", "random_second"] = Field(
        default="top_k",
        description="What is added in training: noise of a learned width on the logits "
        "(`noisy_top_k`: Shazeer et al. 2017, arXiv 1701.06538), or experts after the first are "
        "used with a probability of twice their weight (`random_second`, GShard: Lepikhin et al. "
        "2020, arXiv 2006.16668).",
    )
    normalise: bool = Field(
        default=True,
        description="Whether the weights of the selected experts are divided by their sum "
        "(`softmax_topk` only; those of `topk_softmax` sum to 1).",
    )
    shared: GLUConfig | None = Field(
        default=None, description="Expert that processes all tokens; null for none."
    )
    shared_gate: bool = Field(
        default=False,
        description="Whether the shared expert's output is scaled by a sigmoid gate computed from "
        "the token (Qwen2-MoE).",
    )
    capacity_factor: PositiveFloat | None = Field(
        default=None,
        description="In training an expert processes at most (T k / E) · factor tokens, and tokens "
        "over the limit skip it; null sets no limit. In inference no tokens are dropped, so that "
        "results are independent of the batch composition.",
    )
    load_balancing: NonNegativeFloat = Field(
        default=0.01,
        description="Coefficient of the Switch load-balancing loss E Σ f_i P_i (Fedus et al. 2021, "
        "arXiv 2101.03961, eq. 4).",
    )
    z_loss: NonNegativeFloat = Field(
        default=0.0,
        description="Coefficient of mean(logsumexp(logits)²) (Zoph et al. 2022, arXiv 2202.08906, "
        "eq. 5).",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> "MoEConfig":
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} is more than "
                f"num_experts={self.num_experts}; lower it"
            )
        if self.gate == "random_second" and self.experts_per_token < 2:
            raise ValueError(
                "gate=random_second leaves out experts after the first; set experts_per_token to 2"
            )
        if self.shared_gate and self.shared is None:
            raise ValueError("shared_gate needs a shared expert; set shared or remove shared_gate")
        return self


FeedForward = Annotated[GLUConfig | MLPConfig | MoEConfig, Field(discriminator="kind")]
