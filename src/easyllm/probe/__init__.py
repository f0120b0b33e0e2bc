"""Looks inside a model: what layers contribute and predict, and what is lost without them."""

from easyllm.probe.ablation import ablated, block_importance
from easyllm.probe.experts import ExpertReport, probe_experts
from easyllm.probe.lens import logit_lens
from easyllm.probe.memories import read_memories
from easyllm.probe.residual import Contribution, residual_contributions
from easyllm.probe.tracing import causal_trace

__all__ = [
    "Contribution",
    "ExpertReport",
    "ablated",
    "block_importance",
    "causal_trace",
    "logit_lens",
    "probe_experts",
    "read_memories",
    "residual_contributions",
]
