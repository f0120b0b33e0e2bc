"""Our HTTP server, llama.cpp's, and our engine without HTTP under the same load: a JSON row.

    python bench/serve.py --peer PYTHON [--gguf FILE] [--clients 32] [--requests 96] [--record]

`--peer` is an interpreter that has `xllamacpp`. SmolLM2: ours in int4 (quantized while loading),
llama.cpp's from a Q4_0 file of the same weights. Clients wait for their answers (closed loop); each
request is a chat of 128 prompt tokens, template included, and generates exactly 64, because EOS is
ignored. The three are measured in turn, after a warm-up in each round, on the same prompts, which
no other round has. Reported are the whole generated tokens per second, the medians of the ratios of
each round with their range, and the processor times of the load generator, which shares the cores
with the servers, and of each process per 1,000 generated tokens, warm-up included. These include
the spinning of OpenMP's threads, unless OMP_WAIT_POLICY=passive is set.
"""

import argparse
import contextlib
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import machine
from paired import Worker, answer_questions, median_ratio

ROOT = Path(__file__).parents[1]
NAMES = ("ours", "peer", "engine")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", help="interpreter with xllamacpp")
    parser.add_argument("--only", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--worker", choices=["engine", "peer"], help=argparse.SUPPRESS)
    parser.add_argument("--gguf", type=Path, help="a Q4_0 file of SmolLM2; else one is written")
    options = parser.parse_args()
    if options.worker == "engine":
        engine_worker(options)
    elif options.worker == "peer":
        peer_worker(options)
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    """Measures the three in turn and prints the row."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in options.only}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        sides = {name: stack.enter_context(side(name, options, folder)) for name in options.only}
        for number in range(options.rounds):
            texts = prompts(options, number)
            order = list(sides) if number % 2 else list(sides)[::-1]
            for name in order:
                measure = sides[name]
                found[name].append(measure(texts))
                print(name, json.dumps(found[name][-1]), file=sys.stderr, flush=True)
    row = machine.row(
        "serve",
        **{
            key: getattr(options, key)
            for key in ("clients", "requests", "prompt_tokens", "max_tokens", "threads", "rounds")
        },
        tokens_per_s={name: median(runs, "tokens_per_s") for name, runs in found.items()},
        **ratios(found),
        runs=found,
    )
    machine.finish(row, "serve", record=options.record)


def ratios(found: dict[str, list[dict[str, Any]]]) -> dict[str, list[float]]:
    """Returns the median and range over the rounds of our rate over that of the others."""
    return {
        f"ratio_to_{other}": median_ratio(
            [
                a["tokens_per_s"] / b["tokens_per_s"]
                for a, b in zip(found["ours"], found[other], strict=True)
            ]
        )
        for other in ("peer", "engine")
        if "ours" in found and other in found
    }


def median(runs: list[dict[str, Any]], key: str) -> float:
    return round(statistics.median(run[key] for run in runs), 1)


@contextlib.contextmanager
def side(name: str, options: argparse.Namespace, folder: str) -> Iterator[Any]:
    """Yields a function that measures one of the three on some texts."""
    environment = {"OMP_NUM_THREADS": str(options.threads)}
    if name == "engine":
        worker = Worker(worker_command(sys.executable, "engine", options), ROOT, environment)
        try:
            yield lambda texts: worker.ask(texts)
        finally:
            worker.close()
        return
    if name == "ours":
        port = free_port()
        words = ["-m", "easyllm", "serve", "smollm2", "--quantize", "int4", "--port", str(port)]
        command, address = [sys.executable, *words], f"http://127.0.0.1:{port}"
    else:
        path = options.gguf or Path(folder) / "q4_0.gguf"
        if not path.exists():
            write_gguf(path)
        command = [*worker_command(options.peer, "peer", options), "--gguf", str(path)]
        address = ""
    log = Path(folder) / f"{name}.log"  # a line for each request
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=log.open("w"),
        env={**os.environ, **environment},
        text=True,
    )
    try:
        if not address:
            assert process.stdout is not None, "opened as a pipe"
            address = process.stdout.readline().strip()
        if not address or not healthy(address, process):
            raise SystemExit(f"the server {name} does not start:\n{log.read_text()[-2000:]}")

        def measure(texts: list[str]) -> dict[str, Any]:
            before = cpu_s(process.pid)
            found = load(address, texts, options)
            return found | {"cpu_s_per_1000": per_1000(cpu_s(process.pid) - before, options)}

        yield measure
    finally:
        process.terminate()
        process.wait()


def cpu_s(pid: int) -> float:
    """Returns the processor time of a process in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def per_1000(seconds: float, options: argparse.Namespace) -> float:
    """Returns seconds per 1,000 tokens of the warm-up and the measured requests."""
    tokens = (options.clients + options.requests) * options.max_tokens
    return round(seconds / tokens * 1000, 2)


def worker_command(python: str, kind: str, options: argparse.Namespace) -> list[str]:
    names = ("clients", "requests", "prompt_tokens", "max_tokens", "threads")
    words = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in names]
    return [python, __file__, "--worker", kind, *words]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def healthy(address: str, process: "subprocess.Popen[str]") -> bool:
    """Waits until a server answers `/health`; returns whether it does within two minutes."""
    import httpx

    for _ in range(1200):
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{address}/health").status_code == 200:
                return True
        if process.poll() is not None:
            return False
        time.sleep(0.1)
    return False


def write_gguf(path: Path) -> None:
    """Writes SmolLM2 in blocks of Q4_0."""
    from easyllm.models import load_model, load_tokenizer
    from easyllm.models.gguf_export import save_gguf

    model, tokenizer = load_model("smollm2", dtype="float32"), load_tokenizer("smollm2")
    save_gguf(model, path, type="q4_0", tokenizer=tokenizer)


def prompts(options: argparse.Namespace, seed: int) -> list[str]:
    """Returns texts of the wanted length for a warm-up and the measured requests of a round."""
    from easyllm.models import load_tokenizer
    from easyllm.serve.load_prompts import WORDS, RandomPrompts

    tokenizer = load_tokenizer("smollm2")
    words = [word for word in WORDS if len(tokenizer.encode(f" {word}")) == 1]

    def texts(count: int) -> Iterator[str]:
        for prompt in RandomPrompts(words, count, "completions", seed):
            yield prompt["prompt"]

    def length(text: str) -> int:
        return len(tokenizer.encode_chat([user(text)], add_generation_prompt=True).token_ids)

    count = options.prompt_tokens - length(next(texts(1))) + 1
    number = 1 + options.clients + options.requests  # a probe, the warm-up, and the measured ones
    found = list(itertools.islice(texts(count), number))
    assert {length(text) for text in found} == {options.prompt_tokens}, "words are single tokens"
    return found


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def load(address: str, texts: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Measures a server."""
    import asyncio

    from easyllm.serve.load_options import LoadOptions
    from easyllm.serve.load_prompts import as_field
    from easyllm.serve.load_test import LoadTest

    settings = LoadOptions(
        concurrency=(options.clients,),
        requests=options.requests,
        max_tokens=options.max_tokens,
        ignore_eos=True,
    )
    fields = iter([as_field(text, "chat") for text in texts])
    test = LoadTest(address, settings, prompts=fields)
    asyncio.run(test.run())
    (run,) = test.report()["runs"]
    assert not run["errors"], run["errors"]
    assert run["output_tokens"]["min"] == run["output_tokens"]["max"] == options.max_tokens
    assert run["prompt_tokens"]["min"] == run["prompt_tokens"]["max"] == options.prompt_tokens
    return {
        "tokens_per_s": round(run["output_tokens_per_s"], 1),
        "cached_tokens": run["cached_tokens"],
        "client_cpu_share": round(run["client_cpu_share"], 3),
        "chunks_per_token": round(run["chunks_per_output_token"], 3),
        **{
            name: {quantile: round(value, 4) for quantile, value in run[name].items()}
            for name in ("first_token_s", "inter_token_s", "latency_s")
        },
    }


def engine_worker(options: argparse.Namespace) -> None:
    """Answers lists of texts with the rate of the engine, without HTTP."""
    from easyllm.engine import LLM, Request, SamplingParams

    llm = LLM("smollm2", quantize="int4")
    params = SamplingParams(temperature=0.0, max_tokens=options.max_tokens, ignore_eos=True)

    def generate(texts: list[str]) -> tuple[int, float]:
        """Returns the number of tokens and the seconds, with as many requests open as clients."""
        start, tokens, running = time.perf_counter(), 0, 0
        waiting = iter(texts)
        while True:
            for text in itertools.islice(waiting, options.clients - running):
                ids = llm.encode_chat([user(text)])
                llm.engine.add(Request(prompt_ids=tuple(ids), params=params))
                running += 1
            if not running:
                return tokens, time.perf_counter() - start
            for event in llm.engine.step():
                tokens += event.token_id is not None
                running -= event.finish_reason is not None

    def answer(texts: list[str]) -> dict[str, Any]:
        before = time.process_time()
        generate(texts[1 : 1 + options.clients])
        tokens, seconds = generate(texts[1 + options.clients :])
        assert tokens == options.requests * options.max_tokens, "EOS is ignored"
        spent = per_1000(time.process_time() - before, options)
        return {"tokens_per_s": round(tokens / seconds, 1), "cpu_s_per_1000": spent}

    answer_questions(answer)


def peer_worker(options: argparse.Namespace) -> None:
    """Runs llama.cpp's server, prints its address, and waits to be terminated."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(options.gguf)
    params.n_parallel = options.clients
    params.n_ctx = options.clients * (options.prompt_tokens + options.max_tokens + 64)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
    params.cache_ram_mib, params.verbosity = 0, -1
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    main()
