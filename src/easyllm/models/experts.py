"""Surgery on experts: a dense model becomes a mixture, experts are merged, a mixture becomes dense.

Upcycling copies the feed-forward of each layer to every expert and adds a router (Komatsuzaki et
al. 2022, arXiv 2212.05055). With weights of a token's experts that sum to 1, the mixture computes
what the dense model did, until training makes the experts differ. Merging takes means of experts
whose weights point in similar directions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from easyllm.core.errors import CheckpointError, ConfigError
from easyllm.models.full_weights import require_full_weights
from easyllm.models.hf_config import write_config
from easyllm.nn.config import FeedForward, GLUConfig, LayerConfig, ModelConfig, MoEConfig
from easyllm.nn.decoder import Decoder
from easyllm.nn.feed_forward import build_feed_forward
from easyllm.nn.glu import GLU
from easyllm.nn.moe import MoE

ROUTER_STD = 0.02
_MIXTURES = {"llama": "mixtral", "mistral": "mixtral", "qwen3": "qwen3_moe"}
"""Families whose mixtures another family has."""
_DENSE = {"mixtral": "mistral", "qwen3_moe": "qwen3"}


@dataclass(frozen=True, slots=True)
class ExpertChange:
    """A change of the number of experts.

    Attributes:
        num_experts: number of experts of a layer; 1 makes a mixture dense.
        experts_per_token: number of experts that a token uses, for a dense model.
        noise: as for `upcycle`.
    """

    num_experts: int
    experts_per_token: int = 2
    noise: float = 0.0

    def apply(self, model: Decoder) -> Decoder:
        """Makes a mixture of a dense model, or merges the experts of a mixture, in place.

        Raises:
            ConfigError: as for `upcycle` and `merge_experts`.
        """
        if model.config.has_experts:
            if self.noise or self.experts_per_token != 2:
                raise ConfigError(
                    "the number of experts of a token and noise are those of new experts, but the "
                    "model is a mixture already, whose experts are merged; leave them out"
                )
            return merge_experts(model, self.num_experts)
        return upcycle(model, self.num_experts, self.experts_per_token, noise=self.noise)


@torch.no_grad()
def upcycle(
    model: Decoder,
    num_experts: int,
    experts_per_token: int = 2,
    *,
    noise: float = 0.0,
    seed: int = 0,
) -> Decoder:
    """Replaces the feed-forward of every layer by a mixture of copies of it, in place.

    Args:
        model: a model whose feed-forwards are GLUs.
        num_experts: number of experts of a layer.
        experts_per_token: number of experts that a token uses.
        noise: standard deviation of noise on the copies' weights, relative to that of the weights;
            0 leaves the function of the model unchanged.
        seed: seed of the routers and the noise.

    Returns:
        `model` itself, of the family whose Hugging Face format has such mixtures (`mixtral`,
        `qwen3_moe`), else of `easyllm`.

    Raises:
        ConfigError: a layer has no GLU, or the model is quantized or has an adapter.
    """
    require_full_weights(model, "making experts of its feed-forwards")
    generator = torch.Generator().manual_seed(seed)
    dense = [_glu_of(layer) for layer in model.config.layers]
    for number, (layer, glu) in enumerate(zip(model.layers, dense, strict=True)):
        block = layer.feed_forward
        assert isinstance(block, GLU), "checked above"
        config = _mixture(glu, num_experts, experts_per_token)
        moe = MoE(config, model.config.hidden_size, number)
        moe.router.reset_parameters(ROUTER_STD, generator)
        for expert in moe.experts:
            expert.load_state_dict(block.state_dict())
            for weight in expert.parameters() if noise else ():
                drawn = torch.randn(weight.shape, generator=generator)
                weight.add_(drawn.to(weight.dtype) * weight.float().std() * noise)
        _replace(layer, moe, block)
    return _finish(
        model,
        [_mixture(glu, num_experts, experts_per_token) for glu in dense],
        _MIXTURES,
    )


@torch.no_grad()
def merge_experts(model: Decoder, num_experts: int) -> Decoder:
    """Merges the experts of every mixture into fewer, or into one dense feed-forward, in place.

    Experts whose weights are most similar (cosine) are merged first, by their mean; so are their
    rows of the router. With one expert the mixture becomes dense; a shared expert is refused then.

    Args:
        model: a model with mixtures of experts.
        num_experts: number of experts to keep; 1 for dense feed-forwards.

    Raises:
        ConfigError: a layer has fewer experts, or a shared one; or the model has no experts, is
            quantized or has an adapter.
    """
    require_full_weights(model, "merging experts")
    if not model.config.has_experts:
        raise ConfigError("the model has no experts to merge; give a mixture of experts")
    blocks = list[FeedForward]()
    for number, layer in enumerate(model.layers):
        moe, config = layer.feed_forward, model.config.layers[number].feed_forward
        if not isinstance(moe, MoE):
            blocks.append(config)
            continue
        assert isinstance(config, MoEConfig)
        _check_count(config, num_experts, number)
        groups = similar_groups([_flat(expert) for expert in moe.experts], num_experts)
        merged = [_mean([moe.experts[i] for i in group]) for group in groups]
        if num_experts == 1:
            blocks.append(config.expert)
            block = build_feed_forward(config.expert, model.config.hidden_size, number)
            block.load_state_dict(merged[0])
        else:
            top = min(config.experts_per_token, num_experts)
            changes = {"num_experts": num_experts, "experts_per_token": top}
            blocks.append(MoEConfig.model_validate(config.model_dump() | changes))
            block = build_feed_forward(blocks[-1], model.config.hidden_size, number)
            state = moe.state_dict()
            rows = [state["router.weight"][list(group)].float().mean(0) for group in groups]
            assert isinstance(block, MoE), "built for a mixture"
            for expert, weights in zip(block.experts, merged, strict=True):
                expert.load_state_dict(weights)
            kept = {k: v for k, v in state.items() if k.startswith("shared")}
            kept["router.weight"] = torch.stack(rows).to(state["router.weight"].dtype)
            block.load_state_dict(kept, strict=False)
        _replace(layer, block, moe)
    return _finish(model, blocks, _DENSE if num_experts == 1 else {})


def similar_groups(vectors: Sequence[Tensor], count: int) -> list[tuple[int, ...]]:
    """Returns the indices of vectors in `count` groups, by repeatedly joining the most similar two.

    Similarity is the cosine of the groups' mean vectors.
    """
    groups: list[tuple[int, ...]] = [(number,) for number in range(len(vectors))]
    means = [vector.float() for vector in vectors]
    while len(groups) > count:
        units = nn.functional.normalize(torch.stack(means), dim=-1)
        cosines = units @ units.T
        cosines.fill_diagonal_(-2)
        first, second = sorted(divmod(int(cosines.argmax()), len(groups)))
        sizes = len(groups[first]), len(groups[second])
        means[first] = (means[first] * sizes[0] + means[second] * sizes[1]) / sum(sizes)
        groups[first] = tuple(sorted((*groups[first], *groups[second])))
        del groups[second], means[second]
    return groups


def _glu_of(layer: LayerConfig) -> GLUConfig:
    if not isinstance(layer.feed_forward, GLUConfig):
        raise ConfigError(
            f"a layer has a feed-forward of kind {layer.feed_forward.kind}, but experts are made "
            "of gated ones (glu); give a dense model with SwiGLU or another GLU"
        )
    return layer.feed_forward


def _mixture(glu: GLUConfig, num_experts: int, experts_per_token: int) -> MoEConfig:
    return MoEConfig(
        num_experts=num_experts,
        experts_per_token=experts_per_token,
        expert=glu,
        routing="topk_softmax",
    )


def _check_count(config: MoEConfig, wanted: int, number: int) -> None:
    if not 1 <= wanted < config.num_experts:
        raise ConfigError(
            f"layer {number} has {config.num_experts} experts, which cannot be merged into "
            f"{wanted}; give a number from 1 to {config.num_experts - 1}"
        )
    if wanted == 1 and config.shared is not None:
        raise ConfigError(
            f"layer {number} has a shared expert next to the others, which one dense feed-forward "
            "cannot hold; merge into at least 2 experts"
        )


def _flat(expert: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in expert.parameters()])


def _mean(experts: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Returns the state of an expert whose weights are the means of others, in fp32."""
    states = [expert.state_dict() for expert in experts]
    return {
        name: torch.stack([state[name].float() for state in states]).mean(0).to(value.dtype)
        for name, value in states[0].items()
    }


def _replace(layer: nn.Module, block: nn.Module, old: nn.Module) -> None:
    """Puts a block into a layer, with the dtype, device and mode of the old one."""
    like = next(old.parameters())
    block.to(like.device, like.dtype).requires_grad_(like.requires_grad).train(old.training)
    layer.feed_forward = block


def _finish(model: Decoder, blocks: Sequence[FeedForward], families: dict[str, str]) -> Decoder:
    """Updates the configuration, with a family that can represent the model."""
    layers = [
        layer.model_copy(update={"feed_forward": block})
        for layer, block in zip(model.config.layers, blocks, strict=True)
    ]
    names = (families.get(model.config.family, model.config.family), "easyllm")
    for family in names:
        changed = model.config.model_copy(update={"layers": tuple(layers), "family": family})
        if _is_written(changed):
            break
    model.config = changed
    return model


def _is_written(config: ModelConfig) -> bool:
    try:
        write_config(config)
    except CheckpointError:
        return False
    return True


__all__ = ["ExpertChange", "merge_experts", "similar_groups", "upcycle"]
