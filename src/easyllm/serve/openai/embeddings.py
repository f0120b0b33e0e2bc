"""`POST /v1/embeddings`: pooled hidden states of a served model, as vectors of unit length."""

import asyncio
import base64
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BeforeValidator, Field, WithJsonSchema
from starlette.responses import Response
from torch import Tensor

from easyllm.engine.embedding import groups
from easyllm.engine.llm import LLM
from easyllm.serve.errors import APIError
from easyllm.serve.generate import encode_text
from easyllm.serve.json_text import JSONResponse
from easyllm.serve.models import ServedModel
from easyllm.serve.openai.completion_request import PROMPT_SCHEMA, read_prompts
from easyllm.serve.openai.sampling_fields import whole
from easyllm.serve.trace import RequestTrace
from easyllm.serve.treatment import Neutral, Strict


class EmbeddingRequest(Strict):
    """A request for the embeddings of texts."""

    model: str = Field(description="Name of a served model.")
    input: Annotated[Any, BeforeValidator(read_prompts), WithJsonSchema(PROMPT_SCHEMA)] = Field(
        description="Text or token ids, or a list of them."
    )
    encoding_format: Literal["float", "base64"] | None = Field(
        None,
        description="Numbers, or the base64 of their little-endian fp32 bytes. By default float.",
    )
    dimensions: Annotated[int, Field(ge=1), BeforeValidator(whole)] | None = Field(
        None, description="Length of the vectors; only the model's own is supported."
    )
    pooling: Literal["mean", "last"] | None = Field(
        None,
        description="Mean of the hidden states of all tokens, or that of the last token. By "
        "default mean.",
    )
    user: Annotated[str | None, Neutral("text", "it names the end user")] = None


async def embeddings(
    request: EmbeddingRequest, served: ServedModel, trace: RequestTrace | None
) -> Response:
    """Returns the embeddings in OpenAI's format.

    Raises:
        EasyllmError: the model rejects a text.
        APIError: vectors of another length are requested.
    """
    llm = served.llm
    size = llm.model.config.hidden_size
    if request.dimensions not in (None, size):
        message = f"the model's vectors have {size} dimensions, not {request.dimensions}"
        raise APIError(400, message, param="dimensions", code="unsupported_value")
    ids = await asyncio.to_thread(_encoded_inputs, request.input, llm)
    vectors = await _vectors(request, served, ids)
    count = sum(map(len, ids))
    if trace is not None:
        trace.prompt_tokens += count
    rows = vectors.numpy().astype("<f4")
    as_base64 = request.encoding_format == "base64"
    body = {
        "object": "list",
        "data": [
            {
                "object": "embedding",
                "index": index,
                "embedding": _encoded(row) if as_base64 else row.tolist(),
            }
            for index, row in enumerate(rows)
        ],
        "model": request.model,
        "usage": {"prompt_tokens": count, "total_tokens": count},
    }
    return JSONResponse(body)


def _encoded_inputs(inputs: Sequence[str | list[int]], llm: LLM) -> list[list[int]]:
    """Returns the token ids of all texts, checked."""
    ids = [encode_text(each, llm) if isinstance(each, str) else each for each in inputs]
    llm.check_embedded(ids)
    return ids


async def _vectors(
    request: EmbeddingRequest, served: ServedModel, ids: Sequence[list[int]]
) -> Tensor:
    """Returns the vectors [B, D] on the CPU.

    Between two groups of texts, the engine continues with the requests of others.
    """
    llm, found = served.llm, list[Tensor]()
    for group in groups(ids, llm.engine.options.max_step_tokens):
        vectors = await served.service.call(
            partial(llm.embed, group, pooling=request.pooling or "mean", adapter=served.adapter)
        )
        found.append(vectors.cpu())
    return torch.cat(found)


def _encoded(row: np.ndarray[Any, Any]) -> str:
    return base64.b64encode(row.tobytes()).decode("ascii")
