"""Routes that generate or embed: each reads a request of its dialect and writes its answer."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from pydantic import BaseModel
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse

from easyllm.core.errors import ContextLengthError, DataError, EasyllmError
from easyllm.core.json_types import JsonObject
from easyllm.serve import tokens
from easyllm.serve.anthropic import answers as anthropic_answers
from easyllm.serve.anthropic.request import CountRequest, MessagesRequest
from easyllm.serve.body import parse_object, read_body
from easyllm.serve.documents import AskRequest, Documents, SearchRequest
from easyllm.serve.errors import APIError
from easyllm.serve.generate import encode, generate
from easyllm.serve.hang_up import cancel_on_disconnect
from easyllm.serve.job import Job
from easyllm.serve.json_text import JSONResponse
from easyllm.serve.loading import LoadAdapterRequest, ModelRequest, UnloadAdapterRequest
from easyllm.serve.models import ServedModel, ServedModels
from easyllm.serve.observe import trace_of
from easyllm.serve.openai import chat, completions
from easyllm.serve.openai.chat_request import ChatRequest
from easyllm.serve.openai.completion_request import CompletionRequest
from easyllm.serve.openai.embeddings import EmbeddingRequest, embeddings
from easyllm.serve.responses import answers as response_answers
from easyllm.serve.responses.request import ResponseRequest
from easyllm.serve.responses.store import ResponseStore
from easyllm.serve.service import EngineFailure
from easyllm.serve.sse import MEDIA_TYPE
from easyllm.serve.trace import RequestTrace
from easyllm.serve.treatment import read_as

R = TypeVar("R", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Call:
    """What the handlers of all routes share.

    Attributes:
        models: the served models.
        max_waiting: number of waiting requests of an engine at which new ones are refused.
        stored: responses of the Responses API.
        documents: the index from which questions are answered; None for none.
    """

    models: ServedModels
    max_waiting: int
    stored: ResponseStore
    documents: Documents | None = None

    async def handle(
        self,
        http: Request,
        model: type[R],
        answer: Callable[[R, RequestTrace], Awaitable[Response]],
        *,
        text_field: str,
    ) -> Response:
        """Reads a request, answers it, and translates errors to the dialect's.

        Args:
            http: the request.
            model: its fields.
            answer: writes the answer.
            text_field: the field with the text to continue, which errors about its length name.

        Raises:
            APIError: the request is invalid, or the engine failed.
        """
        try:
            raw = await read_body(http)
            # Parsed in a thread, so that a large body does not delay other clients' tokens.
            request = await asyncio.to_thread(lambda: read_as(model, parse_object(raw)))
            work = answer(request, trace_of(http))
            return await cancel_on_disconnect(http, _awaited(work))
        except ContextLengthError as error:
            # Clients look for words in the text: litellm and Claude Code for "prompt is too long",
            # LangChain for the code (which openai's client leaves out of it since 3.38).
            code = "context_length_exceeded"
            message = f"the prompt is too long: {error.what}"
            message = f"{message}; shorten the {text_field}, or lower max_tokens ({code})"
            raise APIError(400, message, param=text_field, code=code) from None
        except DataError as error:  # raised by the chat template
            raise APIError(400, str(error), param=text_field) from None
        except EasyllmError as error:
            param = text_field if error.param == "messages" else error.param
            raise APIError(400, str(error), param=param) from None
        except EngineFailure as error:
            raise APIError(error.status, str(error)) from None
        except ClientDisconnect:
            return Response(status_code=499)  # the client is gone and never reads this

    async def open(self, name: str | None, trace: RequestTrace) -> ServedModel:
        """Returns the model of a name, ready to run; without a name, the first.

        Raises:
            APIError: no model has this name, or too many requests wait for it.
        """
        served = await self.models.open(name)
        trace.model = served.name
        if served.service.num_waiting >= self.max_waiting:
            raise APIError(
                429,
                f"{self.max_waiting} requests are waiting already; try again later",
                code="rate_limit_exceeded",
            )
        return served

    async def grounded(self, job: Job, served: ServedModel) -> Job:
        """Returns a job with the passages of the index for its question, if there is an index."""
        if self.documents is None:
            return job
        return await asyncio.to_thread(self.documents.with_passages, job, served)

    async def ask(self, request: AskRequest, trace: RequestTrace) -> Response:
        """Answers `POST /v1/rag/ask`."""
        assert self.documents is not None, "the route exists only with an index"
        served = await self.open(request.model, trace)
        messages, passages = await asyncio.to_thread(self.documents.prepare, request, served)
        return JSONResponse(await self.documents.answer(request, messages, passages, served, trace))

    async def search(self, request: SearchRequest, trace: RequestTrace) -> Response:
        """Answers `POST /v1/rag/search`."""
        del trace
        assert self.documents is not None, "the route exists only with an index"
        return JSONResponse(await asyncio.to_thread(self.documents.search, request))

    async def chat(self, request: ChatRequest, trace: RequestTrace) -> Response:
        """Answers `POST /v1/chat/completions`."""
        served = await self.open(request.model, trace)
        job = await self.grounded(request.job(served.defaults), served)
        generated = await generate(job, served, trace)
        tokenizer = served.llm.tokenizer
        if request.stream:
            return _streamed(chat.stream(request, generated, tokenizer))
        return await chat.whole(request, generated, tokenizer)

    async def complete(self, request: CompletionRequest, trace: RequestTrace) -> Response:
        """Answers `POST /v1/completions`."""
        served = await self.open(request.model, trace)
        running = await completions.start(request, served, trace)
        if request.stream:
            return _streamed(completions.stream(running))
        return await completions.whole(running)

    async def embed(self, request: EmbeddingRequest, trace: RequestTrace) -> Response:
        """Answers `POST /v1/embeddings`."""
        return await embeddings(request, await self.open(request.model, trace), trace)

    async def message(self, request: MessagesRequest, trace: RequestTrace) -> Response:
        """Answers `POST /v1/messages`."""
        served = await self.open(request.model, trace)
        job = await self.grounded(request.job(served.defaults), served)
        generated = await generate(job, served, trace)
        if request.stream:
            return _streamed(anthropic_answers.stream(request.model, generated))
        return await anthropic_answers.whole(request.model, generated)

    async def count(self, request: CountRequest, trace: RequestTrace) -> Response:
        """Answers `POST /v1/messages/count_tokens`."""
        served = await self.open(request.model, trace)
        talk = request.conversation()
        ids, _ = await asyncio.to_thread(encode, talk, request.reasoning(), served.llm)
        return JSONResponse({"input_tokens": len(ids)})

    async def respond(self, request: ResponseRequest, trace: RequestTrace) -> Response:
        """Answers `POST /v1/responses`."""
        served = await self.open(request.model, trace)
        earlier = list[JsonObject]()
        if request.previous_response_id is not None:
            found = self.stored.get(request.previous_response_id, "previous_response_id")
            earlier = [*found.items, *found.body["output"]]
        items = self.stored.resolve(request.input)
        job = await self.grounded(request.job([*earlier, *items], served.defaults), served)
        generated = await generate(job, served, trace)
        writer = response_answers.ResponseWriter(
            request,
            generated.counts,
            served.llm.tokenizer,
            temperature=job.params.temperature,
            top_p=job.params.top_p,
        )

        def keep() -> None:
            if request.store is not False:
                self.stored.add(writer.body, [*earlier, *items])

        if request.stream:
            return _streamed(_then(response_answers.stream(writer, generated), keep))
        body = await response_answers.complete(writer, generated)
        keep()
        return JSONResponse(body)

    async def tokenize(self, request: tokens.TokenizeRequest, trace: RequestTrace) -> Response:
        """Answers `POST /tokenize`."""
        served = await self.open(request.model, trace)
        return JSONResponse(await asyncio.to_thread(tokens.tokenize, request, served))

    async def detokenize(self, request: tokens.DetokenizeRequest, trace: RequestTrace) -> Response:
        """Answers `POST /detokenize`."""
        served = await self.open(request.model, trace)
        return JSONResponse(await asyncio.to_thread(tokens.detokenize, request, served))

    async def apply_template(
        self, request: tokens.ApplyTemplateRequest, trace: RequestTrace
    ) -> Response:
        """Answers `POST /apply-template`."""
        served = await self.open(request.model, trace)
        ids, text = await asyncio.to_thread(request.rendered, served)
        return JSONResponse({"prompt": text, "count": len(ids)})

    async def load_adapter(self, request: LoadAdapterRequest, trace: RequestTrace) -> Response:
        """Answers `POST /v1/load_lora_adapter`."""
        del trace
        await self.models.load_adapter(request.lora_name, request.lora_path, request.model)
        return JSONResponse({"loaded": request.lora_name})

    async def unload_adapter(self, request: UnloadAdapterRequest, trace: RequestTrace) -> Response:
        """Answers `POST /v1/unload_lora_adapter`."""
        del trace
        await self.models.unload_adapter(request.lora_name)
        return JSONResponse({"unloaded": request.lora_name})

    async def load_model(self, request: ModelRequest, trace: RequestTrace) -> Response:
        """Answers `POST /models/load`."""
        await self.open(request.model, trace)
        return JSONResponse({"loaded": request.model})

    async def unload_model(self, request: ModelRequest, trace: RequestTrace) -> Response:
        """Answers `POST /models/unload`."""
        del trace
        await self.models.unload(request.model)
        return JSONResponse({"unloaded": request.model})


POSTS: dict[str, tuple[type[BaseModel], str, str]] = {
    "/v1/chat/completions": (ChatRequest, "chat", "messages"),
    "/v1/completions": (CompletionRequest, "complete", "prompt"),
    "/v1/embeddings": (EmbeddingRequest, "embed", "input"),
    "/v1/responses": (ResponseRequest, "respond", "input"),
    "/v1/messages": (MessagesRequest, "message", "messages"),
    "/v1/messages/count_tokens": (CountRequest, "count", "messages"),
    "/v1/load_lora_adapter": (LoadAdapterRequest, "load_adapter", "lora_path"),
    "/v1/unload_lora_adapter": (UnloadAdapterRequest, "unload_adapter", "lora_name"),
    "/models/load": (ModelRequest, "load_model", "model"),
    "/models/unload": (ModelRequest, "unload_model", "model"),
    "/tokenize": (tokens.TokenizeRequest, "tokenize", "prompt"),
    "/detokenize": (tokens.DetokenizeRequest, "detokenize", "tokens"),
    "/apply-template": (tokens.ApplyTemplateRequest, "apply_template", "messages"),
}
"""The fields of each route's request, the method of `Call` that answers it, and the field with the
text to continue."""
RAG_POSTS: dict[str, tuple[type[BaseModel], str, str]] = {
    "/v1/rag/ask": (AskRequest, "ask", "question"),
    "/v1/rag/search": (SearchRequest, "search", "query"),
}
"""The routes that exist only with an index; as in `POSTS`."""


async def _awaited(work: Awaitable[Response]) -> Response:
    return await work


def _streamed(events: AsyncIterator[str]) -> Response:
    # `no` keeps proxies such as nginx from holding events back
    return StreamingResponse(events, media_type=MEDIA_TYPE, headers={"X-Accel-Buffering": "no"})


async def _then(events: AsyncIterator[str], work: Callable[[], None]) -> AsyncIterator[str]:
    """Yields the events, then runs `work`; not if the client leaves before."""
    async for event in events:
        yield event
    work()
