"""Tokens that end a turn under a chat template, and the files of a tuned model that list them."""

import json

import pytest
from tokenizers import Tokenizer as Backend

from easyllm.corpus.shards import write_shards
from easyllm.models import load_model, load_tokenizer, save_model
from easyllm.pipeline.merge import merge_adapter
from easyllm.tokenizer import SpecialTokens, Tokenizer
from easyllm.tokenizer.turn_ends import turn_end_ids
from easyllm.train import TrainConfig, train
from tiny_models import CHATML, CORPUS, build_tiny

EOT, HEAD, END = "<|eot_id|>", "<|assistant|>", "<|user|>"
LLAMA3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n\n' + m.content + "
    "'<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
NEXT_ROLE = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}{% else %}"
    "{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
EOS_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ 'Q: ' + m.content + '\n' }}{% else %}"
    "{{ 'A: ' + m.content + eos_token + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A: {% endif %}"
)
PLAIN = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
ONE_TURN = "{% if messages | length > 2 %}{{ raise_exception('one exchange') }}{% endif %}" + LLAMA3


@pytest.fixture
def base(tiny_tokenizer):
    """Creates a tokenizer with a template, with the end-of-text token as EOS like a base model."""

    def make(template, **special):
        backend = Backend.from_str(tiny_tokenizer.backend.to_str())
        backend.add_special_tokens([EOT, HEAD, END])
        return Tokenizer(
            backend,
            SpecialTokens(**{"eos": "<|endoftext|>"} | special),
            chat_template=template,
            max_seq_len=256,
        )

    return make


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (CHATML, ["<|im_end|>"]),
        (LLAMA3, [EOT]),
        (ONE_TURN, [EOT]),
        (NEXT_ROLE, [END, "<|endoftext|>"]),  # within a conversation, and at its end
        (MARKED, ["<|im_end|>"]),
        (EOS_TEMPLATE, ["<|endoftext|>"]),
        ({"default": CHATML, "tool_use": LLAMA3}, ["<|im_end|>", EOT]),
        ("{{ raise_exception('never') }}", []),
        (None, []),
    ],
)
def test_the_trained_end_of_turn_is_found(base, template, ends):
    tokenizer = base(template)
    assert [tokenizer.backend.id_to_token(i) for i in turn_end_ids(tokenizer)] == ends


def test_a_turn_that_ends_in_plain_text_ends_only_with_eos(base):
    tokenizer = base(PLAIN, eos=None)
    assert turn_end_ids(tokenizer) == ()


CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"what {n}"},
            {"role": "assistant", "content": f"that {n}"},
        ]
    }
    for n in range(8)
]


@pytest.fixture
def run(tmp_path, base):
    """Trains a base model on conversations; returns the folders of the model and of the run."""

    def start(template=CHATML, rows=CHATS, **changes):
        tokenizer = base(template)
        model = build_tiny(vocab_size=tokenizer.vocab_size, eos_token_id=0, bos_token_id=None)
        folder = save_model(model, tmp_path / "base", tokenizer=tokenizer)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
        values = {
            "model": str(folder),
            "data": {"train": [str(tmp_path / "rows.jsonl")], "max_seq_len": 64},
            "batch_size": 4,
            "max_steps": 1,
            "save_every": 0,
            "precision": "fp32",
        }
        config = TrainConfig.model_validate(values | changes)
        return folder, train(config, tmp_path / "run").output

    return start


def listed(folder, name):
    return json.loads((folder / name).read_text("utf-8"))["eos_token_id"]


@pytest.mark.parametrize(("template", "end"), [(CHATML, "<|im_end|>"), (LLAMA3, EOT)])
def test_a_model_tuned_on_conversations_stops_at_its_trained_end_token(run, template, end):
    folder, output = run(template)
    number = load_tokenizer(folder).id_of(end)
    assert listed(folder, "config.json") == 0
    for name in ("config.json", "generation_config.json"):
        assert listed(output / "model", name) == [0, number]
    assert load_model(output / "model").config.eos_token_ids == (0, number)
    assert load_tokenizer(output / "model").eos_id == 0


def test_merging_an_adapter_tuned_on_conversations_sets_the_end_token(run, tmp_path):
    folder, output = run(adapter={"rank": 2})
    number = load_tokenizer(folder).id_of("<|im_end|>")
    assert listed(output / "adapter", "generation_config.json") == [0, number]
    merged = merge_adapter(str(folder), output / "adapter", tmp_path / "merged")
    assert load_model(merged.folder).config.eos_token_ids == (0, number)


def test_training_on_plain_text_does_not_change_the_end_tokens(run, base, tmp_path):
    tokenizer = base(CHATML)
    write_shards(tmp_path / "shards", [tokenizer.encode(line) for line in CORPUS], tokenizer)
    _, output = run(data={"kind": "corpus", "shards": str(tmp_path / "shards"), "max_seq_len": 32})
    assert listed(output / "model", "config.json") == 0


def test_generation_stops_at_the_end_token_of_a_saved_model(base, tmp_path):
    from easyllm import LLM, SamplingParams

    params = SamplingParams(max_tokens=12, temperature=0.0)
    tokenizer = base(CHATML)
    model = build_tiny(vocab_size=tokenizer.vocab_size, eos_token_id=0, bos_token_id=None)
    prompt = "The quick brown"
    plain = save_model(model, tmp_path / "plain", tokenizer=tokenizer)
    long = LLM(str(plain)).generate([prompt], params)[0]
    third = long.token_ids[2]
    first_at = long.token_ids.index(third)
    ends = save_model(model, tmp_path / "ends", tokenizer=tokenizer, end_ids=[third])
    short = LLM(str(ends)).generate([prompt], params)[0]
    assert short.finish_reason == "stop"
    assert list(short.token_ids)[:first_at] == list(long.token_ids)[:first_at]
    assert len(short.token_ids) <= first_at + 1
