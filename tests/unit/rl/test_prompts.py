"""Prompts: generated sums and rows of files, tokenized once."""

import json

import pytest

from easyllm.core.errors import ConfigError, DataError
from easyllm.rl.arithmetic import SumsConfig, sums
from easyllm.rl.prompts import ArithmeticConfig, PromptsConfig, prepare_prompts
from easyllm.rl.rewards import RewardFunctionConfig, RewardSum


def test_sums_are_right_and_those_held_out_are_others():
    training, held = sums(SumsConfig(), count=300, held_out=50, seed=1)
    assert len(training) == 300
    assert not {row["prompt"] for row in training} & {row["prompt"] for row in held}
    for row in (*training, *held):
        a, b = row["prompt"].rstrip("=").split("+")
        assert len(a) == len(b) == 2
        assert int(a) + int(b) == int(row["answer"])
    assert {row["carries"] for row in training} == {0, 1, 2}
    assert sums(SumsConfig(), count=300, held_out=50, seed=1) == (training, held)
    assert sums(SumsConfig(), count=300, held_out=50, seed=2)[0] != training


def test_a_sum_occurs_again_only_after_all_others():
    training, held = sums(SumsConfig(digits=1), count=100, held_out=11, seed=0)
    prompts = [row["prompt"] for row in training]
    assert len(set(prompts[:70])) == 70
    assert set(prompts[70:]) <= set(prompts[:70])
    assert len(held) == 11


def test_sums_with_carries_and_the_answer_of_someone_who_forgets_them():
    training, held = sums(SumsConfig(carries="some"), count=200, held_out=20, seed=0)
    for row in (*training, *held):
        a, b = row["prompt"].rstrip("=").split("+")
        digits = [str((int(x) + int(y)) % 10) for x, y in zip(a, b, strict=True)]
        assert row["without_carries"] == str(int("".join(digits))) != row["answer"]
        assert row["carries"] > 0


@pytest.mark.parametrize("form", ["en", "zh"])
def test_questions_in_both_languages(form):
    row = sums(SumsConfig(form=form), count=1, held_out=0, seed=0)[0][0]
    assert row["answer"] not in row["prompt"]
    assert ("等于" in row["prompt"]) == (form == "zh")


def test_more_sums_than_there_are_cannot_be_held_out():
    with pytest.raises(ConfigError, match="leaves none to train on"):
        sums(SumsConfig(digits=1), count=1, held_out=81, seed=0)


def prepare(tmp_path, tokenizer, rows, keys=(), **changes):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    values = {"train": [str(file)], "max_seq_len": 24} | changes
    data = PromptsConfig.model_validate(values)
    return prepare_prompts(data, [file], tokenizer, max_new_tokens=8, keys=dict(keys))


def test_rows_reach_the_rewards_and_long_prompts_are_dropped_or_cut(tmp_path, tiny_tokenizer):
    rows = [{"prompt": "hello", "level": 3}, {"prompt": "hello " * 40}]
    samples, stats = prepare(tmp_path, tiny_tokenizer, rows, template="none")
    assert [sample.row.get("level") for sample in samples] == [3]
    assert samples[0].token_ids == tuple(tiny_tokenizer.encode("hello"))
    assert (stats.samples, stats.dropped_overlong) == (1, 1)
    kept, stats = prepare(tmp_path, tiny_tokenizer, rows, template="none", overlong="cut")
    assert [sample.cut for sample in kept] == [False, True]
    assert kept[1].token_ids == tuple(tiny_tokenizer.encode("hello " * 40)[-16:])


def test_a_prompt_may_be_messages(tmp_path, tiny_tokenizer):
    rows = [{"prompt": [{"role": "user", "content": "hi"}]}, {"prompt": "hi"}]
    samples, _ = prepare(tmp_path, tiny_tokenizer, rows, max_seq_len=200)
    assert samples[0].token_ids == samples[1].token_ids  # rendered by the chat template
    assert samples[0].text == "hi"


@pytest.mark.parametrize("row", [{"question": "hi"}, {"prompt": ""}, {"prompt": 3}])
def test_a_row_without_a_prompt_is_refused(row, tmp_path, tiny_tokenizer):
    with pytest.raises(DataError, match=r"rows.jsonl:1 has .* under 'prompt'"):
        prepare(tmp_path, tiny_tokenizer, [row])


def test_a_row_without_a_key_that_a_built_in_reward_reads_is_refused(tmp_path, tiny_tokenizer):
    configs = [
        RewardFunctionConfig(function="exact", options={"key": "right"}),
        RewardFunctionConfig(function="contains", options={"text": "x"}),
        RewardFunctionConfig(function="code"),
        RewardFunctionConfig(function="digits"),
    ]
    keys = RewardSum(configs).keys
    assert keys == {"right": "exact", "tests": "code"}
    rows = [{"prompt": "hi", "right": "1", "tests": ""}, {"prompt": "hi", "chosen": "a"}]
    prepare(tmp_path, tiny_tokenizer, rows[:1], keys)
    with pytest.raises(
        DataError, match=r"rows.jsonl:2 has no key 'right', .* reward 'exact' reads"
    ):
        prepare(tmp_path, tiny_tokenizer, rows, keys)


def test_an_answer_longer_than_a_sequence_is_refused(tiny_tokenizer):
    data = ArithmeticConfig(max_seq_len=8)
    with pytest.raises(ConfigError, match="leaves no token for the prompt"):
        prepare_prompts(data, [], tiny_tokenizer, max_new_tokens=8)
