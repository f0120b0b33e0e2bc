"""T5: logits equal those of `transformers`, generation with a cache equals a full forward pass."""

import pytest
import torch
from transformers import AutoConfig, T5EncoderModel, T5ForConditionalGeneration

from easyllm.core.errors import CheckpointError, ConfigError
from easyllm.engine import LLM, SamplingParams
from easyllm.models import load_model, save_model
from easyllm.models.hf_config import write_config
from easyllm.nn import EncoderDecoder
from easyllm.nn.config import GLUConfig, MoEConfig
from easyllm.nn.context import ForwardContext
from easyllm.nn.position_config import Alibi

SIZES = {
    "vocab_size": 211,
    "d_model": 48,
    "d_kv": 12,
    "d_ff": 80,
    "num_heads": 4,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "decoder_start_token_id": 0,
}
VARIANTS = {
    "1.0": {},
    "1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "other start": {"decoder_start_token_id": 7, "num_decoder_layers": 3},
}
SOURCE = torch.randint(3, 211, (40,), generator=torch.Generator().manual_seed(1))
TARGET = torch.randint(3, 211, (23,), generator=torch.Generator().manual_seed(2))


def tiny(kind=T5ForConditionalGeneration, **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model("t5", **SIZES | changes, attn_implementation="eager")
    model = kind(config).eval()
    if changes.get("tie_word_embeddings") is False:  # its class ties them in any case
        model.lm_head.weight = torch.nn.Parameter(torch.empty(211, 48))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.requires_grad_(False)


@pytest.fixture(params=VARIANTS)
def both(request, tmp_path):
    reference = tiny(**VARIANTS[request.param])
    reference.save_pretrained(tmp_path / "hf")
    return reference, load_model(tmp_path / "hf")


def expected(reference, source, target):
    return reference(input_ids=source[None], decoder_input_ids=target[None]).logits[0]


def test_logits_equal_transformers_in_both_directions(both, tmp_path):
    reference, model = both
    start = torch.tensor([model.config.encoder.start_token_id])
    target = torch.cat([start, TARGET])
    logits = model.logits(torch.cat([SOURCE, target]), prefix=len(SOURCE))[len(SOURCE) :]
    theirs = expected(reference, SOURCE, target)
    torch.testing.assert_close(logits, theirs, atol=3e-5, rtol=0)
    save_model(model, tmp_path / "ours")
    again = T5ForConditionalGeneration.from_pretrained(
        tmp_path / "ours", attn_implementation="eager"
    )
    torch.testing.assert_close(expected(again, SOURCE, target), theirs, atol=1e-6, rtol=0)
    ours = load_model(tmp_path / "ours")
    assert ours.config == model.config
    assert all(
        torch.equal(a, b) for a, b in zip(ours.parameters(), model.parameters(), strict=True)
    )


def test_the_encoder_alone_equals_transformers(tmp_path):
    reference = tiny(T5EncoderModel)
    reference.save_pretrained(tmp_path / "hf")
    model = load_model(tmp_path / "hf")
    with torch.no_grad():
        hidden = model(SOURCE, ForwardContext.packed([len(SOURCE)]))
    theirs = reference(input_ids=SOURCE[None]).last_hidden_state[0]
    torch.testing.assert_close(hidden, theirs, atol=3e-5, rtol=0)
    save_model(model, tmp_path / "ours")
    again = T5EncoderModel.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    found = again(input_ids=SOURCE[None]).last_hidden_state[0]
    torch.testing.assert_close(found, theirs, atol=1e-6, rtol=0)


def test_packed_sequences_equal_each_alone(both):
    _, model = both
    pieces = [(SOURCE[:9], TARGET[:5]), (SOURCE[9:], TARGET[5:6]), (SOURCE[:1], TARGET)]
    ids = torch.cat([torch.cat(piece) for piece in pieces])
    context = ForwardContext.packed(
        [len(s) + len(t) for s, t in pieces], prefix_lengths=tuple(len(s) for s, _ in pieces)
    )
    with torch.no_grad():
        packed = model.head(model(ids, context)).split(list(context.lengths))
    for rows, (source, target) in zip(packed, pieces, strict=True):
        alone = model.logits(torch.cat([source, target]), prefix=len(source))
        torch.testing.assert_close(rows[len(source) :], alone[len(source) :], atol=1e-5, rtol=0)


def test_greedy_generation_equals_transformers_and_the_full_forward_pass(both):
    reference, model = both
    prompts = [SOURCE.tolist(), SOURCE[:7].tolist(), SOURCE[20:].tolist()]
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, logprobs=1)
    found = LLM(model=model, max_running=2).generate(prompts, params)
    for prompt, result in zip(prompts, found, strict=True):
        ours = list(result.token_ids)
        theirs = reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=16,
            min_new_tokens=16,
            do_sample=False,
            suppress_tokens=[],
            eos_token_id=210 if 210 not in ours else 209,
        )[0, 1:].tolist()
        assert ours == theirs
        assert_logprobs_of_a_full_pass(model, prompt, result)


def assert_logprobs_of_a_full_pass(model, prompt, completion):
    ids = list(completion.token_ids)
    whole = [*prompt, model.config.encoder.start_token_id, *ids[:-1]]
    rows = model.logits(whole, prefix=len(prompt))[len(prompt) :].log_softmax(-1)
    expected = rows.gather(1, torch.tensor(ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-4, rtol=0)


def test_several_completions_and_preempted_ones_equal_a_full_pass(both):
    _, model = both
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=20, ignore_eos=True, n=3)
    llm = LLM(model=model, max_running=6, num_pages=9, page_size=16)
    prompts = [SOURCE.tolist(), SOURCE[5:35].tolist()]
    for prompt, found in zip(prompts, llm.generate(prompts, params), strict=True):
        completions = [found, *found.others]
        assert len({tuple(each.token_ids) for each in completions}) == 3
        for each in completions:
            assert_logprobs_of_a_full_pass(model, prompt, each)


def test_what_it_cannot_do_is_refused(both, tmp_path):
    _, model = both
    with pytest.raises(ConfigError, match="a sequence has no prompt"):
        model.logits(SOURCE)
    with pytest.raises(ConfigError, match="has no deterministic mode"):
        model.logits(SOURCE, prefix=5, deterministic=True)
    with pytest.raises(ConfigError, match="no log-probabilities of a prompt"):
        LLM(model=model).generate(
            [SOURCE.tolist()], SamplingParams(max_tokens=1, prompt_logprobs=1)
        )


def test_an_unknown_feed_forward_is_refused(tmp_path):
    tiny(feed_forward_proj="gated-silu").save_pretrained(tmp_path / "hf")
    with pytest.raises(CheckpointError, match="feed_forward_proj='gated-silu'"):
        load_model(tmp_path / "hf")


def test_parts_that_t5_lacks_are_not_written(both):
    _, model = both
    layer = model.config.layers[0]
    experts = MoEConfig(num_experts=2, experts_per_token=1, expert=GLUConfig(intermediate_size=8))
    for changes in (
        {"feed_forward": experts},
        {"mixer": layer.mixer.model_copy(update={"position": Alibi()})},
        {"mixer": layer.mixer.model_copy(update={"softcap": 30.0})},
    ):
        changed = layer.model_copy(update=changes)
        config = model.config.changed(layers=(changed,) * model.config.num_layers)
        with pytest.raises(CheckpointError, match="'t5' cannot represent this model"):
            write_config(config)


def test_the_table_of_positions_is_shared_and_copied_with_the_model(both):
    import copy

    _, model = both
    assert isinstance(model, EncoderDecoder)
    names = [name for name, _ in model.named_parameters() if name.endswith("bias_table")]
    assert names == ["layers.0.mixer.position.bias_table", "encoder.0.mixer.position.bias_table"]
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.layers[0].mixer.position.bias_table.add_(1.0)
    assert other.layers[1].mixer.position.table is other.layers[0].mixer.position.bias_table
    assert not torch.equal(
        other.layers[1].mixer.position.table, model.layers[1].mixer.position.table
    )
