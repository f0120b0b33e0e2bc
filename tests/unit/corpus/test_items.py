"""Work items and their counts survive JSON and pickling; records of older versions are valid.

The hashes and the record are those of the version in which items and counts were plain dicts.
"""

import json
import pickle
from pathlib import Path

import pytest

from easyllm.corpus import work
from easyllm.corpus.clean import CleanConfig
from easyllm.corpus.codec import decode, encode, from_json, to_json
from easyllm.corpus.dedup.config import (
    ExactConfig,
    MinHashConfig,
    ParagraphConfig,
    SubstringConfig,
)
from easyllm.corpus.items import (
    CleanArguments,
    CleanCounts,
    CleanItem,
    DedupArguments,
    DedupCounts,
    DedupItem,
    KeyArguments,
    KeyCounts,
    KeyItem,
    TokenCounts,
    TokenizeArguments,
    TokenizeItem,
)
from easyllm.corpus.privacy import PrivacyConfig
from easyllm.corpus.sources import Part, SourceConfig, Split
from easyllm.corpus.work import RecordedWork, item_key

PARTS = (
    Part(
        path="/raw/页.jsonl",
        name="页.jsonl",
        format="jsonl",
        start=10,
        stop=90,
        first=1,
        num_bytes=80,
    ),
    Part(path="/raw/b.jsonl", name="b.jsonl", format="jsonl", num_bytes=7),
)
PART_KEYS = ("path", "name", "format", "start", "stop", "first", "num_bytes")
STAMPS = (
    ("/raw/b.jsonl", 7, 1700000000000000001),
    ("/raw/页.jsonl", 90, 1700000000000000002),
)


def clean_item(*, stem=Path("/out/work/clean/00000"), inputs=((), None), **arguments):
    chosen = {"rules": None, "privacy": None, "evaluation": None, **arguments}
    source = SourceConfig(paths=("raw/",), text_key="body")
    task = CleanArguments(split=Split(source="web", parts=PARTS), source=source, **chosen)
    return CleanItem(stem=stem, arguments=task, inputs=inputs)


def key_item(step):
    task = KeyArguments(documents=Path("/out/a.jsonl.zst"), step=step)
    return KeyItem(stem=Path("/out/work/k/00001"), arguments=task, inputs="a" * 64)


def tokenize_item(end_id):
    task = TokenizeArguments(
        documents=Path("/out/a.jsonl.zst"), tokenizer=Path("/out/tokenizer"), end_id=end_id
    )
    stem = Path("/out/work/tokens/00002")
    return TokenizeItem(stem=stem, arguments=task, inputs=("c" * 64, "d" * 64))


FULL = clean_item(
    rules=CleanConfig(
        preset="gopher",
        override={"gopher_quality": {"min_words": 20}},
        without=("language",),
        rules=[{"kind": "length", "min_words": 3}],
    ),
    privacy=PrivacyConfig(mode="count", placeholders={"email": "<E>"}),
    evaluation=Path("/out/work/evaluation"),
    inputs=(STAMPS, "e" * 64),
)
APPLY = DedupItem(
    stem=Path("/out/work/d/00001"),
    arguments=DedupArguments(
        documents=Path("/out/a.jsonl.zst"), decision=Path("/out/v.npz"), step=MinHashConfig()
    ),
    inputs="b" * 64,
)
ITEMS = [
    (FULL, "585c7cab2417775b3784663c4b21f3f3de8b7210f8951b490fb540ba437ed20b"),
    (clean_item(), "546e064e2c73ee8e7b15c4d8d41e36ad15dd82ef4bfc4e1846cea32fe41a8eee"),
    (
        key_item(ExactConfig()),
        "9d52249ba0b6206dcc616fb0ac50fd954231ce1d4a466a2facd3f7af58badeae",
    ),
    (
        key_item(ParagraphConfig(unit="line")),
        "78272e794bbb5285896fa6103cc4ec4d20d31f5263b0217c522601a5f10fa7d3",
    ),
    (
        key_item(SubstringConfig(min_words=9)),
        "15554553948c149f79a6dccfeeb2788db3f7ab63146c97354e50ccb062e111bf",
    ),
    (
        key_item(MinHashConfig(threshold=0.75)),
        "8adb2224b7517ddf56c20d66a1b257b60b4cbbfe127a7ac32ca13792094a0498",
    ),
    (APPLY, "6ef76d20d6d88c5638d7c0d9f684e939ee63824c4dbeec3867965191afe95d2c"),
    (tokenize_item(0), "0a143495b9c71ec5be080bf609bd609e8bcbc92f417c5c981ec7f89263073514"),
    (tokenize_item(None), "6097256be79c0cecabd7d2edce03c28e92bda3d6cb1aedb6c2c555b9f6f4fbd8"),
]
CLEANED = CleanCounts(
    documents=45,
    kept=43,
    rewritten=2,
    rejected=2,
    rejected_by_rule={"language.code": 1, "c4_quality.lorem_ipsum": 1},
    languages={"fr": 1},
    characters=38317,
    characters_kept=35611,
    private={"email": 1, "bank_card": 2},
    bad_rows={"not JSON": 1},
    bad_rows_shown=("页.jsonl:81: not JSON",),
)
COUNTS = [
    CLEANED,
    KeyCounts(documents=3),
    DedupCounts(kept=3, removed=1, parts=0, characters_kept=99),
    TokenCounts(documents=3, tokens=40, bytes=99),
]
RECORD = """{
  "key": "585c7cab2417775b3784663c4b21f3f3de8b7210f8951b490fb540ba437ed20b",
  "counts": {
    "documents": 45,
    "kept": 43,
    "rewritten": 2,
    "rejected": 2,
    "rejected_by_rule": {
      "language.code": 1,
      "c4_quality.lorem_ipsum": 1
    },
    "languages": {
      "fr": 1
    },
    "characters": 38317,
    "characters_kept": 35611,
    "private": {
      "email": 1,
      "bank_card": 2
    },
    "bad_rows": {
      "not JSON": 1
    },
    "bad_rows_shown": [
      "页.jsonl:81: not JSON"
    ]
  }
}
"""


@pytest.mark.parametrize(("item", "key"), ITEMS)
def test_the_key_of_an_item_is_that_of_older_versions(item, key):
    assert item_key(item) == key


def test_the_json_form_of_an_item_is_that_of_older_versions():
    assert to_json(tokenize_item(0)) == {
        "work": "tokenize",
        "stem": "/out/work/tokens/00002",
        "arguments": {
            "documents": "/out/a.jsonl.zst",
            "tokenizer": "/out/tokenizer",
            "end_id": 0,
        },
        "inputs": ["c" * 64, "d" * 64],
    }
    found = to_json(FULL)
    parts = [{name: getattr(part, name) for name in PART_KEYS} for part in PARTS]
    assert found["arguments"]["split"] == {"source": "web", "parts": parts}
    for name in ("source", "rules", "privacy"):
        config = getattr(FULL.arguments, name)
        assert found["arguments"][name] == config.model_dump(mode="json")
    assert found["inputs"] == [[list(stamp) for stamp in STAMPS], "e" * 64]


@pytest.mark.parametrize("value", [*(item for item, _ in ITEMS), *COUNTS])
def test_items_and_counts_survive_json_and_pickling(value):
    assert decode(type(value), encode(value)) == value
    assert pickle.loads(pickle.dumps(value)) == value


@pytest.mark.parametrize("kind", ["CLEAN", "DEDUP_KEYS", "DEDUP_APPLY", "TOKENIZE"])
def test_every_work_can_be_pickled(kind):
    one = getattr(work, kind)
    assert pickle.loads(pickle.dumps(one)) == one


def test_a_value_with_a_missing_or_wrong_field_is_refused():
    with pytest.raises(ValueError, match="tokens"):
        from_json(TokenCounts, {"documents": 1, "bytes": 3})
    with pytest.raises(ValueError, match="bytes"):
        from_json(TokenCounts, {"documents": 1, "tokens": 2, "bytes": "many"})
    with pytest.raises(ValueError, match="work"):
        from_json(TokenizeItem, {**to_json(tokenize_item(0)), "work": "clean"})


# --- records ---


def recorded(stem):
    """Returns the work with a stand-in that returns fixed counts, and an item with this stem."""
    calls = []

    def function(item):
        calls.append(item)
        return CLEANED

    one = RecordedWork(function=function, item_type=CleanItem, result_type=CleanCounts)
    return one, clean_item(stem=stem), calls


def test_a_record_of_an_older_version_is_recognised(tmp_path):
    one, item, calls = recorded(tmp_path / "00000")
    text = RECORD.replace(ITEMS[0][1], item_key(item))
    (tmp_path / "00000.json").write_text(text, "utf-8")
    assert one(item) == CLEANED
    assert calls == []


def test_a_record_is_written_as_in_older_versions(tmp_path):
    one, item, calls = recorded(tmp_path / "00000")
    assert one(item) == one(item) == CLEANED
    assert calls == [item]
    expected = RECORD.replace(ITEMS[0][1], item_key(item))
    assert (tmp_path / "00000.json").read_bytes() == expected.encode("utf-8")


def test_a_record_without_languages_is_recognised(tmp_path):
    one, item, _ = recorded(tmp_path / "00000")
    record = json.loads(RECORD) | {"key": item_key(item)}
    del record["counts"]["languages"]
    (tmp_path / "00000.json").write_text(json.dumps(record), "utf-8")
    counts = one.finished(item)
    assert counts is not None
    assert counts.languages == {}
    assert counts.kept == 43


@pytest.mark.parametrize(
    "record",
    [
        RECORD,  # the key is another item's
        '{"key": "KEY", "counts": {"documents": 1}}',
        '{"key": "KEY", "counts": null}',
        '{"key": "KEY"}',
        "[]",
        '{"key": "KE',
    ],
)
def test_another_or_damaged_record_means_that_the_work_is_done_again(tmp_path, record):
    one, item, calls = recorded(tmp_path / "00000")
    (tmp_path / "00000.json").write_text(record.replace("KEY", item_key(item)), "utf-8")
    assert one.finished(item) is None
    assert one(item) == CLEANED
    assert calls == [item]
