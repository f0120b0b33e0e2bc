"""What tests compute in several ranks at once: one launch answers many tests.

python rank_checks.py FOLDER...  for each, reads FOLDER/spec.json; rank 0 writes FOLDER/results.json
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch

from easyllm.batches.packing import pack
from easyllm.core.config import validate
from easyllm.examples.sample import Sample
from easyllm.parallel.config import ParallelConfig
from easyllm.parallel.mesh import join, leave
from easyllm.parallel.parallel import parallelize
from easyllm.parallel.tensor import shard_tensors
from easyllm.train import TrainConfig
from easyllm.train.objectives import LanguageModel
from easyllm.train.optim import MasterOptimizer
from easyllm.train.optim_config import AdamWConfig
from easyllm.verify.parallel_rank import compare, train_steps
from forked_ranks import fork_ranks
from tiny_models import build_tiny


def batch():
    """Three sequences of 27 tokens in total, an odd number."""
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, 320, (n,), generator=generator).tolist() for n in (11, 4, 12)]
    return pack([Sample.from_mask(tuple(row)) for row in rows])


def equalities(spec):
    """Compares every plan of every recipe with one process."""
    found = {}
    for name, recipe in spec["recipes"].items():
        config = validate(TrainConfig, recipe["values"], source=name)
        one = train_steps(config, None, 0) if join(ParallelConfig()).is_first else None
        for plan in recipe["plans"]:
            label = plan.pop("label")
            fault = plan.pop("fault", None)
            parallel = ParallelConfig(**plan)
            divided = config.model_copy(update={"parallel": parallel})
            other = train_steps(divided, join(parallel), 0, fault)
            if one is not None:
                found[f"{name}/{label}"] = compare(label, one, other)
    return found


def collectives(spec):
    """Counts the collectives of a forward and backward pass of 2 layers under tensor parallelism.

    The counts are those of the layers alone: the difference of models of 4 and 2 layers, halved.
    """
    degree = spec["tensor"]
    found = {}
    for sequence in (False, True):
        counts = []
        for layers in (2, 4):
            mesh = join(ParallelConfig(tensor=degree, sequence=sequence))
            model = build_tiny(num_hidden_layers=layers).requires_grad_(True)
            shard_tensors(model, mesh.tensor, sequence=sequence)
            loss = LanguageModel().loss(model, batch())
            loss.sum.backward()
            counts.append(dict(mesh.tensor.traffic.calls))
        found["sequence" if sequence else "plain"] = {
            key: (counts[1].get(key, 0) - counts[0].get(key, 0)) / 2 for key in counts[1]
        }
    return found


def persistent_bytes(_spec):
    """Returns bytes of weights, gradients and optimizer state on this rank, by stage."""
    found = {}
    for layout in ("ddp", "zero1", "zero2", "zero3"):
        mesh = join(ParallelConfig(layout=layout))
        model = build_tiny().requires_grad_(True)
        psi = sum(p.numel() for p in model.parameters())
        parallel = parallelize(model, mesh, ParallelConfig(layout=layout))
        optimizer = MasterOptimizer(
            dict(parallel.sharding.parameters), AdamWConfig(), local=parallel.local
        )
        parallel.begin_micro_batch(last=True)
        LanguageModel().loss(model, batch()).sum.backward()
        parallel.end_micro_batch()
        parallel.reduce(optimizer.set_gradient)
        state = sum(t.numel() for name, t in optimizer.tensors().items() if "exp_avg" in name)
        gradients = sum(g.numel() for g in optimizer.gradients().values())
        weights = psi if layout != "zero3" else sum(p.numel() for p in parallel.local.values())
        traffic = mesh.data.traffic.sent_elements(mesh.data.size) / psi
        found[layout] = {
            "parameters": psi,
            "weights": weights,
            "gradients": gradients,
            "state": state,
            "sent_before_update": traffic,
        }
        optimizer.step(1.0)
        parallel.refresh()
        found[layout]["sent"] = mesh.data.traffic.sent_elements(mesh.data.size) / psi
    return found


def run_rank(folder, spec):
    mesh = join(ParallelConfig())
    found = {part: globals()[part](spec) for part in spec["parts"]}
    if mesh.is_first:
        (folder / "results.json").write_text(json.dumps(found))
    leave()


if __name__ == "__main__":
    for name in sys.argv[1:]:
        spec = json.loads((Path(name) / "spec.json").read_text())
        if any(fork_ranks(spec["ranks"], partial(run_rank, Path(name), spec))):
            sys.exit(1)
