"""Memory of a policy-gradient run next to the policy's own: rollout cache, critic, reward model."""

import torch

from easyllm.models.adapted import split_adapter
from easyllm.models.describe import describe
from easyllm.nn.config import ModelConfig
from easyllm.nn.cost import FP32
from easyllm.plan.inference import loaded_weight_bytes
from easyllm.plan.memory import estimate_training
from easyllm.plan.parameters import count_parameters
from easyllm.plan.serving import paged_bytes
from easyllm.rl.config import PolicyConfig
from easyllm.train.objectives import MemorySetup

PAGE_SIZE = 16
"""Tokens per page of the engine that samples (`rl.rollout`)."""


def policy_bytes(config: PolicyConfig, model: ModelConfig, setup: MemorySetup) -> dict[str, int]:
    """Returns the bytes of the rollout's cache and copy of the model, and of the reward model.

    The cache of the answers sampled at once stays allocated during the updates.
    """
    rollout, step = config.rollout, setup.step
    answers = step.micro_batches * max(1, step.tokens // step.longest) * rollout.minibatches
    running = min(answers, max(rollout.max_running, rollout.group_size))
    one = paged_bytes(model, step.longest, setup.itemsize, PAGE_SIZE)
    found = {"rollout_cache": running * one}
    if rollout.quantize is not None:
        found["rollout_copy"] = loaded_weight_bytes(model, setup.itemsize, rollout.quantize)
    if config.reward_model is not None:
        scorer = describe(str(split_adapter(config.reward_model.model)[0]))
        found["reward_model"] = count_parameters(scorer).total * FP32
    return found


def critic_bytes(model: ModelConfig, setup: MemorySetup) -> int:
    """Returns the bytes of a critic with a body of its own: it is trained as the policy is.

    Its activations exist at the same time as the policy's, because both losses have one backward
    pass.
    """
    dtype = torch.float32 if setup.itemsize == FP32 else torch.bfloat16
    own = estimate_training(
        model.changed(num_labels=1),
        micro_batch_tokens=setup.step.tokens,
        row_tokens=setup.step.longest,
        micro_batches=setup.step.micro_batches,
        dtype=dtype,
        adapter=setup.adapter,
        scheme=setup.scheme,
    )
    return own.weights + own.gradients + own.optimizer + own.activations


__all__ = ["critic_bytes", "policy_bytes"]
