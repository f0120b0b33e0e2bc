"""Runs a function of this module in two processes that are the ranks of one training.

    results = run_ranks("zero", {"steps": 4, ...})

python -m easyllm.lab.two_ranks FOLDER      one rank, started by `run_ranks`
"""

import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from easyllm.batches.packing import pack
from easyllm.core.errors import EasyllmError
from easyllm.core.json_types import JsonMapping, JsonObject
from easyllm.examples.sample import Sample
from easyllm.lab.small_models import new_model, small_config, token_chains
from easyllm.nn.decoder import Decoder
from easyllm.parallel.config import ParallelConfig
from easyllm.parallel.failures import record_error
from easyllm.parallel.launch import launch
from easyllm.parallel.mesh import join, leave
from easyllm.parallel.parallel import Parallel, parallelize
from easyllm.parallel.tensor import shard_tensors
from easyllm.train.objectives.language_model import LanguageModel
from easyllm.train.optim import MasterOptimizer
from easyllm.train.optim_config import AdamWConfig

RANKS = 2
LAYOUTS = ("ddp", "zero1", "zero2", "zero3", "fsdp")
BATCH = 8
VOCABULARY = 32
FACTORS = {"c10d::allreduce_": 2, "c10d::_allgather_base_": 1, "c10d::_reduce_scatter_base_": 1}
"""What a collective sends, in elements of its larger tensor times (W - 1) / W."""


def run_ranks(task: str, values: JsonMapping) -> JsonObject:
    """Returns what rank 0 of two processes computed.

    Args:
        task: a key of `TASKS`.
        values: the arguments of the task.

    Raises:
        EasyllmError: a process failed; the message is its own.
    """
    with tempfile.TemporaryDirectory(prefix="easyllm-lab-") as name:
        folder = Path(name)
        (folder / "task.json").write_text(json.dumps({"task": task, **values}), encoding="utf-8")
        command = [sys.executable, "-m", "easyllm.lab.two_ranks", name]
        code, failures = launch(command, RANKS, {"OMP_NUM_THREADS": "1"})
        if code:
            raise EasyllmError(failures[0].message())
        found: JsonObject = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        return found


def train_layouts(values: JsonMapping) -> JsonObject:
    """Trains a small model in one process and under each data-parallel layout.

    Returns:
        For `one` process and each layout the losses of all steps; for the layouts also what a rank
        holds and sends, in elements per parameter, and the largest difference of a weight.
    """
    whole, reference = _train(values, None, "")
    found: JsonObject = {"one": whole}
    for layout in LAYOUTS:
        config = ParallelConfig.model_validate({"layout": layout})
        mesh = join(config)
        model = _model(values)
        parallel = parallelize(model, mesh, config)
        losses, weights = _train(values, (model, parallel), layout)
        apart = max(float((weights[n] - w).abs().max()) for n, w in reference.items())
        found[layout] = losses | {"apart": apart}
    return found


class _Collectives(TorchDispatchMode):
    """Counts the elements that this rank sends in collectives, those of PyTorch's FSDP2 too.

    With ring algorithms a reduce-scatter or all-gather of n elements sends n (W - 1) / W, an
    all-reduce twice as many.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sent = 0.0

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        factor = FACTORS.get(func.name())
        if factor:
            flat = args[0] if isinstance(args[0], list) else args[:2]
            largest = max(each.numel() for each in flat if isinstance(each, torch.Tensor))
            self.sent += factor * largest * (RANKS - 1) / RANKS
        return func(*args, **(kwargs or {}))


def _model(values: JsonMapping) -> Decoder:
    config = small_config(vocab_size=VOCABULARY, width=values["width"], layers=values["layers"])
    return new_model(config, values["seed"])


def _samples(values: JsonMapping) -> list[Sample]:
    """Returns texts of different lengths, `BATCH` for each step."""
    generator = torch.Generator().manual_seed(values["seed"])
    chains = token_chains(generator, BATCH * values["steps"], vocab_size=VOCABULARY)
    ends = torch.randint(4, 33, (len(chains),), generator=generator).tolist()
    return [Sample.from_mask(s.token_ids[:n]) for s, n in zip(chains, ends, strict=True)]


def _train(
    values: JsonMapping, divided: tuple[Decoder, Parallel] | None, layout: str
) -> tuple[JsonObject, dict[str, torch.Tensor]]:
    """Returns losses (and what this rank holds), and the full weights at the end."""
    model, parallel = divided or (_model(values), None)
    count = sum(p.numel() for p in model.parameters())
    trained = dict(model.named_parameters() if parallel is None else parallel.sharding.parameters)
    optimizer = MasterOptimizer(
        trained,
        AdamWConfig(learning_rate=1e-3),
        local=None if parallel is None else parallel.local,
    )
    samples, losses, held = _samples(values), list[float](), dict[str, float]()
    collectives = _Collectives()
    for step in range(values["steps"]):
        rows = samples[BATCH * step : BATCH * (step + 1)]
        with collectives:
            losses.append(_step(model, parallel, optimizer, rows, held))
        if parallel is not None and layout not in ("zero3", "fsdp"):
            held["weights"] = float(count)  # the parameters that this rank updates are not all
    held = {name: value / count for name, value in held.items()}
    held["sent"] = collectives.sent / count / values["steps"]
    moments = sum(t.numel() for n, t in optimizer.tensors().items() if n.endswith("exp_avg"))
    held["moments"] = moments / count
    masters = {name: part.detach().clone() for name, part in optimizer.masters.items()}
    if parallel is not None:
        masters = {name: parallel.full(name, part) for name, part in masters.items()}
    return {"losses": losses, **held}, masters


def _step(
    model: Decoder,
    parallel: Parallel | None,
    optimizer: MasterOptimizer,
    rows: list[Sample],
    held: dict[str, float],
) -> float:
    """Takes a step on this rank's rows, notes what it holds, and returns the loss of all rows."""
    if parallel is not None:
        rows = rows[parallel.mesh.data.rank :: RANKS]
        parallel.begin_micro_batch(last=True)
    out = LanguageModel().loss(model, pack(rows))
    out.sum.backward()
    sums = torch.tensor([[float(out.sum.detach()), out.num_tokens]], dtype=torch.float64)
    if parallel is not None:
        parallel.end_micro_batch()
        parallel.reduce(optimizer.set_gradient)
        sums = torch.tensor(parallel.gather(sums[0].tolist()), dtype=torch.float64)
        held["gradients"] = sum(g.numel() for g in optimizer.gradients().values())
        held["weights"] = sum(p.numel() for p in parallel.local.values())
    loss, tokens = sums.sum(0).tolist()
    optimizer.scale_gradients(1 / tokens)
    optimizer.step(1.0)
    if parallel is not None:
        parallel.refresh()
    return float(loss / tokens)


def divide_layers(values: JsonMapping) -> JsonObject:
    """Compares a forward and backward pass under tensor parallelism with one process.

    Returns:
        Losses, gradient norms, collectives of a layer and of its sequence-parallel form, and the
        elements that the cross-entropy exchanges.
    """
    batch = pack(_samples({**values, "steps": 1}))
    whole = _model(values)
    one = LanguageModel().loss(whole, batch)
    one.sum.backward()
    found: JsonObject = {"tokens": len(batch.token_ids), "one": float(one.sum.detach())}
    for sequence in (False, True):
        calls = []
        for layers in (2, 4):
            mesh = join(ParallelConfig(tensor=RANKS, sequence=sequence))
            model = _model({**values, "layers": layers})
            shard_tensors(model, mesh.tensor, sequence=sequence)
            out = LanguageModel().loss(model, batch)
            out.sum.backward()
            calls.append(dict(mesh.tensor.traffic.calls))
            if not sequence and layers == values["layers"]:
                found["two"] = float(out.sum.detach())
                found["gradient_apart"] = _norm_gradient_apart(whole, model)
                found["cross_entropy"] = _exchanged(model, values["width"])
        found["sequence" if sequence else "plain"] = {
            name: (calls[1].get(name, 0) - calls[0].get(name, 0)) / 2 for name in calls[1]
        }
    return found


def _norm_gradient_apart(whole: Decoder, divided: Decoder) -> float:
    """Returns the largest difference of the gradients of norms, which every rank holds in full."""
    mine = {n: p.grad for n, p in divided.named_parameters() if "norm" in n}
    theirs = {n: p.grad for n, p in whole.named_parameters() if "norm" in n}
    gaps = []
    for name, gradient in mine.items():
        other = theirs[name]
        assert gradient is not None, "trained"
        assert other is not None, "trained"
        gaps.append(float((gradient - other).abs().max()))
    return max(gaps)


def _exchanged(model: Decoder, width: int) -> JsonObject:
    """Returns the elements that enter collectives for the cross-entropy of 16 tokens."""
    shard = model.vocabulary
    assert shard is not None, "the vocabulary is divided"
    before = dict(shard.group.traffic.elements)
    _, weight = model.loss_factors(torch.zeros(16, width))
    with torch.no_grad():
        shard.cross_entropy(torch.ones(16, width), weight, torch.arange(16))
    after = shard.group.traffic.elements
    return {"tokens": 16, "elements": sum(after.values()) - sum(before.values())}


TASKS: dict[str, Callable[[JsonMapping], JsonObject]] = {
    "zero": train_layouts,
    "tensor": divide_layers,
}


def main(folder: Path) -> None:
    """Runs one rank."""
    torch.set_num_threads(1)
    values = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    mesh = join(ParallelConfig())
    found = TASKS[values.pop("task")](values)
    if mesh.is_first:
        (folder / "results.json").write_text(json.dumps(found), encoding="utf-8")
    leave()


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except Exception as error:
        record_error(error)
        raise
