"""Time of a policy-gradient run next to its updates: sampling, and the passes before an update."""

from collections.abc import Sequence

from easyllm.nn.config import ModelConfig
from easyllm.plan.compute import decode_flops, forward_flops
from easyllm.plan.inference import loaded_weight_bytes
from easyllm.plan.kv_cache import cache_size
from easyllm.rl.prompts import PromptSample
from easyllm.rl.rollout import RolloutConfig
from easyllm.train.objectives import Speed


def rollout_seconds(
    config: RolloutConfig,
    model: ModelConfig,
    prompts: Sequence[PromptSample],
    *,
    batch_size: int,
    passes: int,
    speed: Speed,
) -> float:
    """Returns the seconds of one rollout, if every answer has the maximum length.

    A decoding step takes as long as its arithmetic or as reading weights and cache, whichever is
    longer. The prompt of a group is computed once.

    Args:
        config: how answers are sampled.
        model: configuration of the policy.
        prompts: the prompts of an epoch; a rollout has their mean length.
        batch_size: prompts per rollout.
        passes: forward passes over the answers before the updates: of the policy, of the reference.
        speed: rates of the machine.
    """
    mean = max(1, sum(len(prompt.token_ids) for prompt in prompts) // max(1, len(prompts)))
    longest, groups = mean + config.max_tokens, min(batch_size, len(prompts))
    answers = groups * config.group_size
    running = min(answers, max(config.max_running, config.group_size))
    read = loaded_weight_bytes(model, speed.itemsize, config.quantize, read=True)
    cache = cache_size(model, context=longest, sequences=running, itemsize=speed.itemsize).total
    step = max(
        running * decode_flops(model, longest).total / speed.flops_per_s,
        (read + cache) / speed.read_bytes_per_s,
    )
    decoding = -(-answers // running) * config.max_tokens * step
    flops = groups * forward_flops(model, [mean], head_rows=1).total
    flops += passes * answers * forward_flops(model, [longest], head_rows=config.max_tokens).total
    return decoding + flops / speed.flops_per_s


__all__ = ["rollout_seconds"]
