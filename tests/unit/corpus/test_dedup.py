"""Deduplication against naive references: exact Jaccard, substring search, banding formula."""

import ast
import json
import os
import random
import subprocess
import sys
import sysconfig
from collections import Counter
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from easyllm.core.config import validate
from easyllm.core.errors import ConfigError, DataError
from easyllm.corpus.dedup import minhash
from easyllm.corpus.dedup.clusters import Clusters
from easyllm.corpus.dedup.config import (
    DEDUP_PRESETS,
    DedupConfig,
    ExactConfig,
    MinHashConfig,
    ParagraphConfig,
    SubstringConfig,
    collision_probability,
    dedup_preset,
)
from easyllm.corpus.dedup.deduplicate import deduplicate
from easyllm.corpus.dedup.exact import exact_duplicates, exact_keys, paragraph_keys, repeated
from easyllm.corpus.dedup.minhash import Signatures, jaccard, near_duplicates, signatures
from easyllm.corpus.dedup.ragged import Ragged
from easyllm.corpus.dedup.substring import repeated_words, without_words, word_hashes
from easyllm.corpus.dedup.words import Windows, word_spans, words
from easyllm.corpus.document import Document

DEFAULT = MinHashConfig()
FINEWEB = DEDUP_PRESETS["fineweb"].steps[0]
MODULES = (
    *("argparse", "ast", "calendar", "configparser", "copy", "decimal", "difflib", "doctest"),
    *("enum", "fractions", "ftplib", "functools", "heapq", "imaplib", "inspect", "ipaddress"),
    *("locale", "mailbox", "optparse", "pathlib", "pdb", "pickle", "pickletools", "platform"),
    *("plistlib", "random", "shutil", "smtplib", "socketserver", "statistics", "string"),
    *("subprocess", "tarfile", "textwrap", "threading", "traceback", "turtle", "typing"),
)
CHINESE = (
    "大语言模型的训练从收集网页开始，先去掉重复的文档，再按质量和语言筛选，最后混合成训练语料。"
    "重复的文字会让模型背下原文，也会让评测的分数失真，因此去重是数据工程里最重要的一步。"
)


def library_prose():
    """Returns distinct chunks of 100 words from the docstrings of the standard library."""
    found = []
    for module in MODULES:
        path = Path(sysconfig.get_path("stdlib")) / f"{module}.py"
        if not path.is_file():  # some are packages in later versions of Python
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                found += (ast.get_docstring(node) or "").split()
    chunks = [" ".join(found[i : i + 100]) for i in range(0, len(found) - 100, 100)]
    return list(dict.fromkeys(chunks))


def edited(text, num_edits, random_):
    """Replaces, drops, doubles or swaps `num_edits` words."""
    found = text.split()
    for _ in range(num_edits):
        i = random_.randrange(len(found) - 1)
        match random_.randrange(4):
            case 0:
                found[i] = random_.choice(["zebra", "quartz", "12", "Über", "of"])
            case 1:
                del found[i]
            case 2:
                found.insert(i, found[i])
            case 3:
                found[i], found[i + 1] = found[i + 1], found[i]
    return " ".join(found)


@pytest.fixture(scope="module")
def corpus():
    """Shuffled prose, near-duplicates of some of it at all similarities, and reordered parts."""
    random_ = random.Random(0)
    base = library_prose()[:400]
    assert len(base) == 400
    texts = list(base)
    for text in base[:160]:
        texts += [edited(text, random_.randrange(0, 25), random_) for _ in range(3)]
    for text in base[160:220]:
        found = text.split()
        cut = random_.randrange(20, 80)
        texts.append(" ".join(found[cut:] + found[:cut]))  # reordered
        texts.append(" ".join(found[:cut]) + " " + random_.choice(base))  # half of it
        texts.append("  " + text.upper().replace(".", " !") + "\n")  # other case and punctuation
    random_.shuffle(texts)
    return texts


def naive_shingles(text, size):
    found = [word.lower() for word in "".join(c if c.isalnum() else " " for c in text).split()]
    return {tuple(found[i : i + size]) for i in range(max(len(found) - size, 0) + 1)}


def naive_jaccard(texts, size):
    """Returns {(i, j): similarity} of all pairs that share a shingle."""
    sets = [naive_shingles(text, size) for text in texts]
    where = {}
    for i, shingles in enumerate(sets):
        for shingle in shingles:
            where.setdefault(shingle, []).append(i)
    shared = Counter(pair for places in where.values() for pair in combinations(places, 2))
    return {(i, j): n / (len(sets[i]) + len(sets[j]) - n) for (i, j), n in shared.items()}


def near(texts, config=DEFAULT):
    return near_duplicates([signatures(texts, config)], config)


# ---- near-duplicates


@pytest.mark.parametrize("shingle_size", [3, 5])
def test_at_least_95_percent_of_pairs_at_jaccard_080_lose_a_member(corpus, shingle_size):
    similarity = naive_jaccard(corpus, shingle_size)
    pairs = [pair for pair, value in similarity.items() if value >= 0.8]
    assert len(pairs) > 150
    is_kept = near(corpus).is_kept
    missed = sum(is_kept[i] and is_kept[j] for i, j in pairs)
    assert missed <= 0.05 * len(pairs)
    assert missed <= 0.005 * len(pairs)  # 20 bands of 5 rows: 99.96% at 0.8, more above


@pytest.mark.parametrize("shingle_size", [3, 5])
def test_texts_without_a_neighbour_above_jaccard_050_are_kept(corpus, shingle_size):
    nearest = np.zeros(len(corpus))
    for (i, j), value in naive_jaccard(corpus, shingle_size).items():
        nearest[i], nearest[j] = max(nearest[i], value), max(nearest[j], value)
    assert (nearest <= 0.5).sum() > 150
    assert near(corpus).is_kept[nearest <= 0.5].all()


def test_every_removed_document_is_similar_to_a_kept_earlier_one(corpus):
    clusters = near(corpus)
    removed = list(clusters.removed())
    assert len(removed) > 150
    for document, representative, value in removed:
        assert clusters.is_kept[representative]
        assert representative < document
        first, second = (naive_shingles(corpus[i], 3) for i in (document, representative))
        assert value == pytest.approx(len(first & second) / len(first | second), abs=1e-12)
        assert value >= 0.8
        assert value == jaccard(corpus[document], corpus[representative], DEFAULT)


def test_only_the_middle_of_a_chain_is_removed():
    numbers = [f"w{i}" for i in range(140)]
    first, middle, last = (" ".join(numbers[i : i + 100]) for i in (0, 10, 20))
    assert jaccard(first, middle, DEFAULT) >= 0.8 > jaccard(first, last, DEFAULT)
    clusters = near([first, middle, last])
    assert clusters.representatives.tolist() == [0, 0, 2]


def pairs_at(similarity, shingle_size, num_pairs, random_):
    """Returns pairs of texts of unique words whose Jaccard similarity is exactly `similarity`."""
    tail = 20
    common = round(2 * tail * similarity / (1 - similarity)) + shingle_size - 1
    for _ in range(num_pairs):
        word = iter([f"{random_.getrandbits(48):x}" for _ in range(common + 2 * tail)])
        shared = [next(word) for _ in range(common)]
        yield tuple(" ".join(shared + [next(word) for _ in range(tail)]) for _ in range(2))


@pytest.mark.parametrize(
    ("config", "similarity"), [(DEFAULT, 0.5), (DEFAULT, 0.6), (FINEWEB, 0.8), (FINEWEB, 0.75)]
)
def test_bands_collide_as_often_as_the_formula_predicts(config, similarity):
    num_pairs = 1500
    pairs = list(pairs_at(similarity, config.shingle_size, num_pairs, random.Random(1)))
    assert jaccard(*pairs[0], config) == pytest.approx(similarity, abs=1e-12)
    first, second = (signatures([pair[i] for pair in pairs], config).band_keys for i in (0, 1))
    found = (first == second).any(axis=1).mean()
    expected = collision_probability(similarity, config.bands, config.rows)
    assert abs(found - expected) < 4 * (expected * (1 - expected) / num_pairs) ** 0.5


def test_fineweb_removes_92_percent_of_pairs_at_its_threshold():
    pairs = list(pairs_at(0.8, FINEWEB.shingle_size, 1000, random.Random(2)))
    found = 1 - near([text for pair in pairs for text in pair], FINEWEB).is_kept[1::2].mean()
    assert 0.89 < found < 0.955


def test_the_probability_of_a_collision_follows_the_formula():
    assert round(collision_probability(0.8, 20, 5), 5) == 0.99964
    assert round(collision_probability(0.5, 20, 5), 4) == 0.4701
    assert round(collision_probability(0.8, 14, 8), 2) == 0.92
    assert collision_probability(1, 1, 1) == 1
    assert collision_probability(0, 20, 5) == 0


def test_short_and_empty_texts_are_deduplicated():
    texts = ["", "!?", "yes", "Yes.", "no", "yes sir", "yes  SIR!", "", "..."]
    assert near(texts).representatives.tolist() == [0, 1, 2, 2, 4, 5, 5, 7, 8]
    assert near(["one two three four", "five six seven eight"]).is_kept.all()
    assert len(near([])) == 0
    assert len(near_duplicates([], DEFAULT)) == 0
    assert jaccard("", "", DEFAULT) == 0


@pytest.mark.parametrize("unit", ["word", "character"])
def test_chinese_needs_no_segmenter(unit):
    config = MinHashConfig(unit=unit)
    changed = CHINESE.replace("网页", "语料").replace("，", " ")
    other = CHINESE[: len(CHINESE) // 2]
    assert jaccard(CHINESE, changed, config) > 0.85
    assert near([CHINESE, changed, other], config).representatives.tolist() == [0, 0, 2]


def test_character_shingles_ignore_characters_outside_words():
    config = MinHashConfig(unit="character", shingle_size=5)
    assert jaccard("To-day, a NEW day.", "today anewday", config) == 1
    assert jaccard("abcdefg", "abcdefh", config) == pytest.approx(2 / 4)


def test_words_are_normalised_before_comparison():
    assert words("Fjörð's 3 x_y") == ["Fjörð", "s", "3", "x", "y"]
    assert words("GPT模型2号") == ["GPT", "模", "型", "2", "号"]
    assert jaccard("ＡＢＣ １２３ Straße", "abc 123 STRASSE", DEFAULT) == 1
    for text in ("plain ASCII, 7 words_of it", CHINESE, "naïve ГОСТ 漢字かな!"):
        assert [text[a:b] for a, b in word_spans(text)] == words(text)


def test_lone_surrogates_do_not_stop_a_run():
    for unit in ("word", "character"):
        assert len(signatures(["bad \ud800 text here"], MinHashConfig(unit=unit))) == 1
    assert len(exact_keys(["\ud800"], ExactConfig())) == 1


# ---- independence of the division of work


def test_results_do_not_depend_on_splits_and_files(corpus, tmp_path):
    whole = near(corpus)
    cuts = [0, 100, 100, 417, len(corpus)]
    parts = [signatures(corpus[a:b], DEFAULT) for a, b in pairwise(cuts)]
    for number, part in enumerate(parts):
        part.save(tmp_path / str(number))
    loaded = [Signatures.load(tmp_path / str(number)) for number in range(len(parts))]
    for division in (parts, loaded):
        found = near_duplicates(division, DEFAULT)
        assert found.representatives.tolist() == whole.representatives.tolist()
        assert found.jaccard.tolist() == whole.jaccard.tolist()


def test_one_pass_over_the_data_serves_both_searches(corpus):
    texts = [*corpus, *corpus[::3]]
    first = exact_duplicates(exact_keys(texts, ExactConfig()))
    later = near([texts[i] for i in first.kept])
    expected = first.then(later, first.kept)
    at_once = near_duplicates([signatures(texts, DEFAULT)], DEFAULT, among=first.is_kept)
    found = first.then(at_once, np.arange(len(texts)))
    assert found.representatives.tolist() == expected.representatives.tolist()
    assert found.jaccard.tolist() == expected.jaccard.tolist()
    assert len(list(found.removed())) > len(list(later.removed())) > 150


def test_signatures_do_not_depend_on_batching(corpus, monkeypatch):
    expected = signatures(corpus, DEFAULT)
    monkeypatch.setattr(minhash, "_BATCH_TEXTS", 7)
    found = signatures(iter(corpus), DEFAULT)
    assert np.array_equal(found.band_keys, expected.band_keys)
    assert np.array_equal(found.shingles.values, expected.shingles.values)
    assert np.array_equal(found.shingles.offsets, expected.shingles.offsets)


SIGNATURE_CODE = """
import hashlib, json, sys
from easyllm.corpus.dedup.config import ExactConfig, MinHashConfig
from easyllm.corpus.dedup.exact import exact_keys
from easyllm.corpus.dedup.minhash import signatures
texts = json.load(sys.stdin)
found = signatures(texts, MinHashConfig())
arrays = (found.band_keys, found.shingles.values, found.shingles.offsets, exact_keys(texts, \
ExactConfig()))
print(hashlib.sha256(b"".join(a.astype("<u8").tobytes() for a in arrays)).hexdigest())
"""


def test_signatures_are_equal_in_every_process():
    texts = ["A text of a few words, once more.", CHINESE, "", "Straße ﬁn 12"]
    found = set()
    for seed in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-c", SIGNATURE_CODE],
            input=json.dumps(texts),
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        found.add(done.stdout.strip())
    assert found == {"d9ed81914053ef6a2cecec9de3dd414bcea512302adaf205263c1bff43159c3d"}


def test_a_seed_changes_signatures_but_no_similarity(corpus):
    other = MinHashConfig(seed=2)
    texts = corpus[:50]
    first, second = signatures(texts, DEFAULT), signatures(texts, other)
    assert not (first.band_keys == second.band_keys).any()
    assert np.array_equal(first.shingles.values, second.shingles.values)


def test_damaged_signatures_are_refused(tmp_path):
    signatures(["a b c d"], DEFAULT).save(tmp_path / "s")
    (tmp_path / "s" / "offsets.npy").write_bytes(b"")
    with pytest.raises(DataError, match="remove it and build again"):
        Signatures.load(tmp_path / "s")


def test_work_on_large_groups_of_similar_pages_is_bounded(monkeypatch):
    random_ = random.Random(3)
    template = [f"t{i}" for i in range(80)]
    pages = [" ".join(template + [f"{random_.random()}" for _ in range(20)]) for _ in range(300)]
    compared = []
    fits = minhash._sizes_fit
    monkeypatch.setattr(minhash, "_sizes_fit", lambda *a: compared.append(1) or fits(*a))
    config = MinHashConfig(max_bucket=2)
    copies = [pages[0], pages[299]]
    clusters = near(pages + copies, config)
    assert clusters.is_kept[:300].all()
    assert clusters.representatives[300] == 0
    assert len(compared) <= 302 * config.bands * 2
    few = len(compared)
    near(pages, MinHashConfig(max_bucket=300))
    assert len(compared) - few > 4 * few


# ---- exact


def test_exact_duplicates_differ_in_case_and_space_only():
    texts = ["A  b\nc", "a b c", "a, b c", "x = a + b", "x = a - b", "a b c "]
    found = exact_duplicates(exact_keys(texts, ExactConfig()))
    assert found.representatives.tolist() == [0, 0, 2, 3, 4, 0]
    assert found.jaccard.tolist() == [1] * 6
    as_is = exact_duplicates(exact_keys([*texts, "a b c"], ExactConfig(normalize=False)))
    assert as_is.representatives.tolist() == [0, 1, 2, 3, 4, 5, 1]
    assert len(exact_duplicates(exact_keys([], ExactConfig()))) == 0


@given(st.lists(st.integers(0, 6), max_size=30))
@settings(deadline=None)
def test_the_first_of_equal_documents_is_kept(numbers):
    found = exact_duplicates(exact_keys([str(n) for n in numbers], ExactConfig()))
    assert found.representatives.tolist() == [numbers.index(n) for n in numbers]


def test_clusters_of_two_searches_compose():
    first = Clusters(representatives=np.array([0, 0, 2, 3, 2]), jaccard=np.ones(5))
    later = Clusters(representatives=np.array([0, 0, 2]), jaccard=np.array([1, 0.9, 1]))
    both = first.then(later, first.kept)
    assert both.representatives.tolist() == [0, 0, 0, 3, 0]
    assert both.jaccard.tolist() == [1, 1, 0.9, 1, 0.9]
    assert list(both.removed()) == [(1, 0, 1.0), (2, 0, 0.9), (4, 0, 0.9)]


# ---- paragraphs

NOTICE = "All rights reserved by the author of this page."


def documents(*texts):
    return [Document(id=str(i), source="s", text=text) for i, text in enumerate(texts)]


def texts_after(step, *texts):
    return [d.text for d in deduplicate(documents(*texts), DedupConfig(steps=(step,))).documents]


def test_repeated_paragraphs_are_removed_except_the_first():
    first = f"One story.\n\n{NOTICE}\n\n\nYes."
    second = f"Another\nstory.\n \n{NOTICE.upper()}\n\nYes."
    assert texts_after(ParagraphConfig(), first, second) == [first, "Another\nstory.\n\nYes."]


def test_lines_can_be_deduplicated():
    text = f"{NOTICE}\nNew words here.\n{NOTICE}\n\nEnd."
    config = ParagraphConfig(unit="line")
    assert texts_after(config, text) == [f"{NOTICE}\nNew words here.\nEnd."]
    assert texts_after(ParagraphConfig(), text) == [text]


def test_a_document_of_only_repeated_paragraphs_is_rejected_and_counted():
    done = deduplicate(
        documents(f"{NOTICE}\n\nText.", NOTICE, ""), DedupConfig(steps=(ParagraphConfig(),))
    )
    assert [d.id for d in done.documents] == ["0", "2"]
    (rejection,) = done.rejections
    assert (rejection.document.text, rejection.rule, rejection.value) == (NOTICE, "paragraph", 1)
    assert done.counts == {"paragraph_parts": 1, "paragraph": 1}


def test_paragraphs_of_splits_are_found_in_the_order_of_splits():
    config = ParagraphConfig()
    parts = [paragraph_keys([NOTICE], config), paragraph_keys(["short", NOTICE], config)]
    assert repeated(Ragged.concatenate(parts).values).tolist() == [False, False, True]


# ---- substrings


def naive_repeated(texts, size):
    """Marks repeated words by the definition, in quadratic time."""
    flat = [(number, word) for number, text in enumerate(texts) for word in text]
    marks = [False] * len(flat)
    windows = [
        tuple(word for _, word in flat[i : i + size])
        if len({number for number, _ in flat[i : i + size]}) == 1 and i + size <= len(flat)
        else None
        for i in range(len(flat))
    ]
    for later, window in enumerate(windows):
        if window is not None and window in windows[: max(later - size + 1, 0)]:
            marks[later : later + size] = [True] * size
    return marks


@given(st.lists(st.text("ab", max_size=20), max_size=6), st.integers(2, 6))
@settings(max_examples=300, deadline=None)
def test_repeated_words_match_a_naive_implementation(texts, size):
    found = repeated_words(
        word_hashes([" ".join(text) for text in texts]), SubstringConfig(min_words=size)
    )
    assert found.tolist() == naive_repeated(texts, size)


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(1, 12))
@settings(deadline=None)
def test_window_hashes_are_equal_exactly_if_the_windows_are(tokens, size):
    windows = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
    values = np.array(tokens, dtype=np.uint64) * np.uint64(0x1234567887654321)
    found = Windows(values).hashes(size).tolist()
    assert [found.index(h) for h in found] == [windows.index(w) for w in windows]


def test_a_repeated_run_is_removed_from_the_later_text():
    passage = " ".join(f"word{i}" for i in range(60))
    first = f"Before it. {passage}. After it."
    second = f"Elsewhere: {passage.upper()}. And on it goes."
    assert texts_after(SubstringConfig(), first, second) == [first, "Elsewhere: And on it goes."]
    assert texts_after(SubstringConfig(min_words=61), first, second) == [first, second]
    assert texts_after(SubstringConfig(), f"So: {passage}", f"Or: {passage}!") == [
        f"So: {passage}",
        "Or:",
    ]


def test_one_copy_of_a_run_repeated_in_place_is_kept():
    assert texts_after(SubstringConfig(min_words=4), "ha " * 200) == ["ha ha ha ha"]
    assert texts_after(SubstringConfig(min_words=10), CHINESE * 2) == [CHINESE]


def test_removing_words_also_removes_the_separators_after_them():
    marks = np.array([False, True, True, False, True])
    assert without_words("“A b, c; D e.", marks) == "“A D"
    assert without_words("A b", np.array([True, True])) == ""
    assert without_words("A b \n", np.array([False, False])) == "A b \n"


# ---- the complete pipeline


def test_steps_follow_one_another_and_nothing_is_lost(corpus):
    texts = [*corpus[:200], corpus[0], corpus[5].upper(), "", ""]
    steps = (ExactConfig(), ParagraphConfig(), MinHashConfig())
    done = deduplicate(documents(*texts), DedupConfig(steps=steps))
    kept = [int(d.id) for d in done.documents]
    gone = [int(r.document.id) for r in done.rejections]
    assert sorted(kept + gone) == list(range(len(texts)))
    assert kept == sorted(kept)
    by_rule = Counter(r.rule for r in done.rejections)
    assert by_rule["exact"] >= 3
    assert by_rule["minhash"] >= 5
    assert {rule: done.counts[rule] for rule in by_rule} == dict(by_rule)
    assert {d for d, _, _ in done.clusters.removed()} == {
        int(r.document.id) for r in done.rejections if r.rule != "paragraph"
    }
    assert done.clusters.representatives[200] == done.clusters.representatives[0]
    near_values = [r.value for r in done.rejections if r.rule == "minhash"]
    assert min(near_values) >= 0.8


def test_documents_keep_their_other_fields():
    (document,) = [Document(id="7", source="web", text=f"{NOTICE}\n\nx\n\n{NOTICE}", language="en")]
    done = deduplicate([document], DedupConfig(steps=(ParagraphConfig(),)))
    assert done.documents == [Document(id="7", source="web", text=f"{NOTICE}\n\nx", language="en")]


# ---- configuration


def test_configuration_is_read_by_kind_and_errors_say_what_to_do():
    written = {"steps": [{"kind": "paragraph", "unit": "line"}, {"kind": "minhash", "bands": 9}]}
    assert validate(DedupConfig, written, source="r").steps == (
        ParagraphConfig(unit="line"),
        MinHashConfig(bands=9),
    )
    with pytest.raises(ConfigError, match="did you mean 'bands'"):
        validate(DedupConfig, {"steps": [{"kind": "minhash", "band": 9}]}, source="r")
    with pytest.raises(ConfigError, match=r"5% of the pairs.*fewer rows or more bands"):
        validate(MinHashConfig, {"threshold": 0.3}, source="r")
    with pytest.raises(ConfigError, match="did you mean 'fineweb'"):
        dedup_preset("finweb")
    assert dedup_preset("fineweb").steps[0].bands * 8 == 112


def test_configuration_loads_without_numpy():
    code = (
        "import sys, easyllm.corpus.dedup.config, easyllm.corpus.privacy\n"
        "assert 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
