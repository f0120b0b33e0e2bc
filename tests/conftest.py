"""Shared fixtures, built once per session: a tiny random model, a real tokenizer, and SmolLM2."""

import os
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    # One worker for each core. OpenMP reads these when torch is imported; child processes too.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # no spinning where a test has two threads

import pytest
import torch

from tiny_models import CHATML, CORPUS, build_tiny

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("EASYLLM_WEIGHT_CACHE_GB", "0")  # tests of the cache turn it on
# Ray reads it once in a process, whose tests start several clusters
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
if not torch.cuda.is_available():
    # read when a kernel is defined: without a GPU, kernels run in Triton's interpreter
    os.environ["TRITON_INTERPRET"] = "1"


SLOW = (
    "laws/test_resume.py",
    "laws/test_guided_generation.py",
    "pipeline/test_training_runs.py",
    "unit/corpus/test_row_limits.py",
    "unit/test_extension_points.py",
    "laws/test_loss_decreases.py",
    "unit/tokenizer/test_template.py",
    "pipeline/test_recipes.py",
    "laws/test_random_schedules.py",
    "pipeline/test_corpus.py",
    "serve/test_replicas.py",
    "serve/test_page.py",
    "serve/test_page_tools.py",
    "serve/test_timeouts.py",
    "laws/test_speculative.py",
    "numerics/test_smollm2_generation.py",
)
"""Files that take longest, longest first: a worker that started one of them last would be the last
to finish."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """In a worker, puts the slow files first; the other files keep their order."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = Path(__file__).parent
        ranks = {folder / name: rank for rank, name in enumerate(SLOW)}
        items.sort(key=lambda item: ranks.get(item.path, len(SLOW)))


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.fixture
def two_threads():
    """Runs a test with two threads, for code that splits its work among threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_thread():
    """Runs a file's tests with one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def kernels():
    """Skips a test on a machine without a C compiler."""
    from easyllm.ops.kernels import build

    if build._library() is None:
        pytest.skip("no C compiler on this machine")


@pytest.fixture(params=["kernels", "plain"])
def kernels_or_plain(request, monkeypatch):
    """Runs a test with the C kernels (if there is a compiler) and without."""
    from easyllm.ops.kernels import build

    if request.param == "plain":
        monkeypatch.setattr(build, "_library", lambda: None)
    else:
        request.getfixturevalue("kernels")
    return request.param


@pytest.fixture
def memory_of_nan(monkeypatch):
    """Fills fresh memory with NaN, so that unwritten elements are detected."""
    real_empty, real_like = torch.empty, torch.empty_like

    def poisoned(make):
        def inner(*args, **kwargs):
            out = make(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return inner

    monkeypatch.setattr(torch, "empty", poisoned(real_empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(real_like))


@pytest.fixture
def families_restored():
    """Unregisters whatever a test has registered."""
    from easyllm.models.families import FAMILIES

    before = dict(FAMILIES)
    yield
    FAMILIES.clear()
    FAMILIES.update(before)


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A byte-level BPE tokenizer of 320 ids with ChatML's special tokens and template."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    from easyllm.tokenizer import SpecialTokens, Tokenizer

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    special = SpecialTokens(bos="<|im_start|>", eos="<|im_end|>", pad="<|endoftext|>")
    return Tokenizer(backend, special, chat_template=CHATML, max_seq_len=256)


@pytest.fixture(scope="session")
def tiny_model():
    return build_tiny()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, tiny_model, tiny_tokenizer) -> Path:
    """The tiny model as a Hugging Face folder."""
    from easyllm.models import save_model

    folder = tmp_path_factory.mktemp("tiny") / "model"
    return save_model(tiny_model, folder, tokenizer=tiny_tokenizer)


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct in fp32."""
    from easyllm.models import load_model

    return load_model("smollm2", dtype="float32")


@pytest.fixture(scope="session")
def smollm2_tokenizer():
    from easyllm.models import load_tokenizer

    return load_tokenizer("smollm2")


@pytest.fixture(scope="session")
def smollm2_folder(tmp_path_factory, smollm2, smollm2_tokenizer) -> Path:
    """SmolLM2 exported as a Hugging Face folder."""
    from easyllm.models import save_model

    folder = tmp_path_factory.mktemp("smollm2") / "model"
    return save_model(smollm2, folder, tokenizer=smollm2_tokenizer)


@pytest.fixture(scope="session")
def smollm2_reference(smollm2_folder):
    """Transformers' tokenizer of `smollm2_folder`."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_folder)
