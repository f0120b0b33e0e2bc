"""`easyllm data inspect` shows the trained tokens, complete characters and correct counts."""

import json
import re

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from easyllm.cli.data_inspect import inspect, marked_text, visible_text
from easyllm.core.errors import ConfigError, DataError
from easyllm.examples.conversations import read_conversations
from easyllm.examples.inspect import Inspection, Piece, inspect_file, pieces_of
from easyllm.examples.preferences import prepare_preferences, read_preferences
from easyllm.examples.prepare import Encoded, prepare_conversations
from easyllm.ops.cross_entropy import IGNORE_INDEX

CHAT = {
    "messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]
}
PAIR = {"prompt": "hello", "chosen": "good", "rejected": "bad"}
LABELLED = {"prompt": "hello", "completion": "good", "label": True}
app = typer.Typer()
app.command()(inspect)


def write(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def command(*words, **environment):
    done = CliRunner().invoke(app, [*map(str, words)], env=environment)
    assert done.exit_code == 0, done.output
    return done.stdout


def encoded_of(tokenizer, text, trained=()):
    ids = tokenizer.encode(text)
    return Encoded("x", ids, [i in trained for i in range(len(ids))])


@settings(deadline=None, max_examples=100)
@given(text=st.text(st.sampled_from("ab 世界\n😀é\ufffd<|im_end|>"), max_size=20), data=st.data())
def test_pieces_contain_every_token_once_and_concatenate_to_the_text(tiny_tokenizer, text, data):
    ids = tiny_tokenizer.encode(text)
    mask = data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    pieces = list(pieces_of(tiny_tokenizer, Encoded("x", ids, mask)))
    assert [i for piece in pieces for i in piece.token_ids] == ids
    assert [piece.trained for piece in pieces for _ in piece.token_ids] == mask
    whole = list(pieces_of(tiny_tokenizer, Encoded("x", ids, [True] * len(ids))))
    assert "".join(piece.text for piece in whole) == text


def test_a_character_of_several_tokens_is_one_piece(tiny_tokenizer):
    ids = tiny_tokenizer.encode("a😀b")
    assert len(ids) == 6
    pieces = list(pieces_of(tiny_tokenizer, encoded_of(tiny_tokenizer, "a😀b")))
    assert [piece.text for piece in pieces] == ["a", "😀", "b"]
    assert [len(piece.token_ids) for piece in pieces] == [1, 4, 1]
    assert visible_text(pieces[1]) == "😀⁴"


def test_bytes_of_a_truncated_character_are_shown_as_bytes(tiny_tokenizer):
    encoded = encoded_of(tiny_tokenizer, "a😀").cut(3)
    last = list(pieces_of(tiny_tokenizer, encoded))[-1]
    assert set(last.text) == {"\ufffd"}
    assert len(last.token_ids) == 2


@pytest.mark.parametrize(
    ("text", "shown"),
    [(" a b", "·a·b"), ("\n", "⏎"), ("\t\r", "⇥␍"), ("\x00\u200b", r"\u0000\u200b"), ("字", "字")],
)
def test_blanks_and_control_characters_are_visible(text, shown):
    assert visible_text(Piece(text, (1,), False)) == shown


def test_marks_enclose_runs_of_trained_tokens():
    words = [("user", False), ("\n", False), ("Hi", True), ("!", True), ("\n", True), ("\n", False)]
    pieces = [Piece(text, (1,), trained) for text, trained in words]
    assert marked_text(pieces) == "user│⏎\n⟦Hi│!│⏎⟧\n⏎"
    assert marked_text([]) == ""


def shown_ids(part):
    return [i for piece in part.pieces for i in piece.token_ids]


def shown_labels(part):
    return [i if piece.trained else IGNORE_INDEX for piece in part.pieces for i in piece.token_ids]


def test_a_conversation_is_shown_as_trained(tiny_tokenizer, tmp_path):
    path = write(tmp_path, CHAT, {"prompt": "世界", "completion": "a\nb"})
    found = inspect_file(path, tiny_tokenizer)
    samples, account = prepare_conversations(
        read_conversations(path), tiny_tokenizer, max_seq_len=1000
    )
    assert found.kind == "conversation"
    assert found.account == account
    assert [sample.location for sample in found.samples] == [f"{path}:1", f"{path}:2"]
    for inspected, sample in zip(found.samples, samples, strict=True):
        (part,) = inspected.parts
        assert shown_ids(part)[:-1] == list(sample.token_ids)
        assert shown_labels(part)[1:] == list(sample.labels)
    assert found.lengths == [len(sample.token_ids) + 1 for sample in samples]


def test_a_pair_is_shown_as_prompt_chosen_and_rejected(tiny_tokenizer, tmp_path):
    path = write(tmp_path, PAIR, PAIR | {"rejected": "good"})
    found = inspect_file(path, tiny_tokenizer)
    ((sample,), account) = prepare_preferences(
        read_preferences(path), tiny_tokenizer, max_seq_len=1000
    )
    assert found.account == account
    assert account.dropped_equal == 1
    (inspected,) = found.samples
    prompt, chosen, rejected = inspected.parts
    assert [part.heading for part in inspected.parts] == ["prompt", "chosen", "rejected"]
    assert shown_ids(prompt) + shown_ids(chosen)[:-1] == list(sample.chosen.token_ids)
    assert shown_ids(prompt) + shown_ids(rejected)[:-1] == list(sample.rejected.token_ids)
    assert not any(piece.trained for piece in prompt.pieces)
    assert "".join(p.text for p in rejected.pieces if p.trained) == "bad<|im_end|>"
    assert len(found.lengths) == 2


def test_labelled_responses_are_shown_with_their_label(tiny_tokenizer, tmp_path):
    path = write(tmp_path, LABELLED, LABELLED | {"label": False}, LABELLED)
    found = inspect_file(path, tiny_tokenizer)
    assert [sample.parts[0].heading for sample in found.samples] == ["good", "bad", "good"]
    assert found.labels == {"good": 2, "bad": 1}


def test_the_first_samples_are_shown_and_all_are_counted(tiny_tokenizer, tmp_path):
    path = write(tmp_path, *[CHAT] * 5)
    found = inspect_file(path, tiny_tokenizer, num_samples=2)
    assert (len(found.samples), found.account.rows, len(found.lengths)) == (2, 5, 5)
    assert inspect_file(path, tiny_tokenizer, num_samples=0).samples == []


def test_the_limit_and_splitting_act_as_in_training(tiny_tokenizer, tmp_path):
    long = {"messages": CHAT["messages"] * 2}
    path = write(tmp_path, long, CHAT)
    found = inspect_file(path, tiny_tokenizer, max_seq_len=40)
    assert found.account.cut == 1
    assert max(found.lengths) == 40
    split = inspect_file(path, tiny_tokenizer, split_turns=True)
    assert (split.account.rows, split.account.turns, len(split.samples)) == (2, 3, 3)
    dropped = inspect_file(path, tiny_tokenizer, max_seq_len=2, overlong="drop")
    assert (dropped.samples, dropped.account.dropped_overlong) == ([], 2)


def test_length_percentiles_use_the_nearest_rank():
    found = Inspection("conversation", lengths=list(range(20, 0, -1)))
    assert [found.length_at(fraction) for fraction in (0.5, 0.95, 1.0)] == [10, 19, 20]
    assert Inspection("conversation", lengths=[7]).length_at(0.5) == 7
    assert Inspection("conversation").length_at(1.0) == 0


def test_invalid_input_is_refused(tiny_tokenizer, tmp_path):
    with pytest.raises(DataError, match="is empty"):
        inspect_file(write(tmp_path), tiny_tokenizer)
    with pytest.raises(DataError, match=r"rows\.jsonl:2 is a preference pair"):
        inspect_file(write(tmp_path, CHAT, PAIR), tiny_tokenizer)
    with pytest.raises(DataError, match=r"rows\.jsonl:2 has an unknown format"):
        inspect_file(write(tmp_path, PAIR, CHAT), tiny_tokenizer)
    with pytest.raises(ConfigError, match="preference rows"):
        inspect_file(write(tmp_path, PAIR), tiny_tokenizer, split_turns=True)


def test_the_command_prints_counts_and_marked_samples(tiny_folder, tmp_path):
    out = command(write(tmp_path, CHAT, CHAT), "--model", tiny_folder, "--samples", 1)
    assert re.search(r"^format +messages$", out, re.M)
    assert re.search(r"^rows +2$", out, re.M)
    assert re.search(r"^truncated +0$", out, re.M)
    assert "dropped" not in out
    assert "rows.jsonl:1 conversation" in out
    assert "rows.jsonl:2" not in out
    marked = [run.replace("│", "") for run in re.findall("⟦(.*?)⟧", out)]
    assert marked == ["trained", "world<|im_end|>"]
    assert "\x1b" not in out


def test_a_terminal_gets_colours_unless_no_color_is_set(tiny_folder, tmp_path):
    words = (write(tmp_path, CHAT), "--model", tiny_folder)
    coloured = command(*words, FORCE_COLOR="1", TERM="xterm-256color")
    assert "\x1b[" in coloured
    assert "⟦" not in coloured
    plain = command(*words, FORCE_COLOR="1", NO_COLOR="1", TERM="xterm-256color")
    assert "\x1b" not in plain
    assert "⟦" in plain


def test_the_json_output_contains_the_same_tokens(tiny_folder, tiny_tokenizer, tmp_path):
    path = write(tmp_path, PAIR)
    report = json.loads(command(path, "--model", tiny_folder, "--json"))
    found = inspect_file(path, tiny_tokenizer)
    assert report == {"file": str(path), "model": str(tiny_folder)} | found.as_dict()
    assert report["kind"] == "preference"
    assert report["account"]["formats"] == {"preference": 1}
    assert report["lengths"]["max"] == max(found.lengths)
    chosen = report["samples"][0]["parts"][1]
    assert "".join(p["text"] for p in chosen["pieces"] if p["trained"]) == "good<|im_end|>"


def test_truncated_and_dropped_rows_are_reported(tiny_folder, tmp_path):
    long = {"prompt": "world " * 60, "completion": "a"}
    out = command(write(tmp_path, CHAT, long), "--model", tiny_folder, "--max-seq-len", 50)
    assert re.search(r"^truncated +1$", out, re.M)
    assert re.search(r"^dropped: no trained tokens +1$", out, re.M)
    assert re.search(r"^format +messages 1, prompt-completion 1$", out, re.M)
