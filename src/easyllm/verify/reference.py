"""Reference results from `transformers` (extra `reference`).

This is the only file that imports `transformers`, and only when a reference is requested.
"""

from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from easyllm.core.errors import ConfigError, install


class Reference:
    """A checkpoint loaded with `transformers`; code in the checkpoint is never run.

    Args:
        folder: the checkpoint folder.
        dtype: dtype of the model.

    Raises:
        ConfigError: `transformers` is not installed, or cannot load the model.
    """

    def __init__(self, folder: Path, *, dtype: torch.dtype) -> None:
        loader = _library().AutoModelForCausalLM
        try:
            self._model = loader.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
        except (ValueError, KeyError, OSError) as error:
            raise ConfigError(
                f"transformers cannot load this model ({str(error).partition(chr(10))[0]}); "
                "compare without it"
            ) from None
        self._model.eval().requires_grad_(False)

    def logits(self, token_ids: Tensor) -> Tensor:
        """Returns the logits [T, V], in the model's dtype, for token ids [T]."""
        logits: Tensor = self._model(token_ids[None]).logits[0]
        return logits

    def greedy(self, ids: list[int], count: int, *, repetition_penalty: float = 1.0) -> list[int]:
        """Returns `count` tokens generated greedily after `ids`, ignoring EOS."""
        done = self._model.generate(
            torch.tensor([ids]),
            do_sample=False,
            min_new_tokens=count,
            max_new_tokens=count,
            repetition_penalty=repetition_penalty,
            eos_token_id=None,
            pad_token_id=0,
        )
        found: list[int] = done[0, len(ids) :].tolist()
        return found

    def to_at_least_fp32(self) -> None:
        """Converts the model to fp64."""
        self._model = self._model.double()


def chat_ids(folder: Path, messages: list[dict[str, str]], *, generation_prompt: bool) -> list[int]:
    """Returns the token ids of a conversation from `apply_chat_template`."""
    tokenizer = _library().AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    ids: list[int] = tokenizer.apply_chat_template(
        messages, add_generation_prompt=generation_prompt, return_dict=True
    )["input_ids"]
    return ids


def _library() -> ModuleType:
    try:
        import transformers
    except ImportError:
        raise ConfigError(
            f"a comparison with transformers requires that package; {install('reference')}"
        ) from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    library: ModuleType = transformers
    return library
