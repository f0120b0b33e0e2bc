"""A server of llama.cpp in this process, with keys, values and activations in fp32."""

import json
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xllamacpp

CONTEXT = 512


class Peer:
    """A llama.cpp server."""

    def __init__(self, path: Path) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.port, params.warmup = CONTEXT, 1, 0, False
        params.verbosity = -1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.no_extra_bufts = True  # weights as stored in the file
        self.server = xllamacpp.Server(params)

    def ask(self, route: str, **body: Any) -> Any:
        request = urllib.request.Request(
            self.server.listening_address + route,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)

    def tokens(self, text: str, *, special: bool) -> list[int]:
        body = {"content": text, "add_special": special, "parse_special": True}
        found: list[int] = self.ask("/tokenize", **body)["tokens"]
        return found

    def candidates(self, ids: Sequence[int], count: int) -> list[dict[str, Any]]:
        """Returns the most likely tokens after `ids`: `{"id", "logprob"}`."""
        body = {"prompt": list(ids), "n_predict": 1, "n_probs": count, "cache_prompt": True}
        answer = self.ask("/completion", temperature=0, samplers=["top_k"], top_k=1, **body)
        found: list[dict[str, Any]] = answer["completion_probabilities"][0]["top_logprobs"]
        return found

    def greedy(self, ids: Sequence[int], count: int) -> list[dict[str, Any]]:
        """Returns the tokens after `ids`, each with its ten most likely candidates.

        Each is `{"id", "top_logprobs": [{"id", "logprob"}]}`.
        """
        options = {"temperature": 0, "samplers": ["top_k"], "top_k": 1, "ignore_eos": True}
        body = {"prompt": list(ids), "n_predict": count, "n_probs": 10, "cache_prompt": False}
        found: list[dict[str, Any]] = self.ask("/completion", **body, **options)[
            "completion_probabilities"
        ]
        return found


@contextmanager
def peer(path: Path) -> Iterator[Peer]:
    running = Peer(path)
    try:
        yield running
    finally:
        del running.server  # ends its threads


__all__ = ["CONTEXT", "Peer", "peer"]
