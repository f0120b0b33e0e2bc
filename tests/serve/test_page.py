"""The chat page in a real browser: messages, versions, keyboard, languages, themes, attachments."""

import json
import re

import httpx
import pytest

from chat_page import DONE, HEAD, LONG, SHORT, STATE, ask, ready, send, shown, wait_for_texts

pytestmark = pytest.mark.browser


@pytest.fixture
def open_page(browser, page_address):
    """Opens the page; afterwards nothing was asked of another host, and nothing went wrong."""

    def opened(query="models=base&lang=en", settings=SHORT, **options):
        return browser.page(f"{page_address}/?{query}", settings=settings, **options)

    return opened


def healthy(page, address):
    assert page.errors == []
    assert page.hosts() == {address.removeprefix("http://")}


def test_a_question_is_answered_as_a_stream(open_page, page_address):
    with open_page("models=slow&lang=en", LONG) as page:
        send(page, "hello", "slow")
        page.wait_for("document.querySelector('.assistant[data-state=streaming] .text').innerText")
        first = len(page.text(".assistant .text"))
        longer = f"document.querySelector('.assistant .text').innerText.length > {first}"
        page.wait_for(longer)
        assert page.text(".user .text") == "hello"
        assert page.count("#stop:not([hidden])") == 1
        page.click("#stop")
        page.wait_for("document.querySelector('.assistant').dataset.state === 'stopped'")
        assert "stopped" in page.text(".assistant .stats")
        assert page.count("#send:not([hidden])") == 1
        healthy(page, page_address)


def test_a_question_in_the_url_is_sent_only_by_the_person(open_page):
    with open_page("q=hello&models=base&lang=en") as page:
        ready(page)
        page.wait_for("document.querySelector('#tokens').innerText.includes('tokens')")
        assert page.evaluate("document.querySelector('#question').value") == "hello"
        assert page.count(".message") == 0
        assert not [url for url in page.requests if "/v1/chat" in url]


def test_tokens_are_counted_before_sending(open_page, page_address):
    with open_page() as page:
        ready(page)
        page.type("#question", "hello there")
        page.wait_for("document.querySelector('#tokens').innerText.includes('/')")
        messages = [{"role": "user", "content": "hello there"}]
        body = {"model": "base", "messages": messages}
        count = httpx.post(f"{page_address}/tokenize", json=body).json()
        expected = f"{count['count']} / {count['max_model_len']} tokens"
        assert page.text("#tokens") == expected


def test_regenerating_and_editing_add_versions_that_can_be_switched(open_page, page_address):
    with open_page(settings={"values": {"max_tokens": 8, "ignore_eos": True}}) as page:
        ready(page)
        ask(page)
        page.wait_for("document.querySelector('.assistant .text').innerText")  # it is laid out
        first = page.text(".assistant .text")
        page.click(".assistant .regenerate")
        page.wait_for("document.querySelector('.assistant .place')?.innerText === '2/2'")
        page.wait_for(f"document.querySelector('{DONE}')")
        page.click(".assistant .previous")
        page.wait_for("document.querySelector('.assistant .place')?.innerText === '1/2'")
        wait_for_texts(page, ".assistant .text", [first])
        page.click(".user .edit")
        page.type(".user .editing textarea", "something else")
        page.press("Enter")
        page.wait_for("document.querySelector('.user .place')?.innerText === '2/2'")
        page.wait_for(f"document.querySelector('{DONE}')")
        assert page.text(".user .text") == "something else"
        page.click(".user .previous")
        page.wait_for("document.querySelector('.user .text').innerText === 'hello'")
        wait_for_texts(page, ".assistant .text", [first])  # with all that followed
        healthy(page, page_address)


def test_an_answer_is_continued(open_page):
    with open_page() as page:
        ready(page)
        ask(page)
        first = page.evaluate(STATE % f"{HEAD}.content")
        page.click(".assistant .goOn")
        page.wait_for("document.querySelector('.assistant .stats').innerText.includes('16 tokens')")
        content = page.evaluate(STATE % f"{HEAD}.content")
        assert content.startswith(first)
        assert len(content) > len(first)


def test_escape_stops_and_arrow_up_edits_the_last_message(open_page):
    with open_page("models=slow&lang=en", LONG) as page:
        send(page, "hello", "slow")
        page.wait_for("document.querySelector('.assistant[data-state=streaming]')")
        page.press("Escape")
        page.wait_for("document.querySelector('.assistant[data-state=stopped]')")
        page.press("ArrowUp")
        page.wait_for("document.activeElement.matches('.user .editing textarea')")
        page.press("Escape")
        page.wait_for("!document.querySelector('.editing')")
        page.press("/", ctrl=True)
        page.wait_for("document.querySelector('#keys').open")
        page.press("Escape")
        page.press("k", ctrl=True)
        page.wait_for("document.activeElement.id === 'search'")


def test_language_and_theme_are_switched_and_remembered(open_page, browser):
    context = browser.new_context()
    with open_page("lang=en", context=context) as page:
        page.click("#language")
        page.wait_for("document.documentElement.lang === 'zh-CN'")
        assert page.text("#new-chat") == "新对话"
        light = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.click("#theme")
        page.wait_for("document.documentElement.dataset.theme === 'dark'")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
        assert "lang=zh" in page.evaluate("location.search")
    with open_page("lang=zh", context=context) as page:
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"
        assert page.text("#new-chat") == "新对话"
    browser.remove_context(context)


def test_every_text_exists_in_both_languages(open_page):
    with open_page() as page:
        words = page.evaluate(
            "Promise.all([import('/assets/js/words.en.js'), import('/assets/js/words.zh.js')])"
            ".then(all => all.map(m => Object.entries(m.default)))"
        )
        english, chinese = (dict(each) for each in words)
        assert list(english) == list(chinese)
        for name in english:  # with the same values
            holes = [sorted(re.findall(r"\{\w+\}", each[name])) for each in (english, chinese)]
            assert holes[0] == holes[1], name


def test_it_fits_a_phone(open_page, page_address):
    with open_page("models=base,tuned&lang=en", width=390, height=844) as page:
        ready(page)
        ask(page, done=2)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        left, right = page.evaluate(
            "[...document.querySelectorAll('.assistant')].map(e => e.getBoundingClientRect().left)"
        )
        assert left == right  # one below the other
        box = "document.querySelector('#sidebar').getBoundingClientRect()"
        assert page.evaluate(f"{box}.right") <= 0
        page.click("#menu")
        page.wait_for(f"{box}.left === 0")
        assert page.serious_faults() == []
        healthy(page, page_address)


def test_a_text_file_is_attached_and_others_are_refused_by_name(open_page, tmp_path):
    good, binary, large = tmp_path / "notes.txt", tmp_path / "image.png", tmp_path / "large.csv"
    good.write_text("the sky is blue")
    binary.write_bytes(b"\x89PNG\r\n\x00\xff")
    large.write_text("x" * (256 * 1024 + 1))
    with open_page() as page:
        ready(page)
        page.attach("#file-input", binary)
        page.wait_for("document.querySelector('#notice').innerText.includes('image.png is not')")
        page.attach("#file-input", large)
        page.wait_for("document.querySelector('#notice').innerText.includes('large.csv has 256')")
        assert page.count("#files .chip") == 0
        page.attach("#file-input", good)
        page.wait_for("document.querySelectorAll('#files .chip').length === 1")
        ask(page, "what colour?")
        assert "notes.txt" in page.text(".user summary")
        sent = page.evaluate(
            "Promise.all([import('/assets/js/state.js'), import('/assets/js/tree.js')])"
            ".then(([{state}, tree]) => tree.messagesOf(state.conversation,"
            " tree.pathTo(state.conversation, state.conversation.head))[0].content)"
        )
        assert sent == '<file name="notes.txt">\nthe sky is blue\n</file>\n\nwhat colour?'


ATTACKS = [
    "<script>window.hit = 1</script><img src=/hit.png onerror='window.hit = 1'>",
    "[click](javascript:window.hit=1) [site](http://example.com/?q=secret)",
    "![picture](http://example.com/p.png?q=secret) <iframe src=/hit></iframe>",
    "<a href='/hit'>go</a> <style>body{display:none}</style> <http://example.com>",
    "```html\n<img src=/hit.png onerror='window.hit=1'>\n```",
    "$\\href{javascript:window.hit=1}{x}$ $$\\includegraphics{/hit.png}$$",
]


def test_script_html_and_links_in_a_message_never_run_or_load(open_page, page_address):
    with open_page() as page:
        ready(page)
        for index, text in enumerate(ATTACKS):
            shown(page, f"attack-{index}", text)
        page.wait_for("document.querySelector('math, .temml-error')")
        dangerous = "a, img, script, style, iframe, [src], [onerror], [href]:not(use)"
        assert page.count(f".block :is({dangerous})") == 0
        assert page.evaluate("window.hit") is None
        assert "http://example.com/?q=secret" in page.evaluate("document.body.innerText")
        assert not [url for url in page.requests if "/hit" in url]
        healthy(page, page_address)


def test_markdown_code_formulas_and_chinese_emphasis_are_shown(open_page):
    text = (
        "**注意：**后面 and 2 * 3 * 4, `a_b`, price $5 or $6\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n"
        "$$x_1*y_1*z$$\n\n```python\ndef f(x):\n    return x * 2\n```\n"
    )
    with open_page() as page:
        ready(page)
        shown(page, "shown", text)
        page.wait_for("document.querySelector('#shown math')")
        page.wait_for("document.querySelector('#shown .hljs-keyword')")
        assert page.text("#shown strong") == "注意："
        assert "price $5 or $6" in page.text("#shown p")
        assert page.count("#shown td") == 2
        assert page.count("#shown em") == 0
        assert page.text("#shown .code-head span") == "python"
        assert "def f(x):\n    return x * 2" in page.text("#shown pre")


FAKE_FETCH = (
    "(() => { const real = fetch, answers = %s; window.sent = [];"
    " window.fetch = async (path, options) => {"
    " if (path !== '/v1/chat/completions') return real(path, options);"
    " sent.push(JSON.parse(options.body)); return new Response(answers.shift()) } })()"
)
"""Answers chat requests with given streams; `sent` has the requests."""
EVENTS = [
    {"delta": {"role": "assistant", "content": ""}},
    {"delta": {"reasoning_content": "Let me see."}},
    {"delta": {"tool_calls": [{"index": 0, "id": "c", "function": {"name": "weather"}}]}},
    {"delta": {"tool_calls": [{"index": 0, "function": {"arguments": '{"city":'}}]}},
    {"delta": {"tool_calls": [{"index": 0, "function": {"arguments": '"Rome"}'}}]}},
    {"delta": {}, "finish_reason": "tool_calls"},
]


def test_reasoning_and_tool_calls_are_folded_and_results_are_sent(open_page):
    first, second = (
        "".join(f"data: {json.dumps({'choices': [each]})}\n\n" for each in events)
        for events in (EVENTS, [{"delta": {"content": "Sunny."}, "finish_reason": "stop"}])
    )
    with open_page() as page:
        ready(page)
        page.evaluate(FAKE_FETCH % json.dumps([first, second]))
        ask(page, "weather in Rome?")
        assert page.count(".thinking:not([open])") == 1
        assert page.text(".call summary") == "Calls weather"
        assert '"city": "Rome"' in page.evaluate("document.querySelector('.call pre').textContent")
        page.type(".results textarea", "21 degrees")
        page.click(".results button")
        page.wait_for("document.querySelectorAll('.assistant .text')[1]?.innerText === 'Sunny.'")
        messages = page.evaluate("sent[1].messages")
        assert [each["role"] for each in messages] == ["user", "assistant", "tool"]
        assert messages[1]["tool_calls"][0]["function"]["arguments"] == '{"city":"Rome"}'
        assert messages[2] == {"role": "tool", "tool_call_id": "c", "content": "21 degrees"}


def test_settings_are_sent_and_a_wrong_one_is_named(open_page):
    with open_page() as page:
        ready(page)
        page.click("#settings-button")
        page.wait_for("document.querySelector('#set-temperature')")
        assert page.evaluate("document.querySelector('#set-temperature').placeholder") == "0.7"
        page.type("#set-temperature", "0.3")
        page.type("#set-stop", "END")
        page.type("#system", "Be brief.")
        body = page.evaluate("import('/assets/js/generate.js').then(m => m.requestFields())")
        assert (body["temperature"], body["stop"], body["max_tokens"]) == (0.3, ["END"], 8)
        assert body["top_p"] == 0.95  # the model recommends nothing
        own = "state.models[0].default_sampling = {temperature: 0.2}, m.requestFields('base')"
        body = page.evaluate(f"import('/assets/js/generate.js').then(m => {STATE % f'({own})'})")
        assert (body["temperature"], "top_p" in body) == (0.3, False)
        page.type("#set-temperature", "9")
        page.wait_for("document.querySelector('#set-temperature').ariaInvalid === 'true'")
        page.type("#set-tools", "{not json")
        page.type("#question", "hello")
        page.press("Enter")
        page.wait_for("document.querySelector('#notice').innerText.includes('tools')")
        assert page.count(".message") == 0
        assert page.serious_faults() == []


def test_the_first_paint_is_small_and_nothing_is_inline(page_address):
    first = httpx.get(page_address, headers={"accept-encoding": "gzip"})
    policy = first.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    again = httpx.get(page_address, headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert httpx.get(f"{page_address}/assets/../page.py").status_code == 404
    assert httpx.get(f"{page_address}/assets/%2e%2e/page.py").status_code == 404


def test_everything_that_the_first_paint_loads_is_below_100_kb(open_page):
    with open_page() as page:
        ready(page)
        sizes = page.evaluate(
            "[...performance.getEntriesByType('navigation'),"
            " ...performance.getEntriesByType('resource')]"
            ".filter(e => e.name.includes('/assets/') || e.entryType === 'navigation')"
            ".map(e => e.encodedBodySize)"
        )
        assert len(sizes) > 20
        assert sum(sizes) <= 100_000


def test_a_word_agrees_with_its_number(open_page):
    with open_page() as page:
        ready(page)
        said = "import('/assets/js/i18n.js').then(({t}) => t('speedShort', {n: '%s'}))"
        assert page.evaluate(said % "1") == "1 token"
        assert page.evaluate(said % "12") == "12 tokens"
