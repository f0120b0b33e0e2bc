"""The page of a lab that ran, in English or Chinese: what was seen, figure, numbers, command."""

from html import escape

from easyllm.lab.lab import Claim, Lab, LabConfig, Language, Result, Text

PAGE_NAME = "index.html"
OUTCOMES = {
    "reproduced": Text("reproduced", "复现"),
    "direction": Text("reproduced in direction", "方向一致"),
    "not": Text("not reproduced", "未复现"),
}
HEADINGS = {
    "seen": Text("What was seen", "看到了什么"),
    "claim": Text("What the article says", "文章的说法"),
    "numbers": Text("Numbers", "数值"),
    "parameters": Text("Parameters", "参数"),
    "again": Text("Again", "再次运行"),
}
STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.6 system-ui, "Noto Sans CJK SC", sans-serif; max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem; }
figure { margin: 1.5rem 0; background: #fff; border-radius: 8px; padding: .5rem; }
figure svg { width: 100%; height: auto; }
table { border-collapse: collapse; width: 100%; }
td, th { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #8884; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
code { background: #8882; padding: .1rem .3rem; border-radius: 4px; }
.outcome { font-weight: 600; }
"""


def build_page(
    lab: Lab, parameters: LabConfig, result: Result, svg: str, *, language: Language
) -> str:
    """Returns the page as one HTML file that loads nothing."""
    title = escape(lab.title.of(language))
    drawing = svg[svg.index("<svg") :]
    parts = [
        f"<h1>{title}</h1>",
        *(_claim(claim, language) for claim in result.claims),
        f"<figure>{drawing}</figure>",
        _table(
            HEADINGS["numbers"].of(language),
            [(number.label.of(language), number.shown()) for number in result.numbers],
        ),
        _table(
            HEADINGS["parameters"].of(language),
            [(key, str(value)) for key, value in parameters.model_dump(mode="json").items()],
        ),
        f"<h2>{HEADINGS['again'].of(language)}</h2>",
        f"<p><code>{escape(command(lab, parameters))}</code></p>",
    ]
    return (
        f'<!doctype html>\n<html lang="{language}"><head><meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title><style>{STYLE}</style></head>\n"
        f"<body>{chr(10).join(parts)}</body></html>\n"
    )


def command(lab: Lab, parameters: LabConfig) -> str:
    """Returns the command that gives the same figure."""
    changed = [
        f"{key}={value}"
        for key, value in parameters.model_dump(mode="json", exclude_defaults=True).items()
    ]
    return " ".join(["easyllm lab", lab.name, *changed])


def sentences(claim: Claim, language: Language) -> list[str]:
    """Returns a claim and what was seen as sentences for a terminal."""
    found = [claim.seen.of(language), claim.claim.of(language)]
    outcome = OUTCOMES[claim.outcome].of(language)
    if claim.reason is None:
        return [*found, f"→ {outcome}"]
    return [*found, f"→ {outcome}: {claim.reason.of(language)}"]


def _claim(claim: Claim, language: Language) -> str:
    why = "" if claim.reason is None else f": {escape(claim.reason.of(language))}"
    return (
        f"<h2>{HEADINGS['seen'].of(language)}</h2><p>{escape(claim.seen.of(language))}</p>"
        f"<h2>{HEADINGS['claim'].of(language)}</h2><p>{escape(claim.claim.of(language))}</p>"
        f'<p><span class="outcome">{OUTCOMES[claim.outcome].of(language)}</span>{why}</p>'
    )


def _table(heading: str, rows: list[tuple[str, str]]) -> str:
    body = "".join(
        f'<tr><td>{escape(name)}</td><td class="number">{escape(value)}</td></tr>'
        for name, value in rows
    )
    return f"<h2>{heading}</h2><table>{body}</table>"


__all__ = ["OUTCOMES", "PAGE_NAME", "build_page", "command", "sentences"]
