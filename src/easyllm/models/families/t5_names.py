"""Names of the tensors of T5 and of its encoder alone."""

from easyllm.checkpoint.keymap import KeyMap, renames
from easyllm.nn.config import GLUConfig, ModelConfig


def keymap(config: ModelConfig) -> KeyMap:
    """Returns the key map."""
    alone = config.encoder is None
    gated = isinstance(config.layers[0].feed_forward, GLUConfig)
    pairs = [
        ("embed_tokens.weight", "shared.weight"),
        ("lm_head.weight", "lm_head.weight"),
        *_stack(
            "layers" if alone else "encoder",
            "encoder",
            "norm" if alone else "encoder_norm",
            gated=gated,
        ),
    ]
    if not alone:
        pairs += _stack("layers", "decoder", "norm", gated=gated)
        ours, theirs = "layers.{i}.cross", "decoder.block.{i}.layer.1"
        pairs.append((f"{ours}_norm.weight", f"{theirs}.layer_norm.weight"))
        pairs += [
            (f"{ours}.{part}_proj.weight", f"{theirs}.EncDecAttention.{part}.weight")
            for part in "qkvo"
        ]
    ignored = [r"(encoder|decoder)\.embed_tokens\.weight"]
    ignored.append(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight")
    if config.tie_embeddings:
        ignored.append(r"lm_head\.weight")
    return KeyMap(renames(pairs), tuple(ignored))


def _stack(ours: str, theirs: str, norm: str, *, gated: bool) -> list[tuple[str, str]]:
    """Returns pairs of names of a stack of layers: ours and those of the file."""
    last = 1 if theirs == "encoder" else 2  # a decoder's cross-attention is layer.1
    attention, fed = f"{theirs}.block.{{i}}.layer.0", f"{theirs}.block.{{i}}.layer.{last}"
    layer = f"{ours}.{{i}}"
    table = f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    names = {"gate": "wi_0", "up": "wi_1"} if gated else {"up": "wi"}
    return [
        (f"{ours}.0.mixer.position.bias_table", table),
        *(
            (f"{layer}.mixer.{p}_proj.weight", f"{attention}.SelfAttention.{p}.weight")
            for p in "qkvo"
        ),
        (f"{layer}.mixer_norm.weight", f"{attention}.layer_norm.weight"),
        (f"{layer}.feed_forward_norm.weight", f"{fed}.layer_norm.weight"),
        *(
            (f"{layer}.feed_forward.{p}_proj.weight", f"{fed}.DenseReluDense.{name}.weight")
            for p, name in (names | {"down": "wo"}).items()
        ),
        (f"{norm}.weight", f"{theirs}.final_layer_norm.weight"),
    ]


__all__ = ["keymap"]
