"""The chat page's conversations: in the browser, and on the server with `--history`."""

import json

import httpx
import pytest

from chat_page import CATCH, DONE, SHORT, STATE, ask, ready, texts, wait_for_texts
from easyllm.serve.history import History
from running_server import running

pytestmark = pytest.mark.browser
ENTRIES = ".entry .open"


def test_conversations_in_the_browser_survive_a_reload(browser, page_address, tmp_path):
    url = f"{page_address}/?models=base&lang=en"
    with browser.page(url, settings=SHORT) as page:
        ask(page, "about paris")
        wait_for_texts(page, ENTRIES, ["about paris"])
        page.click("#new-chat")
        ask(page, "about tokyo")
        wait_for_texts(page, ENTRIES, ["about tokyo", "about paris"])
        page.open(url)
        wait_for_texts(page, ENTRIES, ["about tokyo", "about paris"])
        page.type("#search", "PARIS")
        wait_for_texts(page, ENTRIES, ["about paris"])
        page.focus(".entry .open")
        page.press("Enter")
        page.wait_for("document.querySelector('.user .text')?.innerText === 'about paris'")
        assert page.count(DONE) == 1
        page.wait_for("document.activeElement.matches('.entry .open')")  # the keyboard stays
        page.click(".entry .rename")
        page.type(".entry input", "France")
        page.press("Enter")
        page.type("#search", "")
        wait_for_texts(page, ENTRIES, ["France", "about tokyo"])
        page.evaluate(CATCH)
        page.click("#export")
        exported = page.wait_for("window.saved[0]")
        page.evaluate("window.confirm = () => true")
        page.focus(".entry .open")
        page.click(".entry .delete")
        wait_for_texts(page, ENTRIES, ["about tokyo"])
        assert page.errors == []
    file = tmp_path / "conversations.json"
    file.write_text(exported)
    with browser.page(url, settings=SHORT) as page:
        ready(page)
        page.attach("#import-input", file)
        wait_for_texts(page, ENTRIES, ["France", "about tokyo"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda found: found | {"version": 7}, "version 7, this page reads version 1"),
        (lambda found: found | {"conversations": [{"id": "x"}]}, "damaged"),
        (lambda found: {"other": 1}, "no conversations of this page"),
    ],
    ids=["version", "damaged", "other"],
)
def test_a_file_of_another_form_is_not_imported(browser, page_address, tmp_path, change, said):
    file = tmp_path / "conversations.json"
    whole = {"format": "easyllm-conversations", "version": 1, "conversations": []}
    file.write_text(json.dumps(change(whole)))
    with browser.page(f"{page_address}/?lang=en") as page:
        ready(page)
        page.attach("#import-input", file)
        page.wait_for(f"document.querySelector('#notice').innerText.includes({json.dumps(said)})")
        assert texts(page, ENTRIES) == []


def test_conversations_on_the_server_survive_its_restart(browser, page_models, tmp_path):
    models = {"base": page_models["base"]}
    first = History(tmp_path / "chats.sqlite")
    with running(models, history=first) as address:
        with browser.page(f"{address}/?lang=en", settings=SHORT) as page:
            ask(page, "about paris")
            wait_for_texts(page, ENTRIES, ["about paris"])
            assert page.text("#place") == "Kept on the server"
        listed = httpx.get(f"{address}/easyllm/history").json()["conversations"]
    first.close()
    second = History(tmp_path / "chats.sqlite")
    with running(models, history=second) as address:
        found = httpx.get(f"{address}/easyllm/history", params={"q": "PARIS"}).json()
        assert found["conversations"] == listed
        with browser.page(f"{address}/?lang=en", settings=SHORT) as page:
            wait_for_texts(page, ENTRIES, ["about paris"])
            page.click(".entry .open")
            page.wait_for(f"document.querySelector('{DONE}')")
            # a second tab changed it: both changes are kept
            path = f"{address}/easyllm/history/{listed[0]['id']}"
            kept = httpx.get(path).json()
            kept["conversation"]["votes"] = {"p": {"choice": "tie"}}
            assert httpx.put(path, json=kept).status_code == 200
            assert httpx.put(path, json=kept).status_code == 409
            ask(page, "and rome?", done=2)
            page.wait_for(STATE % "state.conversation.votes.p?.choice === 'tie'")
            page.evaluate("window.confirm = () => true")
            page.focus(".entry .open")
            page.click(".entry .delete")
            wait_for_texts(page, ENTRIES, [])
            assert all("409" in error for error in page.errors)
        assert httpx.get(path).status_code == 404
    second.close()
