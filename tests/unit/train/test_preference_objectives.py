"""Configuration, data and samples of the objectives that compare responses."""

import pytest
from pydantic import ValidationError

from easyllm.core.errors import DataError
from easyllm.train.config import TrainConfig
from easyllm.train.data_config import (
    PreferenceDataConfig,
    RatingsDataConfig,
    UnpairedPreferenceDataConfig,
)
from easyllm.train.objectives import (
    DPO,
    KTO,
    DPOConfig,
    Reward,
    build_objective,
)
from easyllm.train.objectives.losses import LossOutput, MeanLoss
from easyllm.train.objectives.pairs import pairs_of
from preference_rows import PAIRS, random_batch, write_rows


def prepared(objective, tmp_path, tokenizer, rows, kind=PreferenceDataConfig, **options):
    path = write_rows(tmp_path / "rows.jsonl", rows)
    data = kind(train=(str(path),), **{"max_seq_len": 64} | options)
    return objective.prepare(data, [path], tokenizer)


@pytest.mark.parametrize("loss", ["hinge", "ipo"])
def test_label_smoothing_that_would_be_ignored_is_refused(loss):
    with pytest.raises(ValidationError, match=f"no effect with loss={loss}"):
        DPOConfig(loss=loss, label_smoothing=0.1)
    assert DPOConfig(loss="robust", label_smoothing=0.1).label_smoothing == 0.1


@pytest.mark.parametrize("kind", ["dpo", "kto", "orpo", "simpo", "reward"])
def test_each_objective_is_registered_for_preferences(kind):
    data = {"kind": "preferences", "train": ["rows.jsonl"]}
    config = TrainConfig.model_validate({"data": data, "objective": {"kind": kind}})
    assert build_objective(config.objective).needs_reference == (kind in ("dpo", "kto"))
    with pytest.raises(ValidationError, match="needs data of kind"):
        TrainConfig.model_validate({"data": {"train": ["x"]}, "objective": {"kind": kind}})


def test_a_pair_is_one_group_with_its_shared_prompt(tmp_path, tiny_tokenizer):
    samples, account = prepared(DPO(), tmp_path, tiny_tokenizer, PAIRS)
    assert len(samples) == account.samples == len(PAIRS)
    first, second = samples[0].parts
    assert (first.extras["rank"], second.extras["rank"]) == (0, 1)
    prompt = first.extras["prompt"]
    assert prompt == second.extras["prompt"] > 5
    assert first.token_ids[:prompt] == second.token_ids[:prompt]
    # the last token of the prompt predicts the first one of the response
    assert set(first.labels[: prompt - 1]) == {-100}
    text = tiny_tokenizer.decode([x for x in second.labels if x != -100])
    assert text.startswith("Go away!")


def test_margins_are_read_by_reward_models_and_refused_by_others(tmp_path, tiny_tokenizer):
    rows = [PAIRS[0] | {"margin": 0.75}, PAIRS[1]]
    samples, _ = prepared(Reward(), tmp_path, tiny_tokenizer, rows)
    assert [s.parts[0].extras["margin"] for s in samples] == [0.75, 0.0]
    for objective in (DPO(), KTO()):
        with pytest.raises(DataError, match=r"rows\.jsonl:1 has the key 'margin'"):
            prepared(objective, tmp_path, tiny_tokenizer, rows)


def test_rewards_are_read_at_the_end_of_turn_token(tmp_path, tiny_tokenizer):
    end = [tiny_tokenizer.backend.token_to_id("<|im_end|>")]
    rated = [{"prompt": "q", "completion": "a", "score": 1.5}]
    labelled = [{"prompt": "q", "completion": "a", "label": True}]
    found = [
        prepared(Reward(), tmp_path, tiny_tokenizer, PAIRS)[0][0].parts[0],
        prepared(Reward(), tmp_path, tiny_tokenizer, rated, RatingsDataConfig)[0][0],
        prepared(Reward(), tmp_path, tiny_tokenizer, labelled, UnpairedPreferenceDataConfig)[0][0],
    ]
    for sample in found:
        assert list(sample.token_ids[-1:]) == end
        assert sample.num_trained == 1
    assert found[1].extras == {"target": 1.5}
    assert found[2].extras == {"is_good": 1.0}


def test_kto_pairs_each_prompt_with_a_response_to_another(tmp_path, tiny_tokenizer):
    rows = [
        {"prompt": "How many dogs?", "completion": "one", "label": True},
        {"prompt": "How many dogs?", "completion": "two", "label": False},
        {"prompt": "Name a fox.", "completion": "brown", "label": True},
    ]
    samples, account = prepared(KTO(), tmp_path, tiny_tokenizer, rows, UnpairedPreferenceDataConfig)
    texts = [
        [tiny_tokenizer.decode([x for x in part.labels if x != -100]) for part in sample.parts]
        for sample in samples
    ]
    answers = [[text.removesuffix("<|im_end|>") for text in pair] for pair in texts]
    assert answers == [["one", "brown"], ["two", "brown"], ["brown", "one"]]
    assert [s.parts[0].extras["is_good"] for s in samples] == [1.0, 0.0, 1.0]
    assert account.tokens == sum(sample.num_tokens for sample in samples)
    with pytest.raises(DataError, match="all rows have the same prompt"):
        prepared(KTO(), tmp_path, tiny_tokenizer, rows[:2], UnpairedPreferenceDataConfig)


def test_kto_reads_a_pair_as_a_good_and_a_bad_response(tmp_path, tiny_tokenizer):
    samples, _ = prepared(KTO(), tmp_path, tiny_tokenizer, PAIRS)
    assert [s.parts[0].extras["is_good"] for s in samples] == [1.0, 0.0] * len(PAIRS)


def test_tied_responses_are_not_compared():
    batch = random_batch((3, 2, 4, 5))
    ranks = batch.extras["rank"]
    ranks.copy_(ranks.new_tensor([0, 1, 1]))
    pairs = pairs_of(batch)
    assert pairs.better.tolist() == [0, 0]
    assert pairs.worse.tolist() == [1, 2]
    assert pairs.weights.tolist() == [0.5, 0.5]


def test_selected_sequences_are_a_batch_of_their_own():
    batch = random_batch((3, 2, 4), (1, 1, 5))
    found = batch.select([1, 2])
    assert found.lengths == (batch.lengths[1], batch.lengths[2])
    start = batch.lengths[0]
    assert (
        found.token_ids.tolist() == batch.token_ids[start : start + len(found.token_ids)].tolist()
    )
    assert found.cu_seqlens.tolist() == [0, found.lengths[0], sum(found.lengths)]
    assert found.extras["rank"].tolist() == [1, 0]
    assert found.num_trained == 4 + 1
    assert batch.select([]).token_ids.numel() == 0


@pytest.mark.parametrize("num_terms", [None, 5])
def test_a_mean_over_some_of_the_terms_has_its_own_count(num_terms):
    import torch

    mean = MeanLoss(num_terms)
    mean.add(LossOutput(torch.tensor(1.0), 2, metrics={"a": 3.0, "b": 1.0}, counts={"a": 1}))
    mean.add(LossOutput(torch.tensor(1.0), 3, metrics={"a": 6.0, "b": 0.0}, counts={"a": 2}))
    assert mean.metrics == pytest.approx({"a": 5.0, "b": 0.4})
