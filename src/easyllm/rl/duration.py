"""Time of a policy-gradient run next to its updates: sampling, and the passes before an update."""

from easyllm.nn.config import ModelConfig
from easyllm.plan.compute import decode_flops, forward_flops
from easyllm.plan.inference import loaded_weight_bytes
from easyllm.plan.kv_cache import cache_size
from easyllm.rl.loader import RolloutLoader
from easyllm.train.objectives import Speed


def rollout_seconds(
    loader: RolloutLoader, model: ModelConfig, *, passes: int, speed: Speed
) -> float:
    """Returns the seconds of one rollout, if every answer has the maximum length.

    A decoding step takes as long as its arithmetic or as reading weights and cache, whichever is
    longer. The prompt of a group is computed once.

    Args:
        loader: the prompts, of which a rollout has the mean length, and how answers are sampled.
        model: configuration of the policy.
        passes: forward passes over the answers before the updates: of the policy, of the reference.
        speed: rates of the machine.
    """
    config, prompts = loader.rollout, loader.prompts
    mean = max(1, sum(len(prompt.token_ids) for prompt in prompts) // max(1, len(prompts)))
    longest, groups = mean + config.max_tokens, min(loader.batch_size, len(prompts))
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
