"""Rewards: plain functions of an answer, registered by name, several of them with weights.

    def my_reward(answer: Answer) -> float:
        return float(answer.text.strip() == answer.row["answer"])

A recipe names a built-in reward (`exact`), or a function of your own as `module:function` or
`path/to/file.py:function`; options are passed as keyword arguments.
"""

import importlib
import importlib.util
import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, get_type_hints

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
)

from easyllm.core.config import Config
from easyllm.core.errors import ConfigError, EasyllmError, suggest
from easyllm.core.json_types import JsonMapping, JsonObject
from easyllm.core.sandbox import run_sandboxed
from easyllm.prompt.extract import code_of, numbers, same_number

MAX_FAILURES = 3
"""Number of failures of reward functions after which a run stops."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer of the model, as reward functions see it.

    Attributes:
        prompt: the prompt, as text.
        text: the answer, without special tokens.
        num_tokens: number of tokens of the answer.
        truncated: whether it was cut off at the maximum length.
        row: the row of the prompt, with all its keys.
        prompt_ids, token_ids: the tokens of prompt and answer.
    """

    prompt: str
    text: str
    num_tokens: int
    truncated: bool
    row: JsonMapping
    prompt_ids: tuple[int, ...] = ()
    token_ids: tuple[int, ...] = ()


Take = Literal["all", "first_number", "last_number"]
"""What `exact` compares."""


def _compiled(pattern: str) -> str:
    try:
        re.compile(pattern, re.DOTALL)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"it is not a regular expression ({error}); correct it") from None
    return pattern


Pattern = Annotated[str, AfterValidator(_compiled)]
"""A regular expression, checked before the first answer."""
Reward = Callable[..., float]
"""Maps an `Answer`, and options as keyword arguments, to a number."""
REWARDS: dict[str, Reward] = {}
"""The rewards that a recipe may name without a module."""


def register_reward(name: str, function: Reward) -> None:
    """Makes a reward function available in recipes under a name.

    Raises:
        ValueError: the name is taken.
    """
    if name in REWARDS:
        raise ValueError(f"a reward called {name!r} is already registered")
    REWARDS[name] = function


class RewardFunctionConfig(Config):
    """A reward function, its weight and its options."""

    function: str = Field(
        description="Name of a built-in reward (exact, contains, format, length, digits, code), or "
        "a function of your own as `module:function` or `file.py:function`."
    )
    weight: float = Field(default=1.0, description="Factor of its value in the sum.")
    options: JsonObject = Field(
        default_factory=dict, description="Keyword arguments of the function."
    )

    @property
    def name(self) -> str:
        """The name in metrics: what comes after the colon."""
        return self.function.rpartition(":")[2]


class RewardError(EasyllmError):
    """Reward functions have failed too often."""


@dataclass(frozen=True, slots=True)
class Rewarded:
    """The rewards of answers.

    Attributes:
        totals: the weighted sum of each answer; 0 where a function failed.
        components: the values of each function, by its name; 0 where it failed.
        failed: whether a function failed for each answer.
        messages: a message for each failure.
    """

    totals: list[float]
    components: dict[str, list[float]]
    failed: list[bool]
    messages: list[str] = field(default_factory=list)


class RewardSum:
    """A weighted sum of reward functions.

    Args:
        configs: the functions and their weights.
        extra: further functions by name, with their weights (a reward model).

    Attributes:
        functions: each function with its weight, by name.
        keys: the keys of a row that built-in functions read, each with the function's name.

    Raises:
        ConfigError: a function does not exist, or does not have an option that is given.
    """

    def __init__(
        self,
        configs: Sequence[RewardFunctionConfig],
        extra: Mapping[str, tuple[Reward, float]] | None = None,
    ) -> None:
        self.functions: dict[str, tuple[Reward, float]] = {}
        for config in configs:
            name, number = config.name, 2
            while name in self.functions:
                name, number = f"{config.name}_{number}", number + 1
            self.functions[name] = (load_reward(config), config.weight)
        self.functions |= dict(extra or {})
        self.keys = dict(found for config in configs for found in _keys_read(config))

    def __call__(self, answers: Sequence[Answer]) -> Rewarded:
        """Returns the rewards of answers; a function that raises or returns NaN fails."""
        components: dict[str, list[float]] = {name: [] for name in self.functions}
        totals, failed, messages = [], [], list[str]()
        for answer in answers:
            total, has_failed = 0.0, False
            for name, (function, weight) in self.functions.items():
                value, message = _value(name, function, answer)
                components[name].append(value)
                total += weight * value
                has_failed |= message is not None
                messages += [] if message is None else [message]
            totals.append(0.0 if has_failed else total)
            failed.append(has_failed)
        return Rewarded(totals, components, failed, messages)


def load_reward(config: RewardFunctionConfig) -> Reward:
    """Returns the function that a configuration names, with its options.

    Raises:
        ConfigError: there is no such function or module, or it has no such option.
    """
    place, colon, name = config.function.rpartition(":")
    if not colon:
        found = REWARDS.get(name)
        if found is None:
            raise ConfigError(
                f"reward {name!r} is not known{suggest(name, REWARDS)}; built-in rewards are "
                f"{', '.join(REWARDS)}; or give module:function or file.py:function"
            )
    else:
        found = getattr(_module(place, config.function), name, None)
        if not callable(found):
            raise ConfigError(
                f"reward {config.function!r}: {place} has no function {name!r}; check the name"
            )
    _check_options(config, found)
    return partial(found, **config.options) if config.options else found


def _check_options(config: RewardFunctionConfig, function: Reward) -> None:
    """Checks what can be known of a function and its options before there is an answer.

    Raises:
        ConfigError: it has no such option, needs another, or (built-in) an option has a value that
            it cannot have.
    """
    signature = inspect.signature(function)
    parameters = signature.parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    names = list(parameters)[1:]
    unknown = [key for key in config.options if key not in names]
    if unknown and not takes_any:
        raise ConfigError(
            f"reward {config.function!r} has no option {unknown[0]!r}"
            f"{suggest(unknown[0], names)} (options: {', '.join(names) or 'none'})"
        )
    try:
        signature.bind(None, **config.options)
    except TypeError as error:
        raise ConfigError(
            f"reward {config.function!r} cannot be called with an answer and its options: {error}; "
            f"it is called as {config.name}(answer, **options)"
        ) from None
    if function not in _BUILT_IN.values():
        return  # annotations of other functions are their authors' affair
    types = get_type_hints(function, include_extras=True)
    for key, value in config.options.items():
        try:
            TypeAdapter(types[key]).validate_python(value)
        except ValidationError as error:
            raise ConfigError(
                f"reward {config.function!r}: option {key}={value!r}: "
                f"{error.errors()[0]['msg'].lower()}"
            ) from None


def _keys_read(config: RewardFunctionConfig) -> Iterator[tuple[str, str]]:
    """Yields the key of a row that a built-in function reads, with the function's name."""
    function = _BUILT_IN.get(config.function)
    options = config.options
    if function is None or (function is contains and options.get("text") is not None):
        return
    key = inspect.signature(function).parameters.get("key")
    if key is not None:
        yield str(options.get("key", key.default)), config.function


def _module(place: str, whole: str) -> object:
    """Imports a module by its name, or from a file."""
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        path = Path(place).expanduser()
        spec = importlib.util.spec_from_file_location(f"easyllm_rewards_{path.stem}", path)
        if spec is None or spec.loader is None or not path.is_file():
            raise ConfigError(f"reward {whole!r}: file {place!r} does not exist; check the path")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ConfigError:
        raise
    except ImportError as error:
        raise ConfigError(
            f"reward {whole!r}: module {place!r} cannot be imported ({error}); check its name, or "
            "give the path of a .py file"
        ) from None
    except Exception as error:  # the user's code runs, and may do anything
        raise ConfigError(
            f"reward {whole!r}: {place!r} cannot be imported, it raised {type(error).__name__}: "
            f"{error}; fix it"
        ) from None
    return module


def _value(name: str, function: Reward, answer: Answer) -> tuple[float, str | None]:
    """Returns a function's value, or 0 and a message if it fails."""
    try:
        value = float(function(answer))
    except Exception as error:
        reason = f"raised {type(error).__name__}: {error}"
    else:
        if math.isfinite(value):
            return value, None
        reason = f"returned {value}"
    quoted = answer.text if len(answer.text) <= 200 else answer.text[:200] + "…"
    return 0.0, f"reward {name!r} {reason} for prompt {answer.prompt!r}, answer {quoted!r}"


# ---- built-in rewards


def exact(answer: Answer, key: str = "answer", take: Take = "all") -> float:
    """1 if the answer equals the row's, else 0.

    Args:
        answer: the answer.
        key: key of the right answer in the row.
        take: what is compared: `all` of the text without surrounding spaces, or the `first_number`
            or the `last_number` in it.
    """
    text, right = answer.text.strip(), str(answer.row[key]).strip()
    if take == "all":
        return float(text == right)
    if len(numbers(right)) != 1:
        raise ValueError(f"the row's {key!r} is {right!r}, which is not a number")
    found = numbers(text)
    return float(bool(found) and same_number(found[0 if take == "first_number" else -1], right))


def contains(answer: Answer, text: str | None = None, key: str = "answer") -> float:
    """1 if the answer contains a text (by default the row's answer), else 0."""
    return float((str(answer.row[key]) if text is None else text) in answer.text)


def matches(answer: Answer, pattern: Pattern) -> float:
    """1 if the whole answer matches a regular expression (`.` matches line breaks), else 0."""
    return float(re.fullmatch(pattern, answer.text.strip(), re.DOTALL) is not None)


def length(
    answer: Answer,
    target: NonNegativeInt,
    tolerance: NonNegativeInt = 0,
    scale: PositiveFloat = 32.0,
) -> float:
    """0 within `tolerance` tokens of a target length, and -1 for each `scale` tokens beyond it."""
    return -max(0, abs(answer.num_tokens - target) - tolerance) / scale


def digits(answer: Answer) -> float:
    """The share of digits among the characters of the answer."""
    return sum(c.isdigit() for c in answer.text) / max(1, len(answer.text))


def right_digits(answer: Answer, key: str = "answer") -> float:
    """The share of digits of the row's answer that are right, counted from the last one."""
    right, found = str(answer.row[key]), answer.text.strip()
    if len(found) != len(right):
        return 0.0
    return sum(a == b for a, b in zip(right, found, strict=True)) / max(1, len(right))


def code(
    answer: Answer,
    key: str = "tests",
    timeout_s: PositiveFloat = 5.0,
    memory_mb: PositiveInt = 512,
) -> float:
    """1 if the Python code of the answer passes the row's tests, else 0.

    The code is the answer's last fenced block, or all of it; the tests are assertions that run
    after it, in a process of its own with limits (`core/sandbox`).
    """
    source = code_of(answer.text)
    tests = answer.row[key]
    lines = tests if isinstance(tests, str) else "\n".join(map(str, tests))
    done = run_sandboxed(f"{source}\n{lines}\n", timeout_s=timeout_s, memory_mb=memory_mb)
    return float(done.passed)


_BUILT_IN: dict[str, Reward] = {
    "exact": exact,
    "contains": contains,
    "format": matches,
    "length": length,
    "digits": digits,
    "right_digits": right_digits,
    "code": code,
}
for _name, _function in _BUILT_IN.items():
    register_reward(_name, _function)


__all__ = [
    "MAX_FAILURES",
    "REWARDS",
    "Answer",
    "Reward",
    "RewardError",
    "RewardFunctionConfig",
    "RewardSum",
    "Rewarded",
    "load_reward",
    "register_reward",
]
