"""Settings of the base model that an adapter was trained with: its `prompt_mask`.

peft's files have no place for it, so it has its own file, as peft warns about unknown keys of
`adapter_config.json`. Files of peft and of older versions lack it; then the base's mask applies.
"""

from pathlib import Path

from pydantic import Field, ValidationError

from easyllm.core.atomic import write_json
from easyllm.core.config import Config
from easyllm.core.errors import CheckpointError, ConfigError
from easyllm.nn.config import PromptMask
from easyllm.nn.decoder import Decoder

SETTINGS_FILE = "base_settings.json"


class BaseSettings(Config):
    """Settings of the base model in training."""

    prompt_mask: PromptMask = Field(description="`ModelConfig.prompt_mask` in training.")

    @classmethod
    def of(cls, model: Decoder) -> "BaseSettings":
        """Returns the settings of a model."""
        return cls(prompt_mask=model.config.prompt_mask)

    def differ(self, model: Decoder) -> bool:
        """Returns whether a model has other settings."""
        return model.config.prompt_mask != self.prompt_mask

    def apply(self, model: Decoder) -> None:
        """Changes a model to these settings.

        Raises:
            ConfigError: the model does not support them.
        """
        try:
            model.config = model.config.changed(prompt_mask=self.prompt_mask)
        except ValidationError as error:
            raise ConfigError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None


def write_settings(folder: Path, model: Decoder) -> None:
    """Writes the settings of an adapter's base to the adapter's folder."""
    write_json(folder / SETTINGS_FILE, BaseSettings.of(model).model_dump())


def read_settings(folder: Path) -> BaseSettings | None:
    """Returns the settings stored with an adapter; None if there are none.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = folder / SETTINGS_FILE
    if not path.is_file():
        return None
    try:
        return BaseSettings.model_validate_json(path.read_bytes())
    except ValueError as error:
        why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise CheckpointError(
            f"{path} does not contain a valid prompt_mask ({why}); copy the adapter again"
        ) from None


__all__ = ["BaseSettings", "read_settings", "write_settings"]
