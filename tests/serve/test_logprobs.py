"""Log-probabilities cover exactly the tokens of the content, each with its own text and bytes."""

import json

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from easyllm.engine import LLM
from easyllm.engine.request import Logprobs, TokenEvent
from easyllm.engine.stopping import StopStrings
from easyllm.serve.content_tokens import ContentToken, ContentTokens
from easyllm.serve.openai.logprobs import choice_logprobs
from easyllm.tokenizer import StreamDecoder, Tokenizer
from running_server import QUESTION, running
from tiny_models import CHATML, build_tiny

ASKED = {"model": "m", "messages": QUESTION, "logprobs": True, "top_logprobs": 5}
WORDS = ["▁Paris", "Paris", "▁", "▁is", "▁the", "ital", "▁cap", "你"]


def sentencepiece():
    """A tokenizer with byte fallback and tokens that differ only in their leading space."""
    letters = "user assistant\nhello"
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{v:02X}>" for v in range(256)), *WORDS]
    tokens += sorted(set(letters) - {" ", "\n"})
    count = len(tokens)
    special = ["<|im_start|>", "<|im_end|>"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens + special,
        "tokenizer.ggml.scores": [-float(i) for i in range(count + 2)],
        "tokenizer.ggml.token_type": [2, 3, 3, *([6] * 256), *([1] * (count - 259)), 3, 3],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": CHATML,
    }
    return Tokenizer.from_gguf(metadata)


@pytest.fixture(scope="module")
def pieces():
    return sentencepiece()


@pytest.fixture(scope="module")
def address(tiny_model, tiny_tokenizer, pieces):
    models = {
        "m": LLM(model=tiny_model, tokenizer=tiny_tokenizer, source=""),
        "sp": LLM(model=build_tiny(seed=3), tokenizer=pieces, source=""),
    }
    with running(models) as address:
        yield address


@pytest.fixture(scope="module")
def ask(address):
    def ask(**changes):
        answer = httpx.post(f"{address}/v1/chat/completions", json=ASKED | changes)
        assert answer.status_code == 200, answer.text
        return answer

    return ask


def joined(entries):
    return b"".join(bytes(entry["bytes"] or []) for entry in entries).decode("utf-8", "replace")


def tokens(entries):
    """Returns the tokens of entries; the last bits of numbers may vary with prefix caching."""
    return [(entry["token"], entry["bytes"]) for entry in entries]


def streamed(answer):
    """Returns text and entries of a stream, and the pairs in which they arrived."""
    events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    chunks = [json.loads(event) for event in events[:-1]]
    pairs = []
    for chunk in chunks:
        choice = chunk["choices"][0]
        if choice["delta"].get("content"):
            pairs.append((choice["delta"]["content"], choice["logprobs"]["content"]))
        else:
            assert "logprobs" not in choice
    return "".join(t for t, _ in pairs), [e for _, each in pairs for e in each], pairs


@pytest.mark.parametrize("seed", range(6))
def test_concatenated_tokens_equal_the_content_with_and_without_streaming(ask, seed):
    """With a random model, most characters are invalid, and special tokens occur in the middle."""
    settings = {"temperature": 1.5, "seed": seed, "max_tokens": 80}
    choice = ask(**settings).json()["choices"][0]
    content, entries = choice["message"]["content"], choice["logprobs"]["content"]
    assert joined(entries) == content
    assert choice["logprobs"]["refusal"] is None
    text, found, _ = streamed(ask(**settings, stream=True))
    assert (text, tokens(found)) == (content, tokens(entries))


def test_the_eos_token_is_not_in_the_content(ask, tiny_tokenizer):
    end = tiny_tokenizer.id_of("<|im_end|>")
    settings = {"temperature": 1.0, "seed": 1, "logit_bias": {str(end): 4}, "max_tokens": 230}
    answer = ask(**settings).json()
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "stop"
    entries = choice["logprobs"]["content"]
    assert 1 < len(entries) < answer["usage"]["completion_tokens"]
    assert "<|im_end|>" not in [entry["token"] for entry in entries]
    assert joined(entries) == choice["message"]["content"]


def test_tokens_of_a_stop_string_are_not_in_the_content(ask):
    settings = {"temperature": 0, "max_tokens": 40}
    whole = ask(**settings).json()["choices"][0]
    entries = whole["logprobs"]["content"]
    texts = [entry["token"] for entry in entries]
    first = next(i for i in range(3, 30) if all(t.isascii() for t in texts[i : i + 3]))
    stop = "".join(texts[first : first + 3])
    content = whole["message"]["content"]
    assert content.index(stop) == len(joined(entries[:first]))
    choice = ask(**settings, stop=stop).json()["choices"][0]
    assert choice["message"]["content"] == content[: content.index(stop)]
    assert tokens(choice["logprobs"]["content"]) == tokens(entries[:first])
    text, found, _ = streamed(ask(**settings, stop=stop, stream=True))
    assert (text, tokens(found)) == (choice["message"]["content"], tokens(entries[:first]))


def test_text_held_back_for_a_stop_string_is_released_with_its_tokens(ask):
    settings = {"temperature": 0, "max_tokens": 12}
    whole = ask(**settings).json()["choices"][0]
    content = whole["message"]["content"]
    begins = len(joined(whole["logprobs"]["content"][:2]))
    stop = content[begins:] + "never"
    text, found, pairs = streamed(ask(**settings, stop=stop, stream=True))
    assert (text, tokens(found)) == (content, tokens(whole["logprobs"]["content"]))
    assert len(pairs) < len(found)  # some chunks contain several tokens
    for piece, entries in pairs:
        assert joined(entries) == piece


def test_sentencepiece_tokens_have_their_own_text_and_bytes(ask, pieces):
    backend = pieces.backend
    bias = {str(backend.token_to_id(word)): 30 for word in WORDS}
    answer = ask(model="sp", logit_bias=bias, temperature=1.0, seed=2, max_tokens=30).json()
    entries = answer["choices"][0]["logprobs"]["content"]
    assert joined(entries) == answer["choices"][0]["message"]["content"]
    seen = {entry["token"] for place in entries for entry in [place, *place["top_logprobs"]]}
    assert {" Paris", "Paris"} <= seen
    for place in entries:
        for entry in (place, *place["top_logprobs"]):
            assert bytes(entry["bytes"] or []).decode("utf-8", "backslashreplace") == entry["token"]


def test_a_character_of_several_tokens_is_reported_as_bytes(pieces):
    ids = [pieces.backend.token_to_id(f"<0x{v:02X}>") for v in "好".encode()]
    places = [Logprobs(token_id=i, raw=-1.0, top_raw=((i, -1.0),)) for i in ids]
    own = [ContentToken(place, pieces.token_bytes(place.token_id)) for place in places]
    entries = choice_logprobs(own, pieces).model_dump()["content"]
    assert [entry["bytes"] for entry in entries] == [[v] for v in "好".encode()]
    assert [entry["token"] for entry in entries] == ["\\xe5", "\\xa5", "\\xbd"]
    content = ContentTokens(pieces, ())
    given = [
        content.push(event(place, text)) for place, text in zip(places, ["", "", "好"], strict=True)
    ]
    assert given == [("", []), ("", []), ("好", own)]


def answered(tokenizer, ids, stop=None, ends=()):
    """Returns chunks of text with entries for engine events of these tokens, and the content."""
    decoder, stops = StreamDecoder(tokenizer), StopStrings([] if stop is None else [stop])
    tokens, chunks, content = ContentTokens(tokenizer, ends), [], ""
    for number, token in enumerate(ids):
        last = number == len(ids) - 1
        piece = stops.push(decoder.push(token) + (decoder.flush() if last else ""))
        if not stops.stopped and last:
            piece += stops.flush()
        content += piece
        place = Logprobs(token_id=token, raw=-1.0, top_raw=((token, -1.0),))
        reason = "stop" if stops.stopped else "length" if last else None
        text, found = tokens.push(event(place, piece, reason))
        chunks.append((text, choice_logprobs(found, tokenizer).model_dump()["content"]))
        if stops.stopped:
            break
    return chunks, content


@pytest.mark.parametrize(
    ("words", "stop", "content", "texts"),
    [
        (["▁Paris", "▁is"], None, "Paris is", ["Paris", " is"]),
        (["▁", "▁Paris", "▁is"], None, " Paris is", ["", " Paris", " is"]),
        (["Paris", "▁is"], None, "Paris is", ["Paris", " is"]),
        (["▁", "你", "▁is"], None, "你 is", ["", "你", " is"]),
        (["▁Paris", "▁cap", "ital"], "cap", "Paris ", ["Paris", " "]),
        (["▁Paris", "▁cap", "ital"], "pit", "Paris ca", ["Paris", " ca"]),
        (["▁Paris", "▁cap", "ital"], "tal", "Paris capi", ["Paris", " cap", "i"]),
        (["▁Paris", "▁is"], "ari", "P", ["P"]),
        (["你", "▁Paris", "你"], "s你", "你 Pari", ["你", " Pari"]),
        (["▁Paris", "▁is"], "Paris", "", []),
    ],
)
def test_concatenated_tokens_equal_the_content_at_its_start_and_at_a_stop_string(
    pieces, words, stop, content, texts
):
    chunks, said = answered(pieces, [pieces.backend.token_to_id(word) for word in words], stop)
    entries = [entry for _, found in chunks for entry in found]
    assert said == content == joined(entries) == "".join(text for text, _ in chunks)
    assert [entry["token"] for entry in entries] == texts
    for text, found in chunks:  # text is released with its tokens
        assert joined(found) == text


def test_alternatives_to_the_first_token_also_lose_their_leading_space(pieces):
    paris = pieces.backend.token_to_id("▁Paris")
    chunks, _ = answered(pieces, [paris, paris])
    tops = [entry["top_logprobs"][0]["token"] for _, found in chunks for entry in found]
    assert tops == ["Paris", " Paris"]


def test_ids_without_a_token_and_impossible_tokens_are_reported(tiny_tokenizer):
    place = Logprobs(token_id=4000, raw=float("-inf"), top_raw=((50, -0.5),))
    token = ContentToken(place, tiny_tokenizer.token_bytes(4000))
    entry = choice_logprobs([token], tiny_tokenizer).model_dump()["content"][0]
    assert (entry["token"], entry["bytes"], entry["logprob"]) == ("", None, -9999.0)


def event(place, text, reason=None):
    return TokenEvent(
        request_id=0,
        token_id=place.token_id,
        text=text,
        logprob=place.raw,
        logprobs=place,
        finish_reason=reason,
    )


@settings(deadline=None, max_examples=100)
@given(
    ids=st.one_of(
        st.lists(st.integers(0, 319), min_size=1, max_size=20),
        st.lists(st.integers(3, 258), min_size=1, max_size=20),  # bytes, mostly invalid characters
        st.text("hello 你好😀é", min_size=1, max_size=12),
    ),
    stop=st.text("helo 你好\ufffd", min_size=1, max_size=4),
)
def test_the_released_tokens_cover_the_content_wherever_it_stops(tiny_tokenizer, ids, stop):
    """With events as the engine creates them, for arbitrary tokens."""
    tokenizer = tiny_tokenizer
    ids = tokenizer.encode(ids) if isinstance(ids, str) else ids
    decoder, stops = StreamDecoder(tokenizer), StopStrings([stop])
    content_tokens = ContentTokens(tokenizer, (2,))
    text, released, found, end = "", "", [], False
    for number, token in enumerate(ids):
        piece, reason = "", None
        if token == 2:
            piece, reason = decoder.flush(), "stop"
        else:
            piece = decoder.push(token)
            if number == len(ids) - 1:
                piece, reason = piece + decoder.flush(), "length"
        piece = stops.push(piece)
        if stops.stopped:
            reason = "stop"
        elif reason is not None:
            piece += stops.flush()
        text += piece
        place = Logprobs(token_id=token, raw=-1.0, top_raw=())
        given, tokens_given = content_tokens.push(event(place, piece, reason))
        released += given
        found += tokens_given
        if reason is not None:
            end = stops.stopped
            break
    special = tokenizer.special_ids
    content = [i for i in ids[: number + 1] if i not in special]
    found_ids = [token.place.token_id for token in found]
    assert released == text
    assert found_ids == content[: len(found)]
    covered = tokenizer.decode(found_ids)
    assert covered.startswith(text) if end else covered == text
    if end and found:  # and no token beyond the text
        assert len(tokenizer.decode(found_ids[:-1]).rstrip("\ufffd")) <= len(text)
    if "\ufffd" not in text:
        assert b"".join(token.own or b"" for token in found).decode() == text
