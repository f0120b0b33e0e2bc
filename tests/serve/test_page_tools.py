"""The chat page: comparing and voting, the token inspector, the engine view."""

import pytest

from chat_page import CATCH, DONE, HEAD, LONG, SHORT, STATE, ask, send, texts, wait_for_texts
from easyllm.examples.preferences import read_preferences

pytestmark = pytest.mark.browser
TEXT = (
    "Promise.all([import('/assets/js/state.js'), import('/assets/js/inspector.js')])"
    ".then(([{state}, m]) => m.textOfTokens(state.tokens.get(state.conversation.head)%s))"
)
"""The text of the answer's tokens, or of some of them."""


def opened(browser, address, query="models=base,tuned&lang=en", *, also=None, **options):
    return browser.page(f"{address}/?{query}", settings=SHORT | (also or {}), **options)


def test_two_models_are_compared_and_a_vote_becomes_a_preference_pair(
    browser, page_address, tmp_path
):
    with opened(browser, page_address) as page:
        ask(page, "which is better?", done=2)
        models = page.evaluate(
            "[...document.querySelectorAll('.pair .assistant')].map(e => e.dataset.model)"
        )
        assert models == ["base", "tuned"]
        left, right = page.evaluate(
            "[...document.querySelectorAll('.assistant')].map(e => e.getBoundingClientRect().left)"
        )
        assert left < right
        page.click(".vote [data-choice=second]")
        page.wait_for("document.querySelector('.vote [data-choice=second]').ariaPressed === 'true'")
        assert page.evaluate(STATE % f"{HEAD}.model") == "tuned"  # it goes on from there
        ask(page, "and now?", done=4)
        page.click(".pair:last-child .vote [data-choice=tie]")
        page.evaluate(CATCH)
        page.click("#export-votes")
        rows = page.wait_for("window.saved[0]")
        nodes = page.evaluate(STATE % "Object.values(state.conversation.nodes)")
        assert page.errors == []
    file = tmp_path / "preferences.jsonl"
    file.write_text(rows)
    (pair,) = read_preferences(file)  # a tie prefers none
    assert [message["content"] for message in pair.prompt] == ["which is better?"]
    said = [(node.get("model"), node["content"]) for node in nodes]
    assert ("tuned", pair.chosen[0]["content"]) in said
    assert ("base", pair.rejected[0]["content"]) in said


def test_models_names_are_hidden_until_the_vote(browser, page_address):
    with opened(browser, page_address, also={"blind": True}) as page:
        ask(page, "hello", done=2)
        assert texts(page, ".assistant .who") == ["Model A", "Model B"]
        assert page.count(".assistant[data-model=base], .assistant[data-model=tuned]") == 0
        page.click(".vote [data-choice=first]")
        page.wait_for("!document.querySelector('.assistant .who').innerText.includes('Model A')")
        names = texts(page, ".assistant .who")
        assert sorted(name.split(" ")[0] for name in names) == ["base", "tuned"]


def test_a_token_is_inspected_and_the_answer_branches_there(browser, page_address):
    with opened(browser, page_address, "models=base&lang=en") as page:
        ask(page)
        content = page.evaluate(STATE % f"{HEAD}.content")
        page.click(".assistant .inspect")
        page.wait_for("document.querySelector('.tokens .token')")
        assert page.evaluate(TEXT % "") == content
        page.click(".tokens .token:nth-child(2)")
        page.press("ArrowLeft")
        page.wait_for("document.querySelector('.token:first-child').ariaSelected === 'true'")
        assert "nats" in page.text(".detail dl")
        assert "%" in page.text(".detail .bar .value")
        assert page.serious_faults() == []
        page.click(".detail button.bar")
        page.wait_for("document.querySelector('.assistant .place')?.innerText === '2/2'")
        page.wait_for(f"document.querySelector('{DONE}')")
        branched = page.evaluate(STATE % f"{HEAD}.content")
        start = page.evaluate(TEXT % ".slice(0, 1)")
        assert branched.startswith(start)
        assert not content.startswith(start)
        assert len(branched) > len(start)
        assert page.errors == []


def test_the_inspector_shows_what_the_form_of_the_answer_excluded(browser, page_address):
    form = {"form": "choice", "formText": "yes\nno", "values": {"max_tokens": 8}}
    with opened(browser, page_address, "models=base&lang=en", also=form) as page:
        ask(page, "hello", done=1)
        assert page.text(".assistant .text").strip() in ("yes", "no")
        page.click(".assistant .inspect")
        page.wait_for("document.querySelector('.bar.removed')")
        assert "Removed by the form" in page.text(".detail dl")
        assert page.count("button.bar.removed") == 0  # it could not have been chosen


def test_a_message_without_recorded_tokens_is_scored(browser, page_address):
    with opened(browser, page_address, "models=base&lang=en", also={"record": False}) as page:
        ask(page)
        assert page.evaluate(STATE % "state.tokens.size") == 0
        page.click(".assistant .inspect")
        page.wait_for("document.querySelectorAll('.tokens .token').length > 1")
        assert page.evaluate(TEXT % "") == page.evaluate(STATE % f"{HEAD}.content")


def test_the_engine_view_shows_what_runs(browser, page_address):
    with opened(browser, page_address, "models=slow&lang=en", also=LONG) as page:
        page.click("#engine-button")
        page.wait_for("document.querySelectorAll('.one-engine').length === 3")
        send(page, "hello", "slow")
        page.wait_for("document.querySelector('[data-name=slow] .batch td')")
        assert "slow" in page.text("[data-name=slow] .batch")
        page.wait_for("parseFloat(document.querySelector('[data-name=slow] strong').innerText) > 5")
        page.press("Escape")
        wait_for_texts(page, "[data-name=slow] .batch", ["No request is running."])
        assert page.serious_faults() == []
        assert page.errors == []


def test_dark_and_compared_it_has_no_serious_fault(browser, page_address):
    with opened(browser, page_address, "models=base,tuned&lang=zh", dark=True) as page:
        page.wait_for("document.querySelector('#welcome').checkVisibility()")
        assert page.serious_faults() == []
        ask(page, "你好", done=2)
        assert page.serious_faults() == []
        assert page.errors == []
