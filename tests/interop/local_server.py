"""`easyllm serve` in a separate process, and the smallest client for it."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from easyllm.models import save_model
from easyllm.models.families import family_of
from easyllm.nn import Decoder
from easyllm.tokenizer import SpecialTokens, Tokenizer

KEY = "sk-interop"
SMOLLM2 = ("smollm2", "--quantize", "int4")
"""Arguments of `serving` for the default model, at its fastest."""
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ "
    "'<|im_start|>assistant\\n' }}{% endif %}"
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "你好，世界 hello world",
    "user assistant",
] * 4
START_S = 120


def save_tiny(folder: Path, *, context: int = 256) -> Path:
    """Saves a random model with a tokenizer and ChatML's template."""
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
    tokenizer = Tokenizer(backend, special, chat_template=TEMPLATE, max_seq_len=context)
    config = {
        "model_type": "llama",
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": context,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    model = Decoder(family_of("llama").read_config(config))
    model.reset_parameters(std=0.3, generator=torch.Generator().manual_seed(0))
    return save_model(model.requires_grad_(False).eval(), folder, tokenizer=tokenizer)


@contextmanager
def serving(*arguments: str, key: str | None = KEY) -> Iterator[str]:
    """Yields the address of `easyllm serve` on a free port; stops it by SIGTERM at the end.

    Args:
        arguments: models and options of the command.
        key: the API key; None for none.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "easyllm", "serve", *arguments, "--port", str(port)]
    command += ["--api-key", key] if key is not None else []
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=environ, stdout=log, stderr=log)
        try:
            address = f"http://127.0.0.1:{port}"
            _wait_for(f"{address}/health", process)
            yield address
        except BaseException:
            log.seek(0)
            print(log.read().decode(errors="replace")[-2000:], file=sys.stderr)
            raise
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()


def post(url: str, body: object) -> tuple[int, Any]:
    """Returns the status and the JSON of an answer to a JSON body, whatever its status."""
    data = json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    request = urllib.request.Request(url, data=data, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"the server did not start (exit status {process.poll()})")


__all__ = ["KEY", "SMOLLM2", "post", "save_tiny", "serving"]
