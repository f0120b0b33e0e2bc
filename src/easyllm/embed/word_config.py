"""Settings of word vectors, from which the command line makes its flags without loading torch."""

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from easyllm.core.config import Config


class SkipGramConfig(Config):
    """Training of word vectors."""

    dim: PositiveInt = Field(default=100, description="Number of dimensions.")
    window: PositiveInt = Field(
        default=5, description="Maximum distance of a context word from the centre word."
    )
    negatives: PositiveInt = Field(default=5, description="Noise words per pair of words.")
    min_count: PositiveInt = Field(
        default=5, description="Words that occur less often are left out."
    )
    subsample: PositiveFloat = Field(
        default=1e-4,
        description="Frequency t above which occurrences of a word are left out at random.",
    )
    epochs: PositiveInt = Field(default=5, description="Number of passes over the text.")
    learning_rate: PositiveFloat = Field(
        default=0.01, description="Learning rate of Adam, which decreases linearly to 0."
    )
    batch_size: PositiveInt = Field(default=4096, description="Pairs of words per update.")
    seed: NonNegativeInt = Field(default=0, description="Seed of all random choices.")


__all__ = ["SkipGramConfig"]
