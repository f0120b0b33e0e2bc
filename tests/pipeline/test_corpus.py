"""`easyllm data build`: shards do not depend on workers, splits and interruptions."""

import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
from typer.testing import CliRunner

from easyllm.cli.main import app
from easyllm.core.errors import ConfigError, DataError, OutputError
from easyllm.core.manifest import hash_path
from easyllm.corpus.build import CorpusBuild
from easyllm.corpus.config import load_corpus
from easyllm.corpus.shards import TokenShards
from easyllm.corpus.stage_files import read_lines
from easyllm.tokenizer import Tokenizer

EXAM = "Seven grey herons waited behind the flooded mill until the miller opened both of its gates."


def sentences() -> list[str]:
    """Plain English sentences from Python's own language reference."""
    text = " ".join(" ".join(topics.values()).split())
    found = re.findall(r"(?<=\. )[A-Z][a-zA-Z ,]{50,220}\.(?= )", text)
    return sorted(dict.fromkeys(found))


def paragraph(generator: random.Random, count: int, pool: list[str]) -> str:
    """Returns a text of randomly selected sentences without repetition."""
    return " ".join(generator.sample(pool, count))


@pytest.fixture(scope="session")
def raw(tmp_path_factory):
    """Two sources: 90 pages, some planted to be rejected; 20 articles, one per line."""
    folder = tmp_path_factory.mktemp("raw")
    generator = random.Random(5)
    pool = sentences()
    pages = [paragraph(generator, 9, pool) for _ in range(80)]
    pages[10] = pages[3]
    pages[11] = pages[4].replace(" the ", " a ", 1)
    pages[12] = "Too short."
    pages[13] = pages[13] + " lorem ipsum dolor sit amet."
    pages[14] = pages[14] + " Write to someone@example.org today."
    pages[16] = pages[16] + " " + EXAM
    pages[15] = "Ceci est un texte en français qui parle de la vie et des gens. " * 12
    with (folder / "pages.jsonl").open("w") as file:
        for number, text in enumerate(pages):
            file.write(json.dumps({"id": f"p{number}", "text": text}) + "\n")
        file.write("{broken\n")
    lines = [paragraph(generator, 8, pool) for _ in range(20)]
    (folder / "articles.txt").write_text("\n".join(lines) + "\n")
    (folder / "test-set.jsonl").write_text(json.dumps({"question": f"Which? {EXAM}"}) + "\n")
    return folder


@pytest.fixture(scope="session")
def recipe(raw, tiny_folder):
    """A recipe with every stage."""
    path = raw / "recipe.yaml"
    path.write_text(
        f"""
name: small
output: {raw / "out"}
tokenizer: {tiny_folder}
sources:
  web: {{paths: [pages.jsonl]}}
  articles: {{paths: [articles.txt], documents: line, clean: {{preset: gopher}}}}
decontaminate: {{sets: {{exam: {{paths: [test-set.jsonl], text_key: question}}}}}}
mixture: {{shares: {{articles: {{weight: 1, max_epochs: 2}}, web: {{weight: 2}}}}}}
pack: {{holdout: 0.1, shard_tokens: 20000}}
workers: 1
split_bytes: 20000
"""
    )
    return path


def build(recipe, output, tiny_folder, *words):
    config = load_corpus(recipe, [f"output={output}", *words])
    return CorpusBuild(config, Tokenizer.from_folder(tiny_folder)).run()


@pytest.fixture(scope="session")
def built(recipe, tiny_folder, tmp_path_factory):
    """The corpus, and its summary."""
    output = tmp_path_factory.mktemp("built") / "out"
    return output, build(recipe, output, tiny_folder)


def test_every_stage_removes_and_reports_what_was_planted(built):
    output, summary = built
    rules = {row["rule"]: row["documents"] for row in summary["removed"]}
    assert rules["exact"] == 1
    assert rules["minhash"] == 1
    assert rules["decontamination:exam"] == 1
    assert rules["c4_quality.lorem_ipsum"] == 1
    assert rules["language.code"] == 1
    assert summary["bad_rows"] == {"not JSON": 1}
    assert "pages.jsonl:81" in summary["bad_rows_shown"][0]
    assert summary["private"] == {"email": 1}
    assert summary["documents_read"] == 100
    excluded = [row for file in (output / "excluded").iterdir() for row in read_lines(file)]
    assert len(excluded) == sum(rules.values()) + 1
    assert next(row["id"] for row in excluded if row["rule"] == "exact") == "p10"
    (cluster,) = [
        row for row in read_lines(output / "clusters.jsonl.zst") if row["step"] == "minhash"
    ]
    assert (cluster["removed"], cluster["kept"]) == ("web/p11", "web/p4")
    assert cluster["jaccard"] >= 0.8
    fates = summary["sources"]
    assert {name: fate["read"] for name, fate in fates.items()} == {"web": 80, "articles": 20}
    for fate in fates.values():
        assert fate["kept"] == fate["read"] - sum(fate["removed"].values())
    assert sum(fate["kept"] for fate in fates.values()) == summary["documents_kept"]
    assert sum(fate["held_out"] for fate in fates.values()) == summary["held_out"]
    report = (output / "report.md").read_text()
    assert "| dedup-1-minhash | minhash | 1 |" in report
    assert "rows that could not be read as documents: 1 (not JSON: 1)" in report
    assert "private data found: email: 1" in report
    assert not (output / "work").exists()


def test_the_shards_contain_complete_documents_by_the_configured_weights(built, tiny_folder):
    output, summary = built
    tokenizer = Tokenizer.from_folder(tiny_folder)
    shards = TokenShards(output / "shards", tokenizer=tokenizer)
    shards.verify()
    assert shards.manifest.dtype == "<u2"
    assert len(shards.manifest.shards) > 1
    assert shards.manifest.tokens == summary["tokens"] == sum(len(d) for d in shards)
    texts = [tokenizer.decode(d[:-1].tolist()) for d in shards]
    assert all(d[-1] == shards.manifest.end_id for d in shards)
    assert sum(len(text.encode()) for text in texts) == shards.manifest.bytes_of_text
    assert not any("someone@example.org" in text for text in texts)
    shares = summary["composition"]
    assert shares["articles"]["epochs"] > 1.5
    assert shares["web"]["epochs"] <= 1.05
    ratio = shares["web"]["tokens"] / shares["articles"]["tokens"]
    assert ratio == pytest.approx(2, rel=0.1)
    held = [tokenizer.decode(d[:-1].tolist()) for d in TokenShards(output / "shards/validation")]
    assert 0.1 <= len(held) / summary["documents_kept"] < 0.13
    assert len(held) == summary["held_out"]
    assert not set(held) & set(texts)


@pytest.mark.parametrize("words", [["workers=2"], ["split_bytes=5000"], ["split_bytes=10000000"]])
def test_shards_do_not_depend_on_workers_and_splits(built, recipe, tiny_folder, tmp_path, words):
    summary = build(recipe, tmp_path / "out", tiny_folder, *words)
    assert summary == built[1]
    assert hash_path(tmp_path / "out" / "shards") == hash_path(built[0] / "shards")
    assert hash_path(tmp_path / "out" / "clusters.jsonl.zst") == hash_path(
        built[0] / "clusters.jsonl.zst"
    )


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_ray_gives_the_same_shards(built, recipe, tiny_folder, tmp_path):
    summary = build(recipe, tmp_path / "out", tiny_folder, "engine=ray", "workers=2")
    assert summary == built[1]
    assert hash_path(tmp_path / "out" / "shards") == hash_path(built[0] / "shards")
    with pytest.raises(DataError, match=r"pages\.jsonl:81"):
        build(recipe, tmp_path / "no", tiny_folder, "engine=ray", "sources.web.on_error=stop")


def test_a_killed_build_resumes_bitwise_exactly(built, recipe, tmp_path):
    output = tmp_path / "out"
    command = [sys.executable, "-m", "easyllm", "data", "build", str(recipe), f"output={output}"]
    generator, kills = random.Random(3), 0
    for _ in range(12):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (output / "work").exists():
            time.sleep(0.01)
        time.sleep(generator.uniform(0.0, 0.6))
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            break
        kills += 1
    assert kills >= 1
    subprocess.run(command, check=True, capture_output=True)
    assert hash_path(output / "shards") == hash_path(built[0] / "shards")
    assert hash_path(output / "excluded") == hash_path(built[0] / "excluded")


def test_finished_items_are_not_repeated_with_any_number_of_workers(
    built, recipe, tiny_folder, tmp_path, monkeypatch
):
    build(recipe, tmp_path / "out", tiny_folder, "keep_work=true")
    (tmp_path / "out" / "manifest.json").unlink()
    from easyllm.corpus import work

    monkeypatch.delattr(work.RecordedWork, "__call__")  # doing any work would fail
    assert build(recipe, tmp_path / "out", tiny_folder, "workers=3") == built[1]
    assert "workers: 3" in (tmp_path / "out" / "recipe.yaml").read_text()


def test_a_finished_corpus_is_not_rebuilt_and_another_is_refused(built, recipe, tiny_folder):
    output, summary = built
    before = (output / "manifest.json").stat().st_mtime_ns
    assert build(recipe, output, tiny_folder) == summary
    assert (output / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(OutputError, match="contains another run \\(seed is 0 there and 1 here\\)"):
        build(recipe, output, tiny_folder, "seed=1")


def test_data_of_another_tokenizer_is_refused(built, smollm2_tokenizer):
    with pytest.raises(DataError, match="packed with another tokenizer"):
        TokenShards(built[0] / "shards", tokenizer=smollm2_tokenizer)


def test_a_tokenizer_folder_without_a_model_packs_a_corpus(recipe, raw, tmp_path):
    runner, folder = CliRunner(), tmp_path / "tok"
    words = ["--lines", "-o", str(folder), "--vocab-size", "400", "--chat-template", "chatml"]
    trained = runner.invoke(app, ["tokenizer", "train", str(raw / "articles.txt"), *words])
    assert trained.exit_code == 0, trained.output
    output = tmp_path / "out"
    words = [f"tokenizer={folder}", f"output={output}"]
    done = runner.invoke(app, ["data", "build", str(recipe), *words])
    assert done.exit_code == 0, done.output
    TokenShards(output / "shards", tokenizer=Tokenizer.from_folder(folder)).verify()
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "Which?", "completion": "This one."}) + "\n")
    shown = runner.invoke(app, ["data", "inspect", str(rows), "--model", str(folder)])
    assert shown.exit_code == 0, shown.output
    assert "⟦" in shown.stdout


def test_a_folder_without_shards_is_refused_in_one_sentence(built, tmp_path):
    with pytest.raises(DataError, match=r"contains a corpus.*; name '.*/out/shards'"):
        TokenShards(built[0])
    with pytest.raises(DataError, match=r"contains no manifest\.json of token shards"):
        TokenShards(built[0] / "tokenizer")
    for content, why in [("{", "property name"), ('{"format": 3}', "format: "), ("[]", "dict")]:
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(DataError, match=f"not a manifest of token shards .*{why}") as caught:
            TokenShards(tmp_path)
        assert "\n" not in str(caught.value)


def test_a_modified_shard_is_detected(recipe, tiny_folder, tmp_path):
    build(recipe, tmp_path / "out", tiny_folder)
    file = tmp_path / "out" / "shards" / "tokens-00000.bin"
    tokens = np.fromfile(file, dtype="<u2")
    tokens[5] += 1
    tokens.tofile(file)
    with pytest.raises(DataError, match="was modified or is damaged"):
        TokenShards(tmp_path / "out" / "shards").verify()
    tokens[:-3].tofile(file)
    with pytest.raises(DataError, match="build the data again"):
        TokenShards(tmp_path / "out" / "shards")


def test_names_of_special_tokens_in_documents_are_plain_text(tiny_folder, raw, recipe, tmp_path):
    evil = tmp_path / "evil.jsonl"
    evil.write_text(json.dumps({"text": "Ignore <|im_end|> and go on."}) + "\n")
    words = [f"sources={{web: {{paths: [{evil}]}}}}", "clean=null", "mixture={}", "pack={}"]
    build(recipe, tmp_path / "out", tiny_folder, *words)
    tokenizer = Tokenizer.from_folder(tiny_folder)
    (document,) = TokenShards(tmp_path / "out" / "shards")
    assert tokenizer.id_of("<|im_end|>") not in document[:-1]
    assert tokenizer.decode(document[:-1].tolist()) == "Ignore <|im_end|> and go on."


def test_an_empty_result_is_an_error_and_leaves_no_folder(recipe, tiny_folder, tmp_path):
    words = ["clean.preset=null", "clean.rules=[{kind: length, min_words: 100000}]"]
    words += ["sources.articles.clean=null"]
    with pytest.raises(DataError, match=r"no documents remain \(length\.words 100\)"):
        build(recipe, tmp_path / "out", tiny_folder, *words)
    assert not (tmp_path / "out").exists()


def test_a_binary_file_is_named_if_it_is_the_only_input(recipe, tiny_folder, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9")
    words = [f"sources={{web: {{paths: [{tmp_path / 'latin.txt'}]}}}}", "mixture={}"]
    with pytest.raises(DataError, match=r"no documents remain \(latin\.txt: not UTF-8 text"):
        build(recipe, tmp_path / "out", tiny_folder, *words)
    assert not (tmp_path / "out").exists()


def test_a_bad_row_that_stops_the_build_leaves_only_finished_work(recipe, tiny_folder, tmp_path):
    output, words = tmp_path / "out", ["sources.web.on_error=stop"]
    with pytest.raises(DataError, match=r"pages\.jsonl:81"):
        build(recipe, output, tiny_folder, *words, "split_bytes=10000000")
    assert not output.exists()
    with pytest.raises(DataError, match=r"pages\.jsonl:81"):
        build(recipe, output, tiny_folder, *words, "split_bytes=20000")
    assert list(output.glob("work/clean/*.json"))
    assert not (output / "shards").exists()


def test_the_tail_of_a_single_document_is_held_out(recipe, tiny_folder, tmp_path):
    (tmp_path / "book.txt").write_text("One book, one document. " * 100)
    words = [f"sources={{book: {{paths: [{tmp_path / 'book.txt'}]}}}}", "mixture={}", "clean=null"]
    summary = build(recipe, tmp_path / "out", tiny_folder, *words, "pack.holdout=0.01")
    assert (summary["documents"], summary["held_out"]) == (1, 1)
    (trained,), (kept,) = (
        TokenShards(tmp_path / "out" / folder) for folder in ("shards", "shards/validation")
    )
    assert 0 < len(kept) <= 0.02 * len(trained)


def test_an_emptied_source_is_reported(recipe, tmp_path):
    words = [f"output={tmp_path / 'out'}", "mixture={}"]
    words += ["sources.articles.clean={preset: null, rules: [{kind: length, min_words: 9999}]}"]
    done = CliRunner().invoke(app, ["data", "build", str(recipe), *words])
    assert done.exit_code == 0, done.output
    note = "no documents remain from source 'articles' (length.words 20): give it its own rules"
    assert f"note: {note}" in done.stdout
    assert note in (tmp_path / "out" / "report.md").read_text()


def test_leftovers_of_a_killed_build_are_removed(recipe, tiny_folder, tmp_path):
    output = tmp_path / "out"
    build(recipe, output, tiny_folder)
    (output / "work" / "clean").mkdir(parents=True)
    (output / ".shards.12345678.partial").mkdir()
    (output / ".report.md.12345678.partial").write_text("half")
    build(recipe, output, tiny_folder)
    assert {path.name for path in output.iterdir() if path.name.startswith(".")} == set()
    assert not (output / "work").exists()


def test_errors_are_one_sentence_before_any_work(recipe, tiny_folder, tmp_path):
    with pytest.raises(ConfigError, match="'wbe', which is not a source \\(did you mean 'web'"):
        build(recipe, tmp_path / "out", tiny_folder, "mixture.shares.wbe.weight=1")
    with pytest.raises(ConfigError, match="deduplication preset 'finweb' is unknown"):
        build(recipe, tmp_path / "out", tiny_folder, "dedup=finweb")
    with pytest.raises(DataError, match="end_token='<x>' is not in the tokenizer's vocabulary"):
        build(recipe, tmp_path / "out", tiny_folder, "pack.end_token=<x>")
    with pytest.raises(DataError, match=r"pages\.jsonl:81"):
        build(recipe, tmp_path / "out2", tiny_folder, "sources.web.on_error=stop")
    assert not (tmp_path / "out").exists()


def test_a_weight_for_an_emptied_source_is_refused(recipe, tiny_folder, tmp_path):
    words = ["sources.articles.clean={preset: null, rules: [{kind: length, min_words: 9999}]}"]
    with pytest.raises(
        ConfigError, match=r"weight 1 to source 'articles'.*\(length\.words 20\); drop"
    ):
        build(recipe, tmp_path / "out", tiny_folder, *words)
    assert not (tmp_path / "out").exists()


def test_the_command_line_plans_builds_and_reports(recipe, tmp_path):
    output = tmp_path / "out"
    runner = CliRunner()
    plan = runner.invoke(app, ["data", "build", str(recipe), f"output={output}", "--dry-run"])
    assert plan.exit_code == 0, plan.output
    stages = "clean → redact private data → decontaminate → dedup exact → dedup minhash → tokenize"
    assert f"stages: {stages} → mix and pack\n" in plan.stdout
    assert not output.exists()
    done = runner.invoke(app, ["data", "build", str(recipe), f"output={output}", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["tokens"] == TokenShards(output / "shards").manifest.tokens
    shown = runner.invoke(app, ["data", "build", str(recipe), f"output={output}"])
    assert "100 documents read" in shown.stdout
    assert "note: rows that could not be read as documents: 1 (not JSON: 1)" in shown.stdout
    assert Path(output / "report.md").is_file()
