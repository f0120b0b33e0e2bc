"""The HTML report of a run: reading metrics, drawing, and inertness of any content."""

import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from easyllm.core.errors import SourceError
from easyllm.reporting import write_report
from easyllm.reporting.charts import decimate, number_text, running_mean, shown_range
from easyllm.reporting.history import History


def write_metrics(run, lines, mode="w"):
    with (run / "metrics.jsonl").open(mode, encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def steps(first, last):
    return [
        {"step": n, "train/loss_nats": 1 / n, "speed/tokens_per_s": 9.0} for n in range(first, last)
    ]


def test_only_new_lines_are_read_and_a_replaced_file_is_read_again(tmp_path):
    history = History(tmp_path / "metrics.jsonl")
    write_metrics(tmp_path, steps(1, 5))
    history.update()
    write_metrics(tmp_path, steps(5, 9), mode="a")
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 9, "train/lo')  # an incomplete line is left for later
    history.update()
    assert history.series("train/loss_nats")[0].tolist() == list(range(1, 9))
    (tmp_path / "metrics.jsonl").unlink()
    write_metrics(tmp_path, steps(1, 3))
    history.update()
    assert (history.last_step, len(history.series("train/loss_nats")[0])) == (2, 2)


def test_non_finite_values_and_broken_lines_are_ignored(tmp_path):
    write_metrics(tmp_path, [{"step": 1, "train/loss_nats": float("nan")}, *steps(2, 4)])
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write("{broken\n[1]\n")
    history = History(tmp_path / "metrics.jsonl")
    history.update()
    assert history.finite("train/loss_nats")[0].tolist() == [2, 3]
    write_report(tmp_path)


def test_a_column_keeps_its_lowest_and_highest_value():
    values = np.array([3.0, 9.0, 1.0, 4.0, 4.0, 5.0])
    columns = np.array([0, 0, 0, 0, 1, 1])
    kept = decimate(columns, values).tolist()
    assert {1, 2} <= set(kept)
    assert set(kept) <= set(range(6))


def test_the_running_mean_of_a_constant_is_the_constant():
    mean, width = running_mean(np.full(200, 2.5))
    assert width > 1
    assert np.allclose(mean, 2.5)


def test_a_single_outlier_does_not_set_the_range():
    values = np.concatenate([np.linspace(3, 2, 500), [1e6]])
    low, high = shown_range(values)
    assert low <= 2
    assert high < 1e3


@pytest.mark.parametrize(
    ("value", "text"), [(0.000012345, "1.23e-5"), (1384.0, "1384"), (0.5, "0.5")]
)
def test_numbers_are_formatted_compactly(value, text):
    assert number_text(value) == text


def test_text_of_a_run_is_escaped(tmp_path):
    evil = "<script>alert(1)</script>\x00"
    sample = {"prompt": evil, "text": f'"><img src=x onerror="{evil}'}
    write_metrics(
        tmp_path,
        [
            *steps(1, 5),
            {"step": 4, "samples": [sample]},
            {"step": 4, "event": evil, "detail": evil},
        ],
    )
    (tmp_path / "recipe.yaml").write_text(f"model: '{evil.strip(chr(0))}'\n", encoding="utf-8")
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert page.count("<script>") == 1
    assert "<img" not in page
    assert "script-src 'sha256-" in page
    for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        ElementTree.fromstring(svg)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(SourceError, match="give the folder of a training run"):
        write_report(tmp_path)


def test_the_page_says_what_is_unusual_and_escapes_it(tmp_path):
    write_metrics(tmp_path, steps(1, 4))
    finding = {
        "name": "entropy",
        "metric": "rl/entropy",
        "value": 0.012345,
        "usual": "0.2 to 2 times the first, <3>",
        "change": "lower the learning rate & look at samples",
    }
    found = {"findings": [finding], "checked": ["entropy"]}
    page = write_report(tmp_path, diagnose=lambda run: found if run == tmp_path else {})
    text = page.read_text(encoding="utf-8")
    assert "<h2>Diagnosis</h2>" in text
    assert "0.2 to 2 times the first, &lt;3&gt;" in text
    assert "lower the learning rate &amp; look at samples" in text
    found["findings"] = []
    assert "Nothing unusual in 1 check." in write_report(
        tmp_path, diagnose=lambda _: found
    ).read_text(encoding="utf-8")
    assert "Diagnosis" not in write_report(tmp_path).read_text(encoding="utf-8")


def test_a_run_without_metrics_is_not_examined(tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: smollm2\n", encoding="utf-8")
    write_report(tmp_path, diagnose=lambda _: 1 / 0)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("{kind: arithmetic, count: 8}", "on arithmetic"),
        ("{train: rows.jsonl}", "on rows.jsonl"),
        ("{train: [a.jsonl, b.jsonl]}", "on a.jsonl, b.jsonl"),
    ],
)
def test_the_page_says_what_a_run_learns_from(tmp_path, data, words):
    (tmp_path / "recipe.yaml").write_text(f"model: smollm2\ndata: {data}\n", encoding="utf-8")
    write_metrics(tmp_path, steps(1, 3))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert f"{words} " in re.sub(r"<[^>]*>", " ", page)
