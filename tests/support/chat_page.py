"""Expressions and steps that the tests of the chat page share."""

import json

SHORT = {"values": {"max_tokens": 8, "ignore_eos": True}}
LONG = {"values": {"max_tokens": 150, "ignore_eos": True}}
"""Settings of the page: a short answer, and one that can be stopped."""
DONE = ".assistant[data-state=done]"
STATE = "import('/assets/js/state.js').then(({state}) => %s)"
"""An expression of the page's state."""
HEAD = "state.conversation.nodes[state.conversation.head]"
CATCH = (
    "(() => { window.saved = []; const make = URL.createObjectURL;"
    " URL.createObjectURL = blob => { blob.text().then(t => saved.push(t)); return make(blob) };"
    " HTMLAnchorElement.prototype.click = () => {} })()"
)
"""Keeps the text of a download in `saved` instead of offering it."""


def ready(page, model="base"):
    """Waits until the models are there."""
    page.wait_for(f"document.querySelector('#model-0').value === '{model}'")


def send(page, text, model="base"):
    """Sends a message."""
    ready(page, model)
    page.type("#question", text)
    page.press("Enter")


def ask(page, text="hello", *, done=1):
    """Sends a message and waits until so many answers are complete."""
    send(page, text)
    page.wait_for(f"document.querySelectorAll('{DONE}').length === {done}")


def texts(page, selector):
    """Returns the texts of the elements that a selector finds."""
    found = json.dumps(selector)
    return page.evaluate(f"[...document.querySelectorAll({found})].map(e => e.innerText)")


def wait_for_texts(page, selector, expected):
    """Waits until the elements that a selector finds have these texts."""
    wanted = json.dumps(json.dumps(expected, ensure_ascii=False, separators=(",", ":")))
    found = f"[...document.querySelectorAll({json.dumps(selector)})].map(e => e.innerText)"
    page.wait_for(f"JSON.stringify({found}) === {wanted}")


def shown(page, id, text):
    """Shows a text as a message would be, in an element of its own."""
    page.evaluate(
        "import('/assets/js/markdown.js').then(m => {"
        f" const e = document.createElement('div'); e.id = {json.dumps(id)};"
        f" document.querySelector('#conversation').append(e);"
        f" m.showMarkdown(e, {json.dumps(text)}) }})"
    )
