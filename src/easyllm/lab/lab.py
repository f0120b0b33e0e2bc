"""What a lab is: its topic, its parameters, and the numbers and the figure that it returns.

A lab is one file in `lab/labs` with a value `LAB`; it calls public functions of the library, and
holds nothing that they do. To add one:

    class Parameters(LabConfig):
        quick_values: ClassVar[JsonObject] = {"steps": 5}
        steps: PositiveInt = Field(default=200, description="Training steps.")

    def run(parameters: Parameters) -> Result: ...

    LAB = Lab(name="my-topic", rows=(12,), chapter="positions", title=Text("…", "…"), ...)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt

from easyllm.core.config import Config
from easyllm.core.json_types import JsonObject

Language = Literal["en", "zh"]
Outcome = Literal["reproduced", "direction", "not"]
"""How a result compares with a claim: the same number, the same direction, or neither."""
CHAPTERS = (
    *("survey", "tokens", "attention", "positions", "costs", "models", "training", "prompts"),
    *("inference", "quantization", "data", "alignment"),
)
"""The chapters in their order."""
NUMBERS = "numbers.json"
"""The file of a lab's numbers in the folder of its run."""


@dataclass(frozen=True, slots=True)
class Text:
    """A text in English and in Chinese."""

    en: str
    zh: str

    def of(self, language: Language) -> str:
        """Returns the text in one language."""
        return self.en if language == "en" else self.zh


class LabConfig(Config):
    """Base class of the parameters of a lab."""

    quick_values: ClassVar[Mapping[str, Any]] = {}
    """The parameters of `--quick`: a run of a few seconds that shows that the lab works."""

    seed: NonNegativeInt = Field(
        default=0, description="Seed of all random numbers; the same seed gives the same figure."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    """A number that a lab measured or computed.

    Attributes:
        key: its name in `numbers.json`.
        value: the number; None where there is none (a loss that is not finite).
        label: what it is, with its unit.
        digits: significant digits shown on pages; None for whole numbers.
    """

    key: str
    value: float | int | None
    label: Text
    digits: int | None = 4

    def shown(self) -> str:
        """Returns the number as pages show it."""
        if self.value is None:
            return "-"
        if self.digits is None or isinstance(self.value, int):
            return f"{self.value:,.0f}"
        return f"{self.value:.{self.digits}g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lines:
    """A line chart.

    Attributes:
        title, x, y: texts of the figure, in English (figures have no other language).
        lines: points (x, y) of each line by its name.
        log_x, log_y: whether an axis is logarithmic.
        marks: whether each point is marked.
    """

    title: str
    x: str
    y: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    log_x: bool = False
    log_y: bool = False
    marks: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Bars:
    """A bar chart: groups of bars, one bar of each series in a group.

    Attributes:
        title, x, y: texts of the figure, in English.
        groups: the names of the groups.
        series: the values of each series by its name, one for each group.
        log_y: whether the value axis is logarithmic.
    """

    title: str
    x: str
    y: str
    groups: Sequence[str]
    series: Mapping[str, Sequence[float]]
    log_y: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """A matrix as colours.

    Attributes:
        title, x, y: texts of the figure, in English.
        values: the rows of the matrix.
        x_labels, y_labels: names of columns and rows; numbers if they are not given.
    """

    title: str
    x: str
    y: str
    values: Sequence[Sequence[float]]
    x_labels: Sequence[str] = ()
    y_labels: Sequence[str] = ()


Figure = Lines | Bars | Grid


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What an article or paper says, and what was seen.

    Attributes:
        claim: the statement, with its source.
        seen: what this run shows.
        outcome: how the two compare.
        reason: why they differ, where they do.
    """

    claim: Text
    seen: Text
    outcome: Outcome
    reason: Text | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a lab returns.

    Attributes:
        numbers: the numbers in the order of the page.
        figures: one figure, or several that stand next to each other.
        claims: what the article says and what was seen.
        series: other values for `numbers.json`, such as curves.
    """

    numbers: Sequence[Number]
    figures: Sequence[Figure]
    claims: Sequence[Claim]
    series: JsonObject = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lab:
    """A lab.

    Attributes:
        name: its name on the command line.
        rows: numbers of the topics that it shows.
        chapter: its chapter, one of `CHAPTERS`.
        title: its title.
        seconds: how long it takes on two cores.
        parameters: its parameters.
        run: runs it.
        module: a module that must be installed for it, with the extra that has it.
        repeatable: whether the same seed gives the same numbers; not so if they are times.
        in_folder: whether `run` also gets the folder of its files, in which it resumes.
        marker: the file by which a folder is known as the lab's: JSON with its name under `lab`.
        nightly: whether `make labs` runs it; a lab of an hour is run by hand.
    """

    name: str
    rows: tuple[int, ...]
    chapter: str
    title: Text
    seconds: int
    parameters: type[LabConfig]
    run: Callable[..., Result]
    module: tuple[str, str] | None = None
    repeatable: bool = True
    nightly: bool = True
    in_folder: bool = False
    marker: str = NUMBERS

    def __post_init__(self) -> None:
        assert self.chapter in CHAPTERS, self.chapter
        assert self.rows, self.name


def number(key: str, value: float | int | None, en: str, zh: str, digits: int | None = 4) -> Number:
    """Returns a number with its label in both languages."""
    return Number(key=key, value=value, label=Text(en, zh), digits=digits)


def claim(
    said: tuple[str, str],
    seen: tuple[str, str],
    outcome: Outcome,
    reason: tuple[str, str] | None = None,
) -> Claim:
    """Returns a claim; each text is a pair, English and Chinese."""
    why = None if reason is None else Text(*reason)
    return Claim(claim=Text(*said), seen=Text(*seen), outcome=outcome, reason=why)


__all__ = [
    "CHAPTERS",
    "Bars",
    "Claim",
    "Figure",
    "Grid",
    "Lab",
    "LabConfig",
    "Language",
    "Lines",
    "Number",
    "Result",
    "Text",
    "claim",
    "number",
]
