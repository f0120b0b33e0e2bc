"""A T5 is trained by span corruption, saved, resumed from its folder and served."""

import json
import random

import pytest
import torch

from easyllm.core.errors import ConfigError
from easyllm.engine import LLM, SamplingParams
from easyllm.examples.span_corruption import SpanTokens, corrupted, prepare_spans
from easyllm.models import load_model
from easyllm.plan.compute import training_flops
from easyllm.tokenizer import SpecialTokens, Tokenizer
from easyllm.train import Callback, TrainConfig, dry_run, train
from tiny_models import CORPUS
from train_twice import losses

SENTINELS = [f"<extra_id_{n}>" for n in range(12)]
WORDS = ["the", "quick", "brown", "fox", "jumps"]
TOKENS = SpanTokens(sentinels=(100, 101, 102), end=1, start=0)


@pytest.fixture
def tokenizer(tiny_tokenizer):
    backend = type(tiny_tokenizer.backend).from_str(tiny_tokenizer.backend.to_str())
    backend.add_special_tokens(SENTINELS)
    return Tokenizer(backend, SpecialTokens(eos="<|im_end|>", pad="<|endoftext|>"))


@pytest.fixture
def recipe(tmp_path, tokenizer):
    tokenizer.save(tmp_path / "tok")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in CORPUS))
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    return {
        "model": {"tokenizer": str(tmp_path / "tok"), "config": {"model_type": "t5", **sizes}},
        "objective": {"kind": "span_corruption", "copies": 2},
        "data": {"kind": "texts", "train": [str(rows)], "max_seq_len": 128},
        "optimizer": {"learning_rate": 1e-2},
        "batch_size": 8,
        "max_steps": 40,
        "epochs": 20,
        "precision": "fp32",
    }


def test_spans_are_replaced_and_listed():
    found = corrupted([11, 12, 13, 14, 15, 16], [(1, 3), (5, 6)], TOKENS)
    assert found.token_ids == (11, 100, 14, 15, 101, 1, 0, 100, 12, 13, 101, 16, 102)
    assert found.labels == (*[-100] * 6, 100, 12, 13, 101, 16, 102, 1)


def test_every_token_of_a_text_is_in_the_source_or_in_a_span(tokenizer, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=40)) for _ in range(20)]
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = {"ratio": 0.15, "mean_span": 3.0, "copies": 1, "seed": 0}
    samples, stats = prepare_spans([rows], tokenizer, text_key="text", max_seq_len=512, **options)
    tokens = SpanTokens.of(tokenizer)
    masked = total = 0
    for text, sample in zip(texts, samples, strict=True):
        split = sample.token_ids.index(tokens.start)
        source, target = sample.token_ids[: split - 1], sample.labels[split:-1]
        spans, restored = dict[int, list[int]](), list[int]()
        for token in target:
            if token in tokens.sentinels:
                spans[token] = []
            else:
                spans[list(spans)[-1]].append(token)
        for token in source:
            restored += spans.get(token, [token])
        assert restored == tokenizer.encode(text)
        masked, total = masked + sum(map(len, spans.values())), total + len(restored)
    assert 0.1 < masked / total < 0.2
    assert stats.samples == len(samples)


def test_span_corruption_trains_a_model_that_generates(recipe, tmp_path):
    train(TrainConfig.model_validate(recipe), tmp_path / "run")
    found = losses(tmp_path / "run")
    assert found[-1] < 0.8 * found[0]
    model = load_model(tmp_path / "run" / "model")
    assert model.config.family == "t5"
    llm = LLM(tmp_path / "run" / "model")
    prompt = [*llm.tokenizer.encode("The quick brown <extra_id_0> jumps"), llm.tokenizer.eos_id]
    (done,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))
    start = model.config.encoder.start_token_id
    ids = torch.tensor([*prompt, start, *done.token_ids])
    best = model.logits(ids, prefix=len(prompt))[len(prompt) : -1].argmax(-1)
    assert best.tolist() == done.token_ids


class Counting(Callback):
    """Takes the reports of the steps, and the FLOPs that the run counts for them."""

    def __init__(self):
        self.found, self.planned = [], 0

    def after_step(self, run, report):
        self.planned = run.plan.flops
        self.found.append((report.lengths, report.prefixes, run.flops(report), run.model.config))


def test_each_token_is_counted_in_the_stack_that_reads_it(recipe, tmp_path):
    counting = Counting()
    config = TrainConfig.model_validate(recipe | {"max_steps": 4})
    train(config, tmp_path / "run", callbacks=[counting])
    for lengths, prefixes, flops, model in counting.found:
        assert all(0 < read < n for n, read in zip(lengths, prefixes, strict=True))
        assert flops == training_flops(model, lengths, prefixes=prefixes).model
        assert flops < 0.8 * training_flops(model, lengths).model
    assert counting.planned == pytest.approx(sum(each[2] for each in counting.found), rel=0.35)


def test_the_same_samples_train_a_decoder(recipe, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 64}
    decoder = {"model": recipe["model"] | {"config": {"model_type": "llama", **sizes}}}
    for mask in ("causal", "prefix_before_last"):
        run = recipe | decoder | {"prompt_mask": mask, "max_steps": 30}
        train(TrainConfig.model_validate(run), tmp_path / mask)
        found = losses(tmp_path / mask)
        assert found[-1] < 0.9 * found[0]


def test_a_tokenizer_without_sentinels_and_another_start_are_refused(recipe, tmp_path, tiny_folder):
    plain = TrainConfig.model_validate(recipe | {"model": str(tiny_folder)})
    with pytest.raises(ConfigError, match="needs <extra_id_0>"):
        dry_run(plain, None)
    model = {**recipe["model"], "config": recipe["model"]["config"] | {"decoder_start_token_id": 5}}
    with pytest.raises(ConfigError, match="the decoder starts with token 5, but samples start"):
        train(TrainConfig.model_validate(recipe | {"model": model}), tmp_path / "run")
