"""Cost of guided decoding: streams with and without a guide, in turn; one JSON row.

Both sides generate the same number of tokens: JSON, or text of an expression, that cannot end
earlier. The time is that after the first token of the last stream, so compiling is not counted.
`cpu_ratio` counts the work of all threads, whatever else runs on the machine.

python bench/guided.py [--model smollm2] [--quantize int4] [--streams 32] [--tokens 32] [--record]
"""

import argparse
import statistics
import time

import machine
from paired import median_ratio

from easyllm.engine import LLM, Request, SamplingParams
from easyllm.engine.guide_spec import GuideSpec

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 2, "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "email": {"type": "string", "format": "email"},
        "kind": {"enum": ["customer", "employee", "其他"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "minItems": 3},
        "joined": {"type": "string", "format": "date"},
        "story": {"type": "string", "minLength": 2000},
    },
    "required": ["name", "age", "kind", "tags", "joined", "story"],
    "additionalProperties": False,
}
GUIDES = {
    "json_schema": GuideSpec(json_schema=PERSON),
    "regex": GuideSpec(regex=r"([A-Z][a-z]+ ?){300}"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--quantize", default="int4")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    llm = LLM(options.model, quantize=options.quantize, max_running=options.streams)
    results = [measure(llm, name, options) for name in GUIDES]
    row = machine.row(
        "guided",
        model=options.model,
        quantize=options.quantize,
        streams=options.streams,
        tokens=options.tokens,
        rounds=options.rounds,
        results=results,
    )
    machine.finish(row, "guided", record=options.record)


def measure(llm: LLM, name: str, options: argparse.Namespace) -> dict[str, object]:
    """Returns rates with and without a guide, and the medians of the ratios of their times."""
    start = time.perf_counter()
    llm.guides.compile(GUIDES[name])
    compile_s = time.perf_counter() - start
    times: dict[str, list[tuple[float, float]]] = {"plain": [], "guided": []}
    for number in range(options.rounds + 1):
        for side in ("plain", "guided") if number % 2 else ("guided", "plain"):
            guide = GUIDES[name] if side == "guided" else None
            took = decode_s(llm, guide, options.streams, options.tokens)
            if number:  # the first round warms up
                times[side].append(took)
    pairs = list(zip(times["guided"], times["plain"], strict=True))
    tokens = options.streams * (options.tokens - 1)
    rates = {side: tokens / statistics.median(t for t, _ in times[side]) for side in times}
    return {
        "guide": name,
        "compile_ms": round(compile_s * 1e3, 1),
        **{f"{side}_tokens_per_s": round(rate) for side, rate in rates.items()},
        "time_ratio": median_ratio([guided[0] / plain[0] for guided, plain in pairs]),
        "cpu_ratio": median_ratio([guided[1] / plain[1] for guided, plain in pairs]),
    }


def decode_s(llm: LLM, guide: GuideSpec | None, streams: int, tokens: int) -> tuple[float, float]:
    """Returns the seconds, and those of all threads, after the first token of the last stream."""
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    mask = None if guide is None else llm.guides.compile(guide)
    engine = llm.engine
    for number in range(streams):
        prompt = llm.encode(f"Person number {number}, as JSON:")
        engine.add(Request(prompt_ids=tuple(prompt), params=params, mask=mask))
    started = set[int]()
    while len(started) < streams:
        started |= {event.request_id for event in engine.step()}
    start, start_cpu = time.perf_counter(), time.process_time()
    while engine.busy:
        engine.step()
    return time.perf_counter() - start, time.process_time() - start_cpu


if __name__ == "__main__":
    main()
