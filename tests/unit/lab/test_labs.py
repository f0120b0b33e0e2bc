"""Labs: each runs in its quick form, and what is written and refused."""

import json
import xml.etree.ElementTree as ElementTree

import pytest

from easyllm.core.errors import ConfigError, OutputError, SourceError
from easyllm.lab import Lab, LabConfig, all_labs, find_lab, run_lab
from easyllm.lab import runner as runner_module
from easyllm.lab.lab import CHAPTERS
from easyllm_command import easyllm

LABS = [lab for lab in all_labs().values() if lab.nightly]


@pytest.mark.parametrize("lab", LABS, ids=lambda lab: lab.name)
def test_a_quick_run_writes_numbers_a_figure_and_a_page(lab, tmp_path):
    done = run_lab(lab, tmp_path / "out", quick=True, language="zh")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        *("numbers.json", "figure.svg", "figure.png", "index.html")
    }
    found = json.loads((tmp_path / "out/numbers.json").read_text())
    assert found["lab"] == lab.name
    assert found["numbers"] == {n.key: n.value for n in done.result.numbers}
    assert len(found["numbers"]) == len(done.result.numbers) > 0
    assert found["claims"]
    ElementTree.fromstring((tmp_path / "out/figure.svg").read_bytes())
    assert (tmp_path / "out/figure.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "out/index.html").read_text()
    assert lab.title.zh in page
    for number in done.result.numbers:
        assert number.label.en.strip()
        assert number.label.zh.strip()
    assert lab.chapter in CHAPTERS


def test_names_are_those_of_their_files():
    for lab in all_labs().values():
        assert lab.run.__module__.rpartition(".")[2] == lab.name.replace("-", "_")


def test_the_same_seed_gives_the_same_files(tmp_path):
    lab = find_lab("rope-distance")
    for name in ("a", "b"):
        run_lab(lab, tmp_path / name, quick=True)
    for file in ("numbers.json", "figure.svg", "figure.png", "index.html"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    run_lab(lab, tmp_path / "b", words=["theta=500000"], quick=True)  # replaces its own files
    assert json.loads((tmp_path / "b/numbers.json").read_text())["parameters"]["theta"] == 500000
    assert "theta=500000" in (tmp_path / "b/index.html").read_text()


def test_refusals(tmp_path, monkeypatch):
    lab = find_lab("rope-distance")
    with pytest.raises(SourceError, match=r"no lab 'rope-distence' \(did you mean 'rope-distance'"):
        find_lab("rope-distence")
    with pytest.raises(SourceError, match=r"is a chapter; name one of its labs: .*rope-distance"):
        find_lab("positions")
    for word, text in (("theta=0.5", "theta"), ("thetta=2", "did you mean 'theta'")):
        with pytest.raises(ConfigError, match=text):
            run_lab(lab, tmp_path / "out", words=[word])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds something else than lab rope-distance"):
        run_lab(lab, tmp_path / "mine", quick=True)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    monkeypatch.setattr(runner_module, "find_spec", lambda _: None)
    fields = {name: getattr(lab, name) for name in Lab.__slots__}
    needy = Lab(**{**fields, "module": ("pypdf", "rag"), "parameters": LabConfig})
    with pytest.raises(ConfigError, match=r"needs pypdf.*\.\[rag\]"):
        run_lab(needy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_lists_and_runs(tmp_path):
    listed = json.loads(easyllm("lab", "--json").stdout)
    assert {"name", "rows", "seconds"} == set(listed[0])
    assert len(listed) == len(all_labs())
    out = tmp_path / "out"
    done = easyllm("lab", "rope-distance", "--quick", f"output={out}", "--language", "zh")
    assert done.returncode == 0, done.stderr
    assert "复现" in done.stdout
    assert "参数：seed=0 " in done.stdout
    assert "约 1 秒" in done.stderr
    assert str(out / "index.html") in done.stdout
    assert easyllm("lab", "rope-distance", "--language", "fr").returncode == 2
