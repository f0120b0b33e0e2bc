"""Requests to load and unload models and adapters, under the names of vLLM and llama.cpp."""

from typing import Annotated

from pydantic import Field

from easyllm.serve.treatment import Strict

Name = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[\w./:@-]+$")]


class LoadAdapterRequest(Strict):
    """A request to add an adapter."""

    lora_name: Name = Field(description="Name under which requests select the adapter.")
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)] = Field(
        description="Its folder, relative to the one given with --adapters-folder."
    )
    model: str | None = Field(
        None, description="Name of the served model that it belongs to; by default the first."
    )


class UnloadAdapterRequest(Strict):
    """A request to remove an adapter."""

    lora_name: str = Field(description="Name of the adapter.")


class ModelRequest(Strict):
    """A request to load or unload a served model."""

    model: str = Field(description="Name of a served model.")
