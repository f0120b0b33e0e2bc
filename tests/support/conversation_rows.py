"""Rows and messages of conversations."""

from easyllm.examples.conversations import conversations
from easyllm.examples.data_file import Row

TOOLS = [{"name": "add", "parameters": {"type": "object"}}]


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content} | more


def system(content):
    return {"role": "system", "content": content}


def read(values):
    (conversation,) = conversations([Row(values, "data.jsonl:7")])
    return conversation


FORMATS = {
    "messages": (
        "messages",
        {"messages": [system("s"), user("q"), assistant("a")]},
        [system("s"), user("q"), assistant("a")],
    ),
    "alpaca": (
        "alpaca",
        {"instruction": "q", "output": "a"},
        [user("q"), assistant("a")],
    ),
    "alpaca with everything": (
        "alpaca",
        {
            "system": "s",
            "history": [["q1", "a1"], ["q2", "a2"]],
            "instruction": "q",
            "input": "more",
            "output": "a",
        },
        [
            *[system("s"), user("q1"), assistant("a1"), user("q2"), assistant("a2")],
            *[user("q\nmore"), assistant("a")],
        ],
    ),
    "alpaca with empty fields": (
        "alpaca",
        {"system": "", "history": [], "instruction": "q", "input": "", "output": "a"},
        [user("q"), assistant("a")],
    ),
    "alpaca with null fields": (
        "alpaca",
        {"system": None, "history": None, "instruction": "q", "input": None, "output": "a"},
        [user("q"), assistant("a")],
    ),
    "sharegpt": (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        [user("q"), assistant("a")],
    ),
    "sharegpt with a system field": (
        "sharegpt",
        {"system": "s", "conversations": [{"from": "gpt", "value": "a"}]},
        [system("s"), assistant("a")],
    ),
    "sharegpt by other names": (
        "sharegpt",
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "user", "value": "q"},
                {"from": "model", "value": "a"},
                {"from": "tool", "value": "t"},
                {"from": "function_response", "value": "f"},
                {"from": "assistant", "value": "b"},
            ]
        },
        [
            *[system("s"), user("q"), assistant("a")],
            *[{"role": "tool", "content": "t"}, {"role": "tool", "content": "f"}, assistant("b")],
        ],
    ),
    "prompt and completion": (
        "prompt-completion",
        {"prompt": "q", "completion": "a"},
        [user("q"), assistant("a")],
    ),
    "prompt and completion as messages": (
        "prompt-completion",
        {"prompt": [system("s"), user("q")], "completion": [assistant("a")]},
        [system("s"), user("q"), assistant("a")],
    ),
    "question and answer": (
        "question-answer",
        {"question": "q", "answer": "a", "id": 3},
        [user("q"), assistant("a")],
    ),
    "question and answer with a system prompt": (
        "question-answer",
        {"system": "s", "question": "q", "answer": "a"},
        [system("s"), user("q"), assistant("a")],
    ),
}
