"""Rows of a text and a label."""

import json

import pytest

from easyllm.core.errors import DataError
from easyllm.examples.labels import prepare_labelled_texts


@pytest.fixture
def prepare(tiny_tokenizer, tmp_path):
    def run(label, num_labels=2):
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps({"text": "good film", "label": label}) + "\n")
        samples, _ = prepare_labelled_texts(
            [path],
            tiny_tokenizer,
            text_key="text",
            label_key="label",
            num_labels=num_labels,
            max_seq_len=64,
        )
        return samples

    return run


def test_a_class_is_at_the_last_token(prepare):
    (sample,) = prepare(1)
    assert sample.labels[-1] == 1
    assert set(sample.labels[:-1]) <= {-100}


@pytest.mark.parametrize("label", ["a", "positive", "1"])
def test_a_class_name_is_refused_with_the_expected_format(prepare, label):
    with pytest.raises(
        DataError,
        match=rf"rows\.jsonl:1 has label '{label}' .* expected a class number from 0 to 2; ",
    ):
        prepare(label, num_labels=3)
    with pytest.raises(DataError, match="expected a number; replace names by numbers"):
        prepare(label, num_labels=1)


@pytest.mark.parametrize("label", [True, None, [1], 2, -1, 0.5])
def test_an_invalid_class_is_refused(prepare, label):
    with pytest.raises(DataError, match=r"rows\.jsonl:1 has label .*, expected a (number|class)"):
        prepare(label)
