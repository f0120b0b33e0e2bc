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
    routing: Literal["softmax_topk", "topk_softmax", "sigmoid_topk"] = Field(
        default="softmax_topk",
        description="`softmax_topk` takes the top k of the softmax over all experts (Switch, "
        "Qwen), `topk_softmax` takes the softmax over the top k logits (Mixtral), `sigmoid_topk` "
        "takes the top k of the logits' sigmoids (DeepSeek-V3: arXiv 2412.19437, eqs. 12 to 15).",
    )
    selection_bias: bool = Field(
        default=False,
        description="Whether a bias for each expert is added to its score for the selection, but "
        "not for its weight (`sigmoid_topk` only; DeepSeek-V3: eq. 16). Training leaves it "
        "unchanged.",
    )
    num_groups: PositiveInt = Field(
        default=1, description="Number of equal groups of experts; must divide num_experts."
    )
    groups_per_token: PositiveInt = Field(
        default=1,
        description="Number of groups with the best scores to whose experts a token is limited "
        "(DeepSeek-V2: arXiv 2405.04434, section 2.2.2).",
    )
    group_score: Literal["best", "best_two"] = Field(
        default="best",
        description="Score of a group: that of its best expert (DeepSeek-V2), or the sum of its "
        "best two (DeepSeek-V3).",
    )
    scale: PositiveFloat = Field(
        default=1.0, description="Factor on the weights of the selected experts."
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
        "(those of `topk_softmax` always sum to 1).",
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
        if self.selection_bias and self.routing != "sigmoid_topk":
            raise ValueError(
                f"selection_bias needs routing sigmoid_topk, got {self.routing}; change one of them"
            )
        return self

    @model_validator(mode="after")
    def _groups_fit(self) -> "MoEConfig":
        experts, groups, used = self.num_experts, self.num_groups, self.groups_per_token
        if groups == used == 1:
            return self
        if experts % groups or used > groups:
            raise ValueError(
                f"{used} of {groups} groups of {experts} experts cannot be selected; num_groups "
                "must divide num_experts, and groups_per_token must be at most num_groups"
            )
        size = experts // groups
        if self.experts_per_token > used * size:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} is more than the {used * size} "
                f"experts of {used} groups; raise groups_per_token"
            )
        if self.group_score == "best_two" and size < 2:
            raise ValueError("group_score=best_two needs groups of at least 2 experts")
        if self.routing == "topk_softmax":
            raise ValueError("groups need routing softmax_topk or sigmoid_topk, got topk_softmax")
        return self


FeedForward = Annotated[GLUConfig | MLPConfig | MoEConfig, Field(discriminator="kind")]
