"""lm-eval in process, through `easyllm serve`, and with transformers: equal scores.

The questions are made here with a fixed seed; nothing is downloaded.
"""

import json
import logging
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ |= {"HF_DATASETS_OFFLINE": "1", "TQDM_DISABLE": "1"}
os.environ["OPENAI_API_KEY"] = "sk-interop"  # `local-completions` reads its key from here only

import lm_eval
import yaml
from figures import Figures
from lm_eval.tasks import TaskManager
from local_server import KEY, serving

from easyllm.engine import LLM, SamplingParams
from easyllm.evaluate.harness import harness_model, run_lm_eval
from easyllm.models import save_model

MODEL = "smollm2"
COUNT = 40
NEW_TOKENS = 16
CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Japan": "Tokyo",
    "China": "Beijing",
    "Egypt": "Cairo",
    "Norway": "Oslo",
    "Austria": "Vienna",
    "Greece": "Athens",
    "Cuba": "Havana",
}
NUMERALS = "零一二三四五六七八九"
CHOICES = {
    "task": "questions",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "target_delimiter": " ",
    "metric_list": [{"metric": name, "aggregation": "mean"} for name in ("acc", "acc_norm")],
}
TEXTS = {
    "task": "texts",
    "output_type": "generate_until",
    "doc_to_text": "{{shots}}",
    "doc_to_target": "{{target}}",
    "generation_kwargs": {"until": ["\n", "."], "max_gen_toks": NEW_TOKENS, "temperature": 0},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean"}],
}
PPL = {
    "task": "rolling",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{question}} {{choices[answer]}}",
    "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
}


def main() -> int:
    logging.disable(logging.WARNING)
    figures = Figures("lm_eval", "datasets")
    with tempfile.TemporaryDirectory() as name:
        folder, docs = Path(name), questions()
        path = folder / "questions.jsonl"
        path.write_text("".join(json.dumps(doc, ensure_ascii=False) + "\n" for doc in docs))
        for task in (CHOICES, TEXTS, PPL):
            data = {"dataset_path": "json", "test_split": "test"}
            data |= {"dataset_kwargs": {"data_files": {"test": str(path)}}}
            (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(data | task))
        llm = LLM(MODEL)
        with serving(MODEL) as address:
            ways = {"one at a time": {}, "batches of 8": {"batch_size": 8}}
            ways["4 at once"] = {"num_concurrent": 4, "batch_size": 2}
            for way, options in ways.items():
                print(way)
                found = evaluated(address, folder, ["questions", "texts"], options)
                compare_choices(figures, found, docs, llm)
                compare_texts(figures, found, llm)
            print("rolling")
            rolling = evaluated(address, folder, ["rolling"], {})
            figures.run("rolling", lambda: compare_rolling(figures, rolling, docs, llm))
            tasks = ["questions", "texts", "rolling"]
            own = simple(harness_model(llm), folder, tasks)
            served = {"questions": found, "texts": found, "rolling": rolling}
            print("in process and through the server")
            for task in tasks:
                compare_ways(figures, task, own, served[task])
            scores = run_lm_eval(tasks, url=address, include=folder)["scores"]
            accuracy = own["results"]["questions"]["acc,none"]
            named = {each["name"]: each["value"] for each in scores}
            figures.equal("score of easyllm eval", named["questions/acc"], accuracy)
        print("in process and with transformers")
        save_model(llm.model, folder / "model", tokenizer=llm.tokenizer)
        options = {"pretrained": str(folder / "model"), "dtype": "float32", "device": "cpu"}
        theirs = simple("hf", folder, tasks, model_args=options, batch_size=4)
        for task in tasks:
            compare_ways(figures, task, own, theirs)
    return figures.end()


def questions() -> list[dict[str, Any]]:
    """Returns questions about capitals, sums and Chinese numerals.

    Each has four choices, and examples (`shots`) after which the answer can be generated.
    """
    rng, docs = random.Random(20), list[dict[str, Any]]()
    for number in range(COUNT):
        if number % 3 == 0:
            country = rng.choice(sorted(CAPITALS))
            right, wrong = CAPITALS[country], [v for k, v in CAPITALS.items() if k != country]
            text = f"Question: What is the capital of {country}?\nAnswer:"
            shots = f"Germany: Berlin\nPoland: Warsaw\n{country}:"
        elif number % 3 == 1:
            a, b = rng.randrange(2, 60), rng.randrange(2, 60)
            right, text = str(a + b), f"{a} + {b} ="
            shots = f"1 + 2 = 3\n20 + 5 = 25\n{text}"
            wrong = [str(a + b + d) for d in (-11, -10, -2, -1, 1, 2, 9, 10)]
        else:
            a = rng.randrange(2, 10)
            right, text = str(a), f"问：{NUMERALS[a]}是几？答："
            wrong = [str(other) for other in range(1, 10) if other != a]
            shots = f"五: 5\n三: 3\n{NUMERALS[a]}:"
        choices = [right, *rng.sample(wrong, 3)]
        rng.shuffle(choices)
        answer = choices.index(right)
        docs.append(
            {
                "question": text,
                "choices": choices,
                "answer": answer,
                "shots": shots,
                "target": f" {right}",
            }
        )
    return docs


def evaluated(
    address: str, folder: Path, tasks: Sequence[str], options: dict[str, Any]
) -> dict[str, Any]:
    arguments = {
        "model": MODEL,
        "base_url": f"{address}/v1/completions",
        "tokenizer_backend": "remote",
        "auth_token": KEY,
        **options,
    }
    return simple("local-completions", folder, tasks, model_args=arguments)


def simple(model: Any, folder: Path, tasks: Sequence[str], **options: Any) -> dict[str, Any]:
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=list(tasks),
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
        **options,
    )
    assert found is not None
    return found


def compare_ways(
    figures: Figures, task: str, first: dict[str, Any], second: dict[str, Any]
) -> None:
    """Compares the responses and the scores of a task evaluated in two ways."""
    ways = [sorted(each["samples"][task], key=lambda s: s["doc_id"]) for each in (first, second)]
    responses = [[sample["filtered_resps"] for sample in samples] for samples in ways]
    if task == "texts":
        figures.equal(f"{task}: responses", *responses)
    else:
        flat = [[numbers(each) for each in way] for way in responses]
        gaps = [
            abs(a - b)
            for one, two in zip(*flat, strict=True)
            for a, b in zip(one, two, strict=True)
        ]
        figures.at_most(
            f"{task}: log-probability (nats)", max(gaps), 1e-4 if task != "rolling" else 1e-3
        )
    for name, value in first["results"][task].items():
        if isinstance(value, float) and "stderr" not in name:
            gap = abs(value - second["results"][task][name]) / max(1.0, abs(value))
            figures.at_most(f"{task}: {name}", gap, 1e-4)


def numbers(responses: Sequence[Any]) -> list[float]:
    """Returns the log-probabilities of a document: of each choice, or of the text."""
    return [float(r[0]) if isinstance(r, list | tuple) else float(r) for r in responses]


def compare_choices(
    figures: Figures, found: dict[str, Any], docs: Sequence[dict[str, Any]], llm: LLM
) -> None:
    """Compares log-probabilities of the choices, whether they are greedy, and the accuracies."""
    worst, greedy_agrees, right, right_norm = 0.0, True, 0, 0
    samples = sorted(found["samples"]["questions"], key=lambda each: each["doc_id"])
    for sample, doc in zip(samples, docs, strict=True):
        own = [scored(llm, doc["question"], f" {choice}") for choice in doc["choices"]]
        for response, (value, greedy) in zip(sample["filtered_resps"], own, strict=True):
            worst = max(worst, abs(float(response[0]) - value))
            greedy_agrees &= str(response[1]) == str(greedy)
        sums = [value for value, _ in own]
        lengths = [len(choice) for choice in doc["choices"]]
        right += best(sums) == doc["answer"]
        norm = [value / length for value, length in zip(sums, lengths, strict=True)]
        right_norm += best(norm) == doc["answer"]
    figures.at_most("log-probability of a choice (nats)", worst, 1e-3)
    figures.true("greedy or not", greedy_agrees)
    results = found["results"]["questions"]
    figures.equal("acc", results["acc,none"], right / len(docs))
    figures.equal("acc_norm", results["acc_norm,none"], right_norm / len(docs))


def best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def scored(llm: LLM, context: str, choice: str) -> tuple[float, bool]:
    """Returns the log-probability of a choice, and whether each of its tokens is the likeliest."""
    ids, start = encoded(llm, context + choice), len(encoded(llm, context))
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1)
    (answer,) = llm.generate([ids], params)
    assert answer.prompt_logprobs is not None
    places = answer.prompt_logprobs[start - 1 :]
    greedy = all(place.raw == max(value for _, value in place.top_raw) for place in places)
    return sum(llm.score(ids)[start - 1 :]), greedy


def encoded(llm: LLM, text: str) -> tuple[int, ...]:
    return tuple(llm.tokenizer.encode(text, special_tokens=False))


def compare_texts(figures: Figures, found: dict[str, Any], llm: LLM) -> None:
    """Compares the generated texts and their accuracy."""
    samples = sorted(found["samples"]["texts"], key=lambda each: each["doc_id"])
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, stop=("\n", "."))
    prompts = [encoded(llm, sample["doc"]["shots"]) for sample in samples]
    texts = [llm.generate([prompt], params)[0].text for prompt in prompts]
    figures.equal("generated texts", [s["filtered_resps"][0] for s in samples], texts)
    right = [text == sample["target"] for text, sample in zip(texts, samples, strict=True)]
    figures.true("some are right, not all", 0 < sum(right) < len(right), repr(texts[:3]))
    accuracy = found["results"]["texts"]["exact_match,none"]
    figures.equal("exact_match", accuracy, sum(right) / len(right))


def compare_rolling(
    figures: Figures, found: dict[str, Any], docs: Sequence[dict[str, Any]], llm: LLM
) -> None:
    """Compares the log-probabilities of whole texts after BOS."""
    bos = encoded(llm, llm.tokenizer.special.bos or llm.tokenizer.special.eos or "")[0]
    samples = sorted(found["samples"]["rolling"], key=lambda each: each["doc_id"])
    worst = max(
        abs(
            float(sample["filtered_resps"][0])
            - sum(
                llm.score(
                    (bos, *encoded(llm, f"{doc['question']} {doc['choices'][doc['answer']]}"))
                )
            )
        )
        for sample, doc in zip(samples, docs, strict=True)
    )
    figures.at_most("log-probability of a text (nats)", worst, 1e-3)


if __name__ == "__main__":
    sys.exit(main())
