"""Lines of the request log: what they contain, and that no client can forge one."""

import json
import logging
import re

import pytest

from easyllm.serve.request_log import (
    MAX_SHOWN_CHARS,
    RequestLog,
    json_line,
    log_to_stderr,
    logger,
    text_line,
)
from easyllm.serve.trace import RequestTrace


@pytest.fixture(autouse=True)
def _logger():
    before = (logger.handlers[:], logger.level, logger.propagate)
    yield
    logger.handlers[:], logger.level, logger.propagate = before


def trace(**changes):
    values = {
        "method": "POST",
        "path": "/v1/chat/completions",
        "route": "/v1/chat/completions",
        "model": "smollm2",
        "status": 200,
        "prompt_tokens": 128,
        "cached_tokens": 64,
        "completion_tokens": 32,
        "finish_reasons": ["stop", "length"],
        "arrived_s": 100.0,
        "arrived_unix_s": 1_796_025_600.1239,
        "first_token_s": 100.25,
        "ended_s": 102.5,
    }
    return RequestTrace(**values | changes)


def test_a_json_line_has_every_value():
    assert json.loads(json_line(trace())) == {
        "time": "2026-11-30T08:00:00.123Z",
        "method": "POST",
        "path": "/v1/chat/completions",
        "route": "/v1/chat/completions",
        "status": 200,
        "model": "smollm2",
        "prompt_tokens": 128,
        "cached_tokens": 64,
        "completion_tokens": 32,
        "first_token_s": 0.25,
        "total_s": 2.5,
        "finish_reason": "stop,length",
        "client_gone": False,
    }


def test_a_text_line_names_what_is_not_zero():
    assert text_line(trace(cached_tokens=0, client_gone=True)) == (
        "2026-11-30T08:00:00.123Z POST /v1/chat/completions 200 model=smollm2 prompt_tokens=128 "
        "completion_tokens=32 first_token_s=0.250 total_s=2.500 finish_reason=stop,length "
        "client_gone"
    )


def test_a_refused_request_has_null_where_nothing_is_known():
    refused = trace(
        status=404,
        route="other",
        model="",
        prompt_tokens=0,
        cached_tokens=0,
        completion_tokens=0,
        finish_reasons=[],
        first_token_s=None,
    )
    found = json.loads(json_line(refused))
    assert (found["first_token_s"], found["finish_reason"], found["status"]) == (None, None, 404)
    assert text_line(refused).endswith("POST /v1/chat/completions 404 total_s=2.500")


@pytest.mark.parametrize(("gone", "status"), [(True, 499), (False, 500)])
def test_a_request_without_a_response_has_a_status_that_says_why(gone, status):
    assert json.loads(json_line(trace(status=0, client_gone=gone)))["status"] == status


NASTY = [
    "a\nb",
    "a\r\nb",
    "\x1b[31mred",
    "\x7f\x85\x9b31m",
    "\u2028line",
    "\u202eright to left",
    "\ud800",
    "\U000e0001tag",
    "\0",
]


@pytest.mark.parametrize("text", NASTY)
@pytest.mark.parametrize("field", ["path", "model", "method"])
def test_characters_that_are_not_printable_are_escaped(text, field):
    for line in (text_line(trace(**{field: text})), json_line(trace(**{field: text}))):
        assert line.isprintable()
        assert len(line.splitlines()) == 1
    assert json.loads(json_line(trace(**{field: text})))[field] == text


def test_a_value_with_spaces_is_one_word_of_the_line():
    line = text_line(trace(model='x" status=200 y'))
    assert r'model="x\" status=200 y"' in line


def test_letters_of_any_script_are_shown_as_they_are():
    assert "model=模型" in text_line(trace(model="模型"))
    assert '"model": "模型"' in json_line(trace(model="模型"))


def test_a_long_path_is_cut():
    found = json.loads(json_line(trace(path="/" + "x" * 100_000)))["path"]
    assert len(found) == MAX_SHOWN_CHARS + 1


def test_the_log_writes_one_line_a_request_to_its_logger(caplog):
    caplog.set_level(logging.INFO, logger="easyllm.requests")
    RequestLog(json_lines=True).write(trace(model="100%s"))
    RequestLog().write(trace())
    first, second = (record.getMessage() for record in caplog.records)
    assert json.loads(first)["model"] == "100%s"
    assert re.match(r"2026-11-30T08:00:00\.123Z POST ", second)


def test_lines_go_to_standard_error_as_they_are(capsys):
    log_to_stderr()
    log_to_stderr()  # a second call does not print lines twice
    RequestLog().write(trace())
    assert capsys.readouterr().err == text_line(trace()) + "\n"
