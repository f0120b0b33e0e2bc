"""`easyllm eval` with win-rate, elo and over-optimisation, and `easyllm data best-of-n`."""

import json

import pytest

from easyllm.core.device import cache_folder
from easyllm.engine import LLM
from easyllm.evaluate import answer_store, sampled_answers
from easyllm.evaluate.judge_client import base_url
from easyllm.evaluate.reply_cache import default_cache
from easyllm.examples.preferences import read_preferences
from easyllm.models import save_model, to_classifier
from easyllm_command import easyllm
from fake_judge import FakeJudge, judging
from running_server import running
from tiny_models import build_tiny

PROMPTS = ["hello", "what is a fox?", "你好", "how many dogs", "which model"]
SAMPLED = ("--max-tokens", "6", "--seed", "3")


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("files")
    rows = [{"prompt": prompt, "answer": "a"} for prompt in PROMPTS]
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_model(build_tiny(5), folder / "other", tokenizer=tiny_tokenizer)
    reward = to_classifier(build_tiny(2), 1, seed=1)
    save_model(reward, folder / "reward", tokenizer=tiny_tokenizer)
    return folder


def evaluated(*words):
    done = easyllm("eval", *words, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_win_rate_by_a_reward_model_and_its_elo_table(files, tiny_folder, tmp_path):
    judged = tmp_path / "judged.jsonl"
    words = ("--task", "win-rate", "--judge", f"reward:{files / 'reward'}", *SAMPLED)
    found = evaluated(
        tiny_folder, files / "p.jsonl", *words, "--against", files / "other", "--output", judged
    )
    (score,) = found["scores"]
    assert score["name"] == "win_rate"
    assert score["n"] == found["wins"] + found["ties"] + found["losses"] == 5
    assert found["identical"] < 5
    reverse = evaluated(files / "other", files / "p.jsonl", *words, "--against", tiny_folder)
    assert reverse["scores"][0]["value"] == pytest.approx(1 - score["value"])
    table = evaluated("--task", "elo", "--data", judged, "--prior-ties", "1")
    names = {row["model"] for row in table["models"]}
    assert names == {str(tiny_folder), str(files / "other")}
    assert sum(row["elo"] for row in table["models"]) == pytest.approx(2000)
    done = easyllm("eval", "--task", "elo", "--data", judged, "--prior-ties", "1")
    assert done.returncode == 0, done.stderr
    assert "95% interval" in done.stdout


def test_a_model_against_itself_has_only_identical_answers(files, tiny_folder):
    words = ("--task", "win-rate", "--judge", "rule:digits", "--against", tiny_folder, *SAMPLED)
    found = evaluated(tiny_folder, files / "p.jsonl", *words, "--limit", "3")
    assert (found["identical"], found["scores"][0]["value"]) == (3, 0.5)


def test_a_judge_with_a_bias_is_shown(files, tiny_folder, tmp_path):
    cache = tmp_path / "replies.jsonl"
    fake = FakeJudge(lambda a, b: "A")
    with judging(fake) as url:
        words = ("--task", "win-rate", "--against", files / "other", "--judge", url, *SAMPLED)
        words += ("--judge-cache", cache, "--judge-key-env", "MY_KEY")
        done = easyllm("eval", tiny_folder, files / "p.jsonl", *words, MY_KEY="sk-secret")
        assert done.returncode == 0, done.stderr
        assert "100.0% of the verdicts" in done.stdout
        assert "50.0% ± 0.0%" in done.stdout
        asked = len(fake.bodies)
        again = easyllm("eval", tiny_folder, files / "p.jsonl", *words, MY_KEY="sk-secret")
    assert f"10 verdicts are from {cache}" in " ".join(again.stdout.split())
    assert set(done.stdout.splitlines()) < set(again.stdout.splitlines())
    assert len(fake.bodies) == asked == 10
    assert fake.headers[0]["Authorization"] == "Bearer sk-secret"
    assert "sk-secret" not in cache.read_text()


def test_replies_are_kept_in_the_cache_folder_by_default(files, tiny_folder, tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "kernels").symlink_to(cache_folder() / "kernels")  # not built again
    fake = FakeJudge(lambda a, b: "B")
    with judging(fake) as url:
        words = ("--task", "win-rate", "--against", files / "other", "--judge", url, *SAMPLED)
        for limit in ("2", "3"):
            words_of = (tiny_folder, files / "p.jsonl", *words, "--limit", limit, "--json")
            done = easyllm("eval", *words_of, EASYLLM_CACHE=str(folder))
            assert done.returncode == 0, done.stderr
        assert len(fake.bodies) == 6
        (path,) = (folder / "judge").iterdir()
        found = json.loads(done.stdout)
        assert (found["reused_verdicts"], found["judge_cache"]) == (4, str(path))
        assert path == folder / "judge" / default_cache(base_url(url)).name


@pytest.mark.parametrize("context", [256, 2048])
def test_our_own_server_gives_guided_verdicts(
    files, tiny_folder, tiny_tokenizer, tmp_path, context
):
    model = build_tiny(max_position_embeddings=context)
    llm = LLM(model=model, tokenizer=tiny_tokenizer, num_pages=256, page_size=16)
    with running({"judge": llm}) as url:
        words = ("--task", "win-rate", "--against", files / "other", "--judge", url, *SAMPLED)
        words += (
            "--judge-cache",
            tmp_path / "replies.jsonl",
            "--no-judge-reason",
            "--judge-max-tokens",
            "40",
            "--limit",
            "2",
            "--json",
        )
        done = easyllm("eval", tiny_folder, files / "p.jsonl", *words)
    if context == 256:  # the instructions alone are longer
        assert done.returncode == 2
        assert "refused a request with status 400" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["judge"].startswith("judge at http://127.0.0.1:")
    assert (found["scores"][0]["unparsed"], found["position_bias"]["pairs"]) == (0, 2)


def test_the_best_answers_are_written_and_the_same_seed_gives_the_same_file(
    files, tiny_folder, tmp_path
):
    one, two, pairs = (tmp_path / name for name in ("one.jsonl", "two.jsonl", "pairs.jsonl"))
    command = ("data", "best-of-n", tiny_folder, files / "p.jsonl")
    words = ("--reward", f"reward:{files / 'reward'}", "--samples", "3", *SAMPLED)
    for output in (one, two):
        done = easyllm(*command, output, *words)
        assert done.returncode == 0, done.stderr
    assert one.read_bytes() == two.read_bytes()
    assert len(one.read_text().splitlines()) == 5
    other = easyllm(*command, tmp_path / "other.jsonl", *words[:-1], "4")
    assert other.returncode == 0, other.stderr
    assert (tmp_path / "other.jsonl").read_bytes() != one.read_bytes()
    done = easyllm(*command, pairs, *words, "--rows", "pairs", "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    found = list(read_preferences(pairs))
    assert len(found) == figures["rows"] == 5 - figures["equal"] > 0
    assert figures["best_score"] > figures["mean_score"]
    best = [json.loads(line)["messages"][-1] for line in one.read_text().splitlines()]
    assert [pair.chosen[0] for pair in found] == best
    done = easyllm(*command, one, *words)
    assert done.returncode == 2
    assert "already exists; name a new file" in done.stderr


def test_an_interrupted_best_of_n_continues_with_the_same_answers(
    files, tiny_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(answer_store, "CHUNK", 2)
    monkeypatch.setattr(sampled_answers, "CHUNK", 2)
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    command = ("data", "best-of-n", tiny_folder, files / "p.jsonl")
    words = ("--reward", f"reward:{files / 'reward'}", "--samples", "3", *SAMPLED)
    assert easyllm(*command, whole, *words).returncode == 0
    right, calls = sampled_answers._sampled, []

    def sampled(*arguments):
        calls.append(len(arguments[1]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return right(*arguments)

    monkeypatch.setattr(sampled_answers, "_sampled", sampled)
    assert easyllm(*command, broken, *words).returncode == 130
    part = tmp_path / "broken.jsonl.part"
    assert part.exists()
    assert not broken.exists()
    with part.open("a") as file:
        file.write('{"start": 4, "ans')  # killed while it wrote
    other = easyllm(*command, broken, *words[:-1], "4")
    assert other.returncode == 2
    assert "with other options" in " ".join(other.stderr.split())
    done = easyllm(*command, broken, *words)
    assert done.returncode == 0, done.stderr
    assert "continuing: the answers to 4 of 5 prompts" in " ".join(done.stderr.split())
    assert calls == [2, 2, 1, 1]
    assert broken.read_bytes() == whole.read_bytes()
    assert not part.exists()


def test_over_optimisation_is_drawn(files, tiny_folder, tmp_path):
    curves = tmp_path / "curves.svg"
    words = ("--task", "over-optimisation", "--proxy", f"reward:{files / 'reward'}")
    words += ("--gold", "rule:length,target=0", "--samples", "4", *SAMPLED)
    found = evaluated(tiny_folder, files / "p.jsonl", *words, "--figure", curves)
    assert [point["n"] for point in found["points"]] == [1, 2, 4]
    proxies = [point["proxy"] for point in found["points"]]
    assert proxies == sorted(proxies)
    assert [score["name"] for score in found["scores"]] == ["proxy_best_of_4", "gold_best_of_4"]
    assert curves.read_text().count("<polyline") == 2
    done = easyllm("eval", tiny_folder, files / "p.jsonl", *words)
    assert done.returncode == 0, done.stderr
    assert "gold reward is highest at n =" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--task", "win-rate"], "needs --against"),
        (["--task", "win-rate", "--against", "x"], "needs --judge"),
        (["--task", "over-optimisation", "--proxy", "rule:length"], "needs --gold"),
        (["--task", "elo", "--prior-ties", "1"], "elo reads a file of judged pairs"),
        (["--judge", "rule:length"], "--judge concerns win-rate, not answers"),
        (
            ["--seed", "1"],
            "--seed concerns win-rate, elo, over-optimisation and tasks of items, not",
        ),
    ],
)
def test_what_a_task_needs_or_does_not_read_is_one_sentence(files, tiny_folder, words, said):
    done = easyllm("eval", tiny_folder, files / "p.jsonl", *words)
    assert done.returncode == 2
    assert said in done.stderr
    assert not done.stdout


def test_a_missing_key_and_options_of_another_judge_are_refused(files, tiny_folder):
    start = ("eval", tiny_folder, files / "p.jsonl", "--task", "win-rate", "--against", tiny_folder)
    done = easyllm(*start, "--judge", "http://127.0.0.1:9", "--judge-key-env", "NOT_SET")
    assert (done.returncode, "NOT_SET" in done.stderr) == (2, True)
    done = easyllm(*start, "--judge", "rule:length", "--judge-retries", "1")
    assert (done.returncode, "--judge-retries concerns an LLM judge" in done.stderr) == (2, True)
