"""What commands import: nothing of servers, training, adapters or guides that they do not use."""

import subprocess
import sys

import pytest

SERVERS = ("fastapi", "starlette", "uvicorn", "easyllm.serve")
UNUSED = (
    *("transformers", "peft", "datasets", "pandas", "scipy", "sympy", "triton", "rich"),
    *("torch._dynamo", "torch._inductor", "gguf", "sentencepiece", "huggingface_hub"),
    *("llguidance", "safetensors.torch", "httpx", "jsonschema"),
    *("easyllm.adapters", "easyllm.train", "easyllm.plan.memory"),
    *("easyllm.quant.gptq", "easyllm.quant.awq", "easyllm.quant.calibrate"),
)
"""Modules that are not needed to generate text, whatever else imports them."""


def imported(modules, code, *arguments):
    """Returns which of the modules a program imports."""
    code += f"\nimport sys\nprint([m for m in {modules!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("options", [[], ["--quantize", "int4"]], ids=["full", "int4"])
def test_generating_imports_nothing_that_it_does_not_need(tiny_folder, options):
    code = (
        "import sys; from easyllm.cli.main import main\n"
        "sys.argv = ['easyllm', 'generate', *sys.argv[1:], 'Hi', '--max-tokens', '2']\n"
        "try: main()\nexcept SystemExit as error: assert not error.code"
    )
    assert imported((*SERVERS, *UNUSED), code, str(tiny_folder), *options) == "[]"


def test_a_server_imports_nothing_that_it_does_not_need():
    unused = ("fastapi", "opentelemetry", *UNUSED)  # FastAPI describes the routes if asked to
    assert imported(unused, "import easyllm.cli.serve, easyllm.serve.run") == "[]"


def test_a_plan_of_a_published_size_imports_nothing_that_reads_files_of_a_model():
    unused = ("tokenizers", "jinja2", "easyllm.tokenizer", "easyllm.models.load")
    code = (
        "import sys; from easyllm.cli.main import main\n"
        "sys.argv = ['easyllm', 'plan', 'llama2-70b', '--train', '--gpus', '64xA100-80GB']\n"
        "try: main()\nexcept SystemExit as error: assert not error.code"
    )
    assert imported((*SERVERS, *unused, "easyllm.train"), code) == "[]"
