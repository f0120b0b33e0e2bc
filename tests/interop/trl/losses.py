"""The same random model and token ids in TRL's trainers and in the objectives here."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from figures import Figures
from random_llama import random_llama
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

import easyllm.train.objectives as ours
from easyllm.batches.packing import Batch, pack
from easyllm.examples.prepare import Encoded
from easyllm.examples.rankings import EncodedRanking
from easyllm.examples.sample import Sample
from easyllm.models import hf_module_name, load_tokenizer, save_model
from easyllm.nn import Decoder
from easyllm.train.loop import accumulate
from easyllm.train.objectives.kto import with_mismatched
from easyllm.train.objectives.pairs import group_of

SHAPES = ((6, 5, 9), (3, 2, 4), (9, 7, 1))
"""Lengths of prompt, chosen and rejected response."""
BETA, EPS, BOUND = 0.3, 0.2, 1e-5
SIZES = {"vocab_size": 49152, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
HEADS = {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64}
PAIR = {"prompt": ["a", "b"], "chosen": ["c", "d"], "rejected": ["e", "f"]}
Row = tuple[list[int], list[int]]
"""Token ids of a prompt and of a response."""


class Peers:
    """A trained model and a reference, here and as Hugging Face folders."""

    def __init__(self, work: Path) -> None:
        tokenizer = load_tokenizer("smollm2")
        self.work = work
        for name, std in (("policy", 0.1), ("reference", 0.12)):
            model = random_llama(std=std, **SIZES, **HEADS)
            save_model(model, work / name, tokenizer=tokenizer)
        self.policy = random_llama(std=0.1, **SIZES, **HEADS).requires_grad_(True)
        self.reference = random_llama(std=0.12, **SIZES, **HEADS)
        self.tokenizer = AutoTokenizer.from_pretrained(work / "policy")

    def causal(self, name: str) -> nn.Module:
        model = AutoModelForCausalLM.from_pretrained(self.work / name, dtype=torch.float32)
        return model.eval()

    def options(self) -> dict[str, Any]:
        """What every TRL configuration needs here."""
        return {
            "output_dir": str(self.work / "out"),
            "report_to": [],
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
        }


def compare(figures: Figures, work: Path) -> None:
    """Prints the differences of losses and gradients."""
    peers = Peers(work)
    for loss in ("sigmoid", "hinge", "ipo", "robust"):
        figures.run(f"DPO, {loss}", partial(dpo, figures, peers, loss))
    figures.run("KTO", partial(kto, figures, peers))
    figures.run("ORPO", partial(orpo, figures, peers))
    figures.run("SimPO", partial(simpo, figures, peers))
    for center in (0.0, 0.01):
        figures.run(f"reward, center {center}", partial(reward, figures, peers, center))


def dpo(figures: Figures, peers: Peers, loss: str) -> None:
    smoothing = EPS if loss == "robust" else 0.0
    config = DPOConfig(**peers.options(), beta=BETA, loss_type=[loss], label_smoothing=smoothing)
    trainer = DPOTrainer(
        model=peers.causal("policy"),
        ref_model=peers.causal("reference"),
        args=config,
        train_dataset=Dataset.from_dict(PAIR),
        processing_class=peers.tokenizer,
    )
    pairs = random_pairs()
    rows = [pair[0] for pair in pairs] + [pair[1] for pair in pairs]
    their_loss = trainer._compute_loss(trainer.model, padded(rows), False)
    mine = ours.DPOConfig(beta=BETA, loss=loss, label_smoothing=smoothing)
    objective = ours.DPO(mine)
    objective.reference = ours.Reference(peers.reference, without_adapter=False)
    assert_equal(figures, f"DPO, {loss}", peers, objective, group_batch(pairs), trainer, their_loss)


def kto(figures: Figures, peers: Peers) -> None:
    config = KTOConfig(
        **peers.options(),
        beta=BETA,
        desirable_weight=1.5,
        undesirable_weight=0.7,
        per_device_train_batch_size=3,
    )
    data = {"prompt": ["a", "b", "c"], "completion": ["d", "e", "f"], "label": [True, False, True]}
    rows = [pair[0] for pair in random_pairs()]
    labels = [True, False, True]
    shifted = [(rows[i][0], rows[(i + 1) % 3][1]) for i in range(3)]
    batch = padded(rows) | {"label": torch.tensor(labels)}
    batch |= {f"KL_{name}": tensor for name, tensor in padded(shifted).items()}
    objective = ours.KTO(ours.KTOConfig(beta=BETA, desirable_weight=1.5, undesirable_weight=0.7))
    # the divergence is clamped to 0 in one of the two directions
    for swapped in (False, True):
        policy, reference = ("reference", "policy") if swapped else ("policy", "reference")
        trainer = KTOTrainer(
            model=peers.causal(policy),
            ref_model=peers.causal(reference),
            args=config,
            train_dataset=Dataset.from_dict(data),
            processing_class=peers.tokenizer,
        )
        models = (peers.reference, peers.policy)
        trained, frozen = models if swapped else models[::-1]
        objective.reference = ours.Reference(frozen, without_adapter=False)
        encoded = [(encode(row), label) for row, label in zip(rows, labels, strict=True)]
        mine = pack(with_mismatched(encoded, max_seq_len=64))
        their_loss = trainer._compute_loss(trainer.model, batch, False)
        name = f"KTO{', swapped' if swapped else ''}"
        assert_equal(figures, name, peers, objective, mine, trainer, their_loss, trained)
        figures.at_most(f"{name}, KL", abs(objective.kl - last(trainer, "kl")), 1e-4)


def orpo(figures: Figures, peers: Peers) -> None:
    trainer = ORPOTrainer(
        model=peers.causal("policy"),
        args=ORPOConfig(**peers.options(), beta=BETA),
        train_dataset=Dataset.from_dict(PAIR),
        processing_class=peers.tokenizer,
    )
    # one pair, and a prompt of one token: TRL's SFT term is the mean over all tokens of the batch
    pairs = random_pairs(((1, 5, 9),))
    their_loss, _ = trainer.get_batch_loss_metrics(trainer.model, by_side(pairs))
    objective = ours.ORPO(ours.ORPOConfig(beta=BETA))
    assert_equal(figures, "ORPO", peers, objective, group_batch(pairs), trainer, their_loss)


def simpo(figures: Figures, peers: Peers) -> None:
    config = CPOConfig(
        **peers.options(), beta=2.5, loss_type="simpo", simpo_gamma=0.75, cpo_alpha=0.0
    )
    trainer = CPOTrainer(
        model=peers.causal("policy"),
        args=config,
        train_dataset=Dataset.from_dict(PAIR),
        processing_class=peers.tokenizer,
    )
    pairs = random_pairs()
    their_loss, _ = trainer.get_batch_loss_metrics(trainer.model, by_side(pairs))
    objective = ours.SimPO(ours.SimPOConfig(beta=2.5, gamma=0.75))
    assert_equal(figures, "SimPO", peers, objective, group_batch(pairs), trainer, their_loss)


def reward(figures: Figures, peers: Peers, center: float) -> None:
    objective = ours.Reward(ours.RewardConfig(center=center))
    model = objective.prepare_model(random_llama(std=0.1, **SIZES, **HEADS), seed=0)
    folder = peers.work / f"reward-{center}"
    save_model(model, folder, tokenizer=load_tokenizer("smollm2"))
    scored = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    scored.config.pad_token_id = 0  # no random id is 0
    trainer = RewardTrainer(
        model=scored.eval(),
        args=RewardConfig(**peers.options(), center_rewards_coefficient=center or None),
        train_dataset=Dataset.from_dict(PAIR),
        processing_class=peers.tokenizer,
    )
    trainer.model.config.pad_token_id = 0
    pairs, margins = random_pairs(), (0.0, 0.5, 1.25)
    rows = [pair[0] for pair in pairs] + [pair[1] for pair in pairs]
    inputs = {k: v for k, v in padded(rows).items() if k != "completion_mask"}
    inputs["margin"] = torch.tensor(margins)
    their_loss = trainer.compute_loss(trainer.model, inputs)
    batch = group_batch(pairs, margins, whole=True)
    name = f"reward, center {center}"
    trained = model.requires_grad_(True)
    assert_equal(figures, name, peers, objective, batch, trainer, their_loss, trained)


def assert_equal(
    figures: Figures,
    name: str,
    peers: Peers,
    objective: ours.Objective,
    batch: Batch,
    trainer: Any,
    their_loss: Tensor,
    trained: Decoder | None = None,
) -> None:
    """Records the difference of the losses, and the largest one of all gradients."""
    model = trained or peers.policy
    model.requires_grad_(True).zero_grad(set_to_none=True)
    trainer.model.zero_grad(set_to_none=True)
    their_loss.backward()
    loss, _ = accumulate(model, objective, [batch])
    figures.at_most(name, abs(loss - float(their_loss.detach())), BOUND)
    theirs = dict(trainer.model.named_parameters())
    hf_name: Callable[[str], str] = hf_module_name(model)
    largest, gradient = 0.0, 0.0
    for parameter, value in model.named_parameters():
        module, _, leaf = parameter.rpartition(".")
        expected = theirs[f"{hf_name(module)}.{leaf}"].grad
        largest = max(largest, float((value.grad - expected).abs().max()))
        gradient = max(gradient, float(expected.abs().max()))
    figures.true(f"{name}, gradient is not zero", gradient > 1e-3, f"at most {gradient:.2g}")
    figures.at_most(f"{name}, gradients", largest / max(1.0, gradient), BOUND)


def random_pairs(shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[tuple[Row, Row]]:
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(100, 49000, (length,), generator=generator).tolist()

    found = []
    for prompt, *responses in shapes:
        start = ids(prompt)
        chosen, rejected = ((start, ids(length)) for length in responses)
        found.append((chosen, rejected))
    return found


def encode(row: Row) -> Encoded:
    prompt, response = row
    return Encoded("row", [*prompt, *response], [False] * len(prompt) + [True] * len(response))


def group_batch(
    pairs: list[tuple[Row, Row]], margins: Sequence[float] = (), *, whole: bool = False
) -> Batch:
    """Returns the pairs as a packed batch.

    Args:
        whole: make every token an input, as for reward models.
    """
    groups = []
    for number, pair in enumerate(pairs):
        encoded = tuple(encode(row) for row in pair)
        margin = margins[number] if margins else None
        ranking = EncodedRanking(encoded, (0, 1), len(pair[0][0]), margin)
        samples = [
            Sample(tuple(e.token_ids), (*[-100] * (len(e.token_ids) - 1), 0))
            if whole
            else e.sample()
            for e in encoded
        ]
        groups.append(group_of(ranking, samples))
    return pack(groups)


def padded(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Returns right-padded ids and masks of prompts with responses."""
    length = max(len(prompt) + len(response) for prompt, response in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    attention, completion = torch.zeros_like(ids), torch.zeros_like(ids)
    for number, (prompt, response) in enumerate(rows):
        size = len(prompt) + len(response)
        ids[number, :size] = torch.tensor([*prompt, *response])
        attention[number, :size] = 1
        completion[number, len(prompt) : size] = 1
    return {"input_ids": ids, "attention_mask": attention, "completion_mask": completion}


def by_side(pairs: list[tuple[Row, Row]]) -> dict[str, Tensor]:
    """Returns a batch of TRL's older trainers, with labels for each side."""
    found = {}
    for number, side in enumerate(("chosen", "rejected")):
        batch = padded([pair[number] for pair in pairs])
        found[f"{side}_input_ids"] = batch["input_ids"]
        found[f"{side}_attention_mask"] = batch["attention_mask"]
        found[f"{side}_labels"] = batch["input_ids"].masked_fill(
            batch["completion_mask"] == 0, -100
        )
    return found


def last(trainer: Any, name: str) -> float:
    """Returns the last value of a metric."""
    for metrics in trainer._metrics.values():
        if metrics.get(name):
            return float(metrics[name][-1])
    return float("nan")
