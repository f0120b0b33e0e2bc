"""How a question is answered from an index."""

from typing import Literal

from pydantic import Field

from easyllm.core.config import Config


class AskConfig(Config):
    """Settings of `easyllm rag ask` and `rag serve`."""

    passages: int = Field(default=3, ge=1, le=50, description="Number of passages in the prompt.")
    mode: Literal["fused", "dense", "bm25"] = Field(
        default="fused",
        description="Ranking: by vectors (`dense`), by terms (`bm25`), or by both (`fused`).",
    )
    rewrite: bool = Field(
        default=False,
        description="Whether the model rewrites the question as a search query first; with a "
        "conversation, as one that needs no earlier turn.",
    )
    hyde: bool = Field(
        default=False,
        description="Whether vectors are compared with a passage that the model invents as answer "
        "(HyDE, arXiv 2212.10496), which is never shown.",
    )
    sub_questions: int = Field(
        default=0,
        ge=0,
        le=8,
        description="Maximum number of simpler questions that the model splits the question into; "
        "their rankings are fused with its own.",
    )
    rerank: int = Field(
        default=0,
        ge=0,
        le=100,
        description="Number of best passages that are reordered by the model's probability of the "
        "question after each (arXiv 2204.07496); 0 for none.",
    )
    expand: int = Field(
        default=0,
        ge=0,
        le=8,
        description="Neighbouring chunks on each side that are added to a passage (small-to-big).",
    )
    compress: int = Field(
        default=0,
        ge=0,
        description="Tokens to which the passages are reduced together: the sentences with most "
        "terms of the question stay; 0 keeps all.",
    )
    prompt: Literal["auto", "brief", "full"] = Field(
        default="auto",
        description="`full` numbers the passages and says how to treat them; `brief` is one "
        "sentence, which models below 1B parameters follow better; `auto` chooses by size.",
    )
    max_tokens: int = Field(default=128, ge=1, description="Maximum number of tokens of an answer.")


__all__ = ["AskConfig"]
