"""Names of a model's parameters and modules in the Hugging Face format of its family."""

from easyllm.checkpoint.keymap import KeyMap
from easyllm.models.families import family_named
from easyllm.models.heads import with_score
from easyllm.nn.config import ModelConfig
from easyllm.nn.decoder import Decoder


def keymap_of(config: ModelConfig, *, gguf: bool = False) -> KeyMap:
    """Returns the map from parameter names to Hugging Face tensor names.

    Args:
        config: the model configuration.
        gguf: whether the names are those that a GGUF file's tensors are presented under.
    """
    family = family_named(config.family)
    keymap = family.gguf_keymap if gguf and family.gguf_keymap is not None else family.keymap
    return with_score(keymap(config))


class HFNames:
    """Maps the names of modules with a weight to their Hugging Face names.

    Where Hugging Face fuses several of our modules into one (GPT-2's `c_attn`), our names are used,
    and `peft` cannot read an adapter of these modules.
    """

    def __init__(self, keymap: KeyMap) -> None:
        self._keymap = keymap

    def __call__(self, module: str, /) -> str:
        (binding,) = self._keymap.bindings([f"{module}.weight"])
        return module if len(binding.ours) > 1 else binding.theirs.removesuffix(".weight")

    def transposed(self, parameter: str, /) -> bool:
        """Whether Hugging Face stores a parameter transposed, as [in, out]."""
        (binding,) = self._keymap.bindings([parameter])
        return binding.rule.transposed and len(binding.ours) == 1


def hf_module_name(model: Decoder) -> HFNames:
    """Returns a function that maps a module name to the HF name under which adapters are saved."""
    return HFNames(keymap_of(model.config))
