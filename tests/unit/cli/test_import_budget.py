"""What a command imports: nothing that belongs to servers, training or adapters it does not use."""

import subprocess
import sys

import pytest

UNUSED = (
    *("fastapi", "starlette", "uvicorn", "transformers", "peft", "datasets", "pandas", "scipy"),
    *("sympy", "triton", "torch._dynamo", "torch._inductor", "gguf", "sentencepiece", "rich"),
    *("huggingface_hub", "llguidance", "safetensors.torch"),
    *("easyllm.adapters", "easyllm.train", "easyllm.serve", "easyllm.plan.memory"),
    *("easyllm.quant.gptq", "easyllm.quant.awq", "easyllm.quant.calibrate"),
)
"""Modules that `easyllm generate` does not need, whatever else imports them."""


def imported(code, *arguments):
    """Returns which of the `UNUSED` modules a program imports."""
    code += f"\nimport sys\nprint([m for m in {UNUSED!r} if m in sys.modules])"
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
    assert imported(code, str(tiny_folder), *options) == "[]"
