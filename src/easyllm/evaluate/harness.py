"""lm-eval (the Language Model Evaluation Harness) with this project's engine.

`harness_model` is a model of lm-eval's in this process: likelihoods are computed with shared
prefixes (`continuations`), texts by the engine's continuous batching. A server is evaluated through
lm-eval's own client, `local-completions`.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from easyllm.core.errors import ConfigError, SourceError, install
from easyllm.core.json_types import JsonObject
from easyllm.core.progress import Progress
from easyllm.engine.completion import Completion
from easyllm.engine.params import MAX_STOPS, SamplingParams
from easyllm.engine.request import Request
from easyllm.evaluate.continuations import Continuation, score_continuations
from easyllm.evaluate.judge_client import JudgeClient, JudgeError

if TYPE_CHECKING:
    from lm_eval.api.model import LM as HarnessModel
    from lm_eval.tasks import TaskManager

    from easyllm.engine.llm import LLM

MAX_TOKENS = 256
"""Tokens of a response where the task does not say (as lm-eval's own models)."""
_IGNORED = ("do_sample", "until", "max_gen_toks", "max_tokens", "max_length")
_SAMPLED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
RESULT = "result.json"


class _Engine:
    """The methods by which lm-eval calls a model; its base class is imported with it."""

    llm: "LLM"
    cache_hook: Any

    @property
    def eot_token_id(self) -> int:
        tokenizer = self.llm.tokenizer
        found = tokenizer.eos_id if tokenizer.eos_id is not None else tokenizer.bos_id
        assert found is not None, "generating models have an EOS token"
        return found

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self.llm.tokenizer.bos_id is None else self.llm.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        return self.llm.tokenizer.fingerprint

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        first = self.llm.tokenizer.special.bos
        if add_special_tokens is None and first and string.startswith(first):
            string = string.removeprefix(first)  # a chat template has written it
        return self.llm.tokenizer.encode(string, special_tokens=add_special_tokens is not False)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        template = self.llm.tokenizer.chat_template
        return template.source if chat_template and template is not None else None

    def apply_chat_template(
        self, chat_history: list[JsonObject], add_generation_prompt: bool = True
    ) -> str:
        return self.llm.tokenizer.encode_chat(
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        ).text

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        pairs = [(tuple(context), tuple(ids)) for _, context, ids in requests]
        found: list[Continuation | None] = [None] * len(pairs)
        with Progress("likelihoods", total=len(pairs), unit="request") as progress:
            for number, result in score_continuations(self.llm.model, pairs):
                found[number] = result
                answer = (result.logprob, result.greedy)
                self.cache_hook.add_partial("loglikelihood", requests[number][0], answer)
                progress.advance()
        return [(each.logprob, each.greedy) for each in found if each is not None]

    def loglikelihood_rolling(self, requests: list[Any], **_: Any) -> list[float]:
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        longest = self.llm.model.config.max_seq_len - self.llm.model.num_virtual_tokens
        windows, owners = [], []
        for number, request in enumerate(requests):
            rolled = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=longest,
                context_len=1,
            )
            for context, ids in map(make_disjoint_window, rolled):
                windows.append((tuple(context), tuple(ids)))
                owners.append(number)
        sums = [0.0] * len(requests)
        for index, result in score_continuations(self.llm.model, windows):
            sums[owners[index]] += result.logprob
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: list[Any], **_: Any) -> list[str]:
        made, numbers = [], {}
        for number, request in enumerate(requests):
            context, options = request.args
            params = generation_params(options, max_len=self.llm.engine.max_seq_len)
            kept = self.llm.engine.max_seq_len - (params.max_tokens or 0)
            ids = self.tok_encode(context)[-kept:]
            own = Request(prompt_ids=tuple(ids), params=params)
            made.append(own)
            numbers[own.id] = number
        done = [Completion() for _ in requests]
        with Progress("generating", total=len(requests), unit="answer") as progress:
            for event in self.llm.engine.run(made):
                number = numbers[event.request_id]
                done[number].take(event)
                if event.finish_reason is not None:
                    args = requests[number].args
                    self.cache_hook.add_partial("generate_until", args, done[number].text)
                    progress.advance()
        return [each.text for each in done]


def harness_model(llm: "LLM") -> "HarnessModel":
    """Returns an lm-eval model (`lm_eval.api.model.LM`) that an engine computes.

    Example:
        >>> lm_eval.simple_evaluate(harness_model(LLM("smollm2")), tasks=["mine"])  # doctest: +SKIP

    Raises:
        ConfigError: lm-eval is not installed.
    """
    _lm_eval()
    from lm_eval.api.model import TemplateLM

    made = type("EasyllmLM", (_Engine, TemplateLM), {"llm": llm})
    model: HarnessModel = made()
    return model


def generation_params(options: JsonObject, *, max_len: int) -> SamplingParams:
    """Returns the sampling parameters of lm-eval's `generation_kwargs`.

    Raises:
        ConfigError: there is an option that the engine does not have.
    """
    unknown = [name for name in options if name not in (*_IGNORED, *_SAMPLED)]
    if unknown:
        raise ConfigError(
            f"the task sets {unknown[0]!r} in generation_kwargs, which is not supported; supported "
            f"are {', '.join((*_IGNORED, *_SAMPLED))}"
        )
    until = options.get("until") or []
    stops = tuple(s for s in ([until] if isinstance(until, str) else until) if s)
    if len(stops) > MAX_STOPS:
        raise ConfigError(f"the task has {len(stops)} stop strings; at most {MAX_STOPS} are served")
    values = {name: options[name] for name in _SAMPLED if name in options}
    if not options.get("do_sample", bool(values.get("temperature"))):
        values["temperature"] = 0.0
    wanted = int(options.get("max_gen_toks") or options.get("max_tokens") or MAX_TOKENS)
    return SamplingParams(stop=stops, max_tokens=min(wanted, max_len - 1), **values)


def check_lm_eval(tasks: Sequence[str], include: Path | None = None) -> "TaskManager":
    """Returns lm-eval's index of tasks, after a check that it has some.

    Args:
        tasks: names of tasks.
        include: folder with further task files.

    Raises:
        ConfigError: lm-eval is not installed.
        SourceError: it has no such task, or there is no such folder.
    """
    _lm_eval()
    from lm_eval.tasks import TaskManager

    if include is not None and not include.is_dir():
        state = "is a file" if include.exists() else "does not exist"
        raise SourceError(f"--include {str(include)!r} {state}; give a folder with task files")
    manager = TaskManager(include_path=None if include is None else str(include))
    for name in tasks:
        if name not in manager.all_tasks:
            raise SourceError(
                f"lm-eval has no task {name!r}; list them with lm-eval ls tasks, or give the folder"
                " of your own with --include"
            )
    return manager


def run_lm_eval(
    tasks: Sequence[str],
    *,
    llm: "LLM | None" = None,
    source: str = "",
    url: str = "",
    limit: int | None = None,
    shots: int | None = None,
    chat: bool = False,
    include: Path | None = None,
    output: Path | None = None,
) -> JsonObject:
    """Runs tasks of lm-eval, and returns their scores in the form of `easyllm eval`.

    Args:
        tasks: names of tasks of lm-eval, or of `include`.
        llm, source: the model in this process, and what the user calls it.
        url: the address of a server, instead of a model.
        limit: documents of each task.
        shots: examples; by default those of the task.
        chat: apply the model's chat template.
        include: folder with task files.
        output: folder of the result; responses are cached there, so that an interrupted run
            resumes.

    Raises:
        ConfigError: lm-eval is not installed.
        SourceError: it has no such task.
    """
    lm_eval, manager = _lm_eval(), check_lm_eval(tasks, include)
    values: dict[str, Any] = {"model": harness_model(llm)} if llm is not None else _client(url)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        values["use_cache"] = str(output / "responses")
    found = lm_eval.simple_evaluate(
        **values,
        tasks=list(tasks),
        task_manager=manager,
        limit=limit,
        num_fewshot=shots,
        apply_chat_template=chat,
        log_samples=output is not None,
    )
    result = _result(found, source or url)
    if output is not None:
        from easyllm.core.atomic import write_json

        write_json(output / RESULT, result)
    return result


def _client(url: str) -> dict[str, Any]:
    """Returns the arguments of lm-eval's client for a server of this project."""
    base = url.rstrip("/").removesuffix("/v1")
    model = _first_model(base)
    os.environ.setdefault("OPENAI_API_KEY", "none")  # the client asks for one
    arguments: dict[str, Any] = {
        "model": model,
        "base_url": f"{base}/v1/completions",
        "tokenizer_backend": "remote",
        "auth_token": os.environ["OPENAI_API_KEY"],  # of the tokenizer's routes
        "num_concurrent": 8,
        "batch_size": 8,
    }
    # lm-eval 0.4.13 takes a BOS token with id 0 for none (findings/lm_eval_bos_zero.sh)
    bos = _bos_id(base)
    if bos is not None:
        arguments["custom_prefix_token_id"] = bos
    return {"model": "local-completions", "model_args": arguments}


def _bos_id(base: str) -> int | None:
    """Returns the id of the server's BOS token, as lm-eval's client asks for it."""
    from lm_eval.utils import RemoteTokenizer

    found: int | None = RemoteTokenizer(base, auth_token=os.environ["OPENAI_API_KEY"]).bos_token_id
    return found


def _first_model(base: str) -> str:
    """Returns the name of the server's model; the API key is where lm-eval's client reads it."""
    try:
        return JudgeClient(base, key=os.environ.get("OPENAI_API_KEY")).first_model()
    except JudgeError as error:
        raise SourceError(
            f"the server {base!r} cannot be evaluated ({error}); check the address, and set "
            "OPENAI_API_KEY if it needs a key"
        ) from None


def _result(found: JsonObject, model: str) -> JsonObject:
    """Returns lm-eval's results as a list of scores."""
    scores = []
    for task, values in found["results"].items():
        count = found.get("n-samples", {}).get(task, {}).get("effective")
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, int | float) or not filtered:
                continue
            error = values.get(f"{metric}_stderr,{filtered}")
            known = isinstance(error, int | float) and math.isfinite(error)
            scores.append(
                {
                    "name": f"{task}/{metric}" + ("" if filtered == "none" else f",{filtered}"),
                    "value": value,
                    "standard_error": error if known else None,
                    "n": count,
                    "unparsed": None,
                    "truncated": None,
                    "shots": found.get("n-shot", {}).get(task),
                    "model": model,
                }
            )
    return {"task": f"lm-eval:{','.join(found['results'])}", "model": model, "scores": scores}


def _lm_eval() -> ModuleType:
    try:
        import lm_eval
    except ImportError:
        raise ConfigError(f"lm-eval is not installed; {install('lm-eval')}") from None
    found: ModuleType = lm_eval
    return found


__all__ = ["check_lm_eval", "generation_params", "harness_model", "run_lm_eval"]
