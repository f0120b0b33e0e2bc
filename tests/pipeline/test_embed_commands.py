"""`easyllm embed` from the command line: training, search, mistakes."""

import json

from easyllm_command import easyllm

PAIRS = [
    {"query": f"where is the {w}", "positive": f"the {w} is {p}"}
    for w, p in (("house", "old"), ("river", "long"), ("hill", "green"), ("sea", "deep"))
]
RECIPE = """
model: {model}
data: {{ kind: text_pairs, train: [{data}], eval: [{data}], max_seq_len: 64 }}
objective: {{ kind: contrastive }}
adapter: {{ kind: lora, rank: 4 }}
optimizer: {{ kind: adamw, learning_rate: 1e-2 }}
batch_size: 4
micro_batch_tokens: 64
epochs: 12
log_every: 1
output: {output}
"""


def test_a_trained_model_finds_more(tiny_folder, tmp_path):
    data, recipe = tmp_path / "pairs.jsonl", tmp_path / "r.yaml"
    data.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    recipe.write_text(RECIPE.format(model=tiny_folder, data=data, output=tmp_path / "run"))
    done = easyllm("embed", "train", recipe, "--json")
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [row["train/loss_nats"] for row in map(json.loads, lines) if "train/loss_nats" in row]
    assert losses[-1] < losses[0] / 2
    figures = [json.loads(line) for line in lines if "eval/recall_at_1" in line]
    assert figures[-1]["eval/recall_at_1"] == 1


def test_search_of_texts_and_words(tiny_folder, tmp_path):
    texts = tmp_path / "t.txt"
    texts.write_text("The sea is deep.\nhello world\n\n你好，世界\n")
    found = json.loads(
        easyllm("embed", "search", tiny_folder, texts, "hello world", "--json").stdout
    )
    assert found[0]["text"] == "hello world"
    assert len(found) == 3
    corpus = tmp_path / "c.txt"
    corpus.write_text("a cat eats fish\na dog eats meat\n" * 50)
    out = tmp_path / "words"
    made = easyllm(
        *("embed", "words", corpus, out, "--dim", "8", "--epochs", "1", "--min-count", "2"),
        *("--subsample", "1", "--json"),
    )
    assert json.loads(made.stdout)["words"] == 6, made.stderr
    near = easyllm("embed", "search", out, "--words", "cat + dog - fish", "--k", "2")
    assert near.returncode == 0, near.stderr
    assert "cosine" in near.stdout


def test_mistakes_are_one_sentence(tiny_folder, tmp_path):
    texts = tmp_path / "t.txt"
    texts.write_text("\n")
    for words, reason in (
        (("train", "sft-lora"), "expected contrastive"),
        (("search", tiny_folder, texts, "x"), "contains no text"),
        (("search", tiny_folder), "a file of texts and a query"),
        (("search", tiny_folder, texts, "x", "--pooling", "max"), "'max' is not known"),
        (("search", tmp_path, "--words", "a"), "no word vectors"),
    ):
        done = easyllm("embed", *words)
        assert done.returncode == 2, words
        assert reason in done.stderr
