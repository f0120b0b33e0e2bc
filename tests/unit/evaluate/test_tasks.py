"""Evaluation tasks: reading items, prompts, outcomes, resuming, comparison, refusals."""

import json

import pytest

from easyllm.core.errors import ConfigError, DataError, SourceError
from easyllm.engine import LLM
from easyllm.evaluate.reply_cache import ReplyCache
from easyllm.evaluate.task_config import TaskConfig, load_task, task_names
from easyllm.evaluate.task_items import choices_of, fill, read_items, references_of
from easyllm.evaluate.task_prompts import PromptForm, check_form, messages_of, plain_prompt
from easyllm.evaluate.task_report import compare, result_of, write_result, write_settings
from easyllm.evaluate.task_run import RESPONSES, TaskRunner, encode_pair

CHOICE = TaskConfig(
    name="colours",
    kind="choice",
    prompt="Q: {{question}}\nA:",
    metrics=("accuracy", "accuracy_norm", "ece"),
)
WRITTEN = TaskConfig(
    name="written",
    kind="generate",
    prompt="Q: {{question}}",
    metrics=("exact_match", "bleu"),
    max_tokens=6,
)
LIKELIHOOD = PromptForm(likelihood=True)


@pytest.fixture(scope="module")
def llm(tiny_model, tiny_tokenizer):
    return LLM(model=tiny_model, tokenizer=tiny_tokenizer)


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture
def questions(tmp_path):
    choices = ["fox", "dog world", "token"]
    rows = [{"question": f"which {n}?", "choices": choices, "answer": n % 3} for n in range(6)]
    return write(tmp_path / "questions.jsonl", rows)


def test_every_task_in_the_package_is_valid():
    names = {"gsm8k", "humaneval", "passkey", "wmt22-zh-en", "wikitext2"}
    assert names | {"xquad-en", "xquad-zh", "cmrc"} == {*task_names()}
    for name in task_names():
        task = load_task(name)
        assert task.metrics_for(likelihood=False)
        assert task.name == name


def test_a_task_is_a_file_of_yaml_or_json(tmp_path):
    values = {"kind": "generate", "prompt": "{{q}}", "metrics": ["f1"]}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(values))
    assert load_task(str(path)).name == "mine"
    path.write_text(json.dumps(values | {"prompts": 1}))
    with pytest.raises(ConfigError, match=r"prompts.*prompt"):
        load_task(str(path))
    with pytest.raises(SourceError, match="did you mean 'gsm8k'"):
        load_task("gsm8")


def test_fields_that_rows_lack_are_listed(questions):
    task = CHOICE.model_copy(update={"prompt": "{{questions}} {{context}} {{question}}"})
    with pytest.raises(DataError, match=r"lacks 'questions', 'context'.*question, choices, answer"):
        read_items(task, questions)


@pytest.mark.parametrize(
    ("kind", "metric"), [("generate", "accuracy"), ("choice", "bleu"), ("generate", "perplexity")]
)
def test_a_metric_that_does_not_fit_is_refused(kind, metric):
    task = TaskConfig(name="x", kind=kind, prompt="{{q}}", metrics=(metric,))
    with pytest.raises(ConfigError, match=f"{metric!r} does not fit task 'x' of kind {kind}"):
        task.metrics_for(likelihood=True)
    with pytest.raises(ConfigError, match="did you mean 'bleu'"):
        task.model_copy(update={"metrics": ("blue",)}).metrics_for(likelihood=True)


def test_thinking_and_likelihoods_exclude_each_other(llm):
    with pytest.raises(ConfigError, match="no response in which the model could think"):
        check_form(llm, CHOICE, PromptForm(likelihood=True, thinking=True))
    with pytest.raises(ConfigError, match="no switch for thinking"):
        check_form(llm, WRITTEN, PromptForm(chat=True, thinking=True))


def test_prompts_with_examples_as_turns_and_as_text(questions):
    items = read_items(CHOICE, questions)
    form = PromptForm(likelihood=False, chat=True)
    messages = messages_of(CHOICE, items[1], items[:1], form)
    assert [m["role"] for m in messages] == ["user", "assistant", "user"]
    assert messages[1]["content"] == "A"
    assert "B. dog world\n" in messages[2]["content"]
    plain = plain_prompt(CHOICE, items[1], items[:1], LIKELIHOOD)
    assert plain == "Q: which 0?\nA: fox\n\nQ: which 1?\nA:"


def test_values_of_fields_are_not_filled_again():
    assert fill("{{a}}-{{ b }}", {"a": "{{b}}", "b": 3}) == "{{b}}-3"


@pytest.mark.parametrize(("gold", "number"), [(1, 1), ("1", 1), ("B", 1), ("dog world", 1)])
def test_the_right_choice_is_a_number_a_letter_or_a_text(tmp_path, gold, number):
    row = {"question": "q", "choices": ["fox", "dog world"], "answer": gold}
    (item,) = read_items(CHOICE, write(tmp_path / "a.jsonl", [row]))
    assert choices_of(CHOICE, item)[1] == number


@pytest.mark.parametrize("gold", [2, "C", "cat", -1, True, None])
def test_a_right_choice_that_is_none_is_refused(tmp_path, gold):
    row = {"question": "q", "choices": ["fox", "dog world"], "answer": gold}
    with pytest.raises(DataError, match="which is not one of the choices"):
        read_items(CHOICE, write(tmp_path / "a.jsonl", [row]))


@pytest.mark.parametrize(
    ("choices", "words"),
    [([], "list of 2 to 26"), ("fox", "list of 2 to 26"), (["fox", " "], "has an empty choice")],
)
def test_choices_that_cannot_be_compared_are_refused_on_reading(tmp_path, choices, words):
    rows = [{"question": "q", "choices": ["a", "b"], "answer": 0}]
    rows += [{"question": "q", "choices": choices, "answer": 0}]
    with pytest.raises(DataError, match=f"a.jsonl:2.*{words}"):
        read_items(CHOICE, write(tmp_path / "a.jsonl", rows))


@pytest.mark.parametrize(("answer", "words"), [("none", "has no number"), ([], "no reference")])
def test_references_that_cannot_be_compared_are_refused_on_reading(tmp_path, answer, words):
    task = WRITTEN.model_copy(update={"extract": "number"})
    rows = [{"question": "q", "answer": "3"}, {"question": "q", "answer": answer}]
    with pytest.raises(DataError, match=f"a.jsonl:2.*{words}"):
        read_items(task, write(tmp_path / "a.jsonl", rows))


@pytest.mark.parametrize("prompt", ["{{ question | upper }}", "{{question", "Q: {% if x %}", "Q"])
def test_a_prompt_without_a_field_or_in_another_language_is_refused(prompt):
    with pytest.raises(ValueError, match=r"not a field|no field"):
        TaskConfig(name="t", kind="generate", prompt=prompt, metrics=("f1",))


@pytest.mark.parametrize("missing", ["context", "question"])
def test_squad_without_a_text_is_refused(tmp_path, missing):
    paragraph = {"context": "c", "qas": [{"id": "1", "question": "q", "answers": ["a"]}]}
    (paragraph if missing == "context" else paragraph["qas"][0])[missing] = None
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"data": [{"paragraphs": [paragraph]}]}))
    with pytest.raises(DataError, match="not in SQuAD's format"):
        read_items(load_task("xquad-en"), path)


def test_squad_and_both_formats_of_cmrc(tmp_path):
    answers = [{"text": "北京", "answer_start": 0}, {"text": "北京", "answer_start": 0}]
    qas = [{"id": "1", "question": "哪里？", "answers": answers}]
    squad = {"data": [{"paragraphs": [{"context": "北京……", "qas": qas}]}]}
    other = [
        {
            "context_text": "北京……",
            "qas": [{"query_id": "1", "query_text": "哪里？", "answers": ["北京", "北京市"]}],
        }
    ]
    task = load_task("cmrc")
    found = []
    for name, value in (("squad.json", squad), ("cmrc.json", other)):
        path = tmp_path / name
        path.write_text(json.dumps(value), "utf-8")
        (item,) = read_items(task, path)
        assert item.fields["question"] == "哪里？"
        found.append(references_of(task, item))
    assert found == [("北京",), ("北京", "北京市")]
    (tmp_path / "bad.json").write_text('{"data": [1]}')
    with pytest.raises(DataError, match="not in SQuAD's format"):
        read_items(task, tmp_path / "bad.json")


def test_lines_and_articles(tmp_path):
    source, right = tmp_path / "a.zh", tmp_path / "a.en"
    source.write_text("一\n二\n", "utf-8")
    right.write_text("one\ntwo\n")
    task = load_task("wmt22-zh-en")
    items = read_items(task, source, references=right)
    assert [references_of(task, item) for item in items] == [("one",), ("two",)]
    right.write_text("one\n")
    with pytest.raises(DataError, match=r"2 lines and .* 1"):
        read_items(task, source, references=right)
    with pytest.raises(DataError, match="add --references"):
        read_items(task, source)
    text = tmp_path / "wiki.txt"
    text.write_text(" \n = One = \n a\n = = Part = = \n b\n = Two = \n c\n")
    articles = read_items(load_task("wikitext2"), text)
    assert ["Part" in item.fields["text"] for item in articles] == [True, False]


def test_likelihoods_are_those_of_the_model(llm, questions):
    items = read_items(CHOICE, questions)
    run = TaskRunner(llm, "tiny", CHOICE, LIKELIHOOD, shots=items[:2]).run(items[2:])
    prompt = plain_prompt(CHOICE, items[2], items[:2], LIKELIHOOD)
    for choice, value in zip(
        ("fox", "dog world", "token"), run.outcomes[0].likelihoods, strict=True
    ):
        context, ids = encode_pair(llm, prompt, f" {choice}")
        assert value == pytest.approx(sum(llm.score([*context, *ids])[-len(ids) :]), abs=1e-4)
    result = result_of(run, CHOICE.metrics_for(likelihood=True))
    score = result["scores"][0]
    assert (score["name"], score["n"], score["shots"], score["unparsed"]) == ("accuracy", 4, 2, 0)
    assert score["low"] <= score["value"] <= score["high"]


def test_generated_letters_that_cannot_be_read_are_counted(llm, questions):
    items = read_items(CHOICE, questions)
    task = CHOICE.model_copy(update={"max_tokens": 4})
    run = TaskRunner(llm, "tiny", task, PromptForm(chat=True)).run(items)
    assert run.unparsed == sum(outcome.chosen is None for outcome in run.outcomes) > 0
    assert run.truncated == sum(each["finish"] == "length" for each in run.responses)
    assert run.settings["template_hash"]
    metrics = task.metrics_for(likelihood=False)
    assert [metric.name for metric in metrics] == ["accuracy"]


def test_a_killed_run_continues_and_gives_the_same_result(llm, tmp_path, monkeypatch, questions):
    rows = [{"question": f"word {n}", "answer": "the fox"} for n in range(5)]
    items = read_items(WRITTEN, write(tmp_path / "a.jsonl", rows))
    folder, metrics = tmp_path / "out", WRITTEN.metrics_for(likelihood=False)

    def runner(output):
        made = TaskRunner(llm, "tiny", WRITTEN, PromptForm(chat=True), output=output)
        if output is not None:
            write_settings(output, made.settings)
        return made

    whole = result_of(runner(None).run(items), metrics)
    add, left = ReplyCache.add, [2]

    def killed(self, key, reply):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        add(self, key, reply)

    with monkeypatch.context() as patch:
        patch.setattr(ReplyCache, "add", killed)
        with pytest.raises(KeyboardInterrupt):
            runner(folder).run(items)
    with (folder / RESPONSES).open("a") as file:
        file.write('{"key": "cut')
    asked = []
    original = llm.engine.run

    def counted(requests):
        asked.extend(requests)
        return original(asked)

    monkeypatch.setattr(llm.engine, "run", counted)
    run = runner(folder).run(items)
    assert len(asked) == 3
    assert result_of(run, metrics) == whole
    other = WRITTEN.model_copy(update={"max_tokens": 7})
    with pytest.raises(ConfigError, match=r"another evaluation: .*max_tokens"):
        TaskRunner(llm, "tiny", other, PromptForm(chat=True), output=folder)


def test_programs_are_run_with_their_tests(llm, tmp_path):
    task = load_task("humaneval")
    row = {
        "prompt": 'def f():\n    """Three."""\n',
        "test": "def check(f):\n    assert f() == 3",
        "entry_point": "f",
    }
    items = read_items(task, write(tmp_path / "a.jsonl", [row]))
    runner = TaskRunner(llm, "tiny", task, PromptForm())
    texts = ("    return 3\n", "```python\ndef f():\n    return 3\n```", "    return 4\n", "")
    found = [runner._outcome(items[0], {"final": text}).passed for text in texts]
    assert found == [True, True, False, False]


def test_two_runs_are_compared_item_by_item(llm, tmp_path, questions):
    items = read_items(CHOICE, questions)
    metrics = CHOICE.metrics_for(likelihood=True)

    def written(name, some, shots=()):
        run = TaskRunner(llm, "tiny", CHOICE, LIKELIHOOD, shots=shots).run(some)
        folder = tmp_path / name
        write_settings(folder, run.settings)
        write_result(folder, run, metrics, result_of(run, metrics))
        return folder

    first, second = written("a", items), written("b", items[::-1], items[:1])
    found = compare(first, second)
    assert [score["name"] for score in found["scores"]] == ["accuracy", "accuracy_norm", "ece"]
    assert found["scores"][0]["n"] == 6
    assert 0 < found["scores"][0]["p_value"] <= 1
    assert compare(first, first)["scores"][0]["difference"] == 0
    with pytest.raises(ConfigError, match="different items: 3 only in"):
        compare(first, written("c", items[3:]))
    with pytest.raises(DataError, match="not the folder of a finished evaluation"):
        compare(first, tmp_path)
