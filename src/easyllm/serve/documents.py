"""Retrieval in the server: answers of a model from the documents of an index.

With an index, the last question of a conversation is answered from its passages, whatever the
dialect of the request; `/v1/rag/ask` returns the citations as well. The passages are found in a
thread, so that the tokens of other clients keep flowing.
"""

import threading
from dataclasses import replace
from typing import Annotated

from pydantic import BeforeValidator, Field

from easyllm.core.json_types import JsonObject
from easyllm.engine.params import SamplingParams
from easyllm.retrieval.ask import Reader
from easyllm.retrieval.ask_config import AskConfig
from easyllm.retrieval.cite import cite, verdict_of
from easyllm.retrieval.generator import EngineGenerator, last_question
from easyllm.retrieval.index import StoredChunk
from easyllm.retrieval.search import Retriever
from easyllm.serve.generate import generate
from easyllm.serve.job import Conversation, Job
from easyllm.serve.models import ServedModel
from easyllm.serve.openai.sampling_fields import whole
from easyllm.serve.output import TextDelta
from easyllm.serve.trace import RequestTrace
from easyllm.serve.treatment import Strict


class AskRequest(Strict):
    """A question that is answered from the index."""

    model: str | None = Field(None, description="Name of a served model; by default the first.")
    question: str = Field(min_length=1, max_length=20_000, description="The question.")
    max_tokens: Annotated[int, Field(ge=1), BeforeValidator(whole)] | None = Field(
        None, description="Maximum number of tokens of the answer."
    )


class SearchRequest(Strict):
    """A question whose passages are returned."""

    query: str = Field(min_length=1, max_length=20_000, description="What to search for.")
    k: Annotated[int, Field(ge=1, le=100), BeforeValidator(whole)] | None = Field(
        None, description="Number of passages; by default that of the server."
    )


class Documents:
    """The index of a server.

    Args:
        retriever: the open index.
        config: how passages are found; techniques that need the model (`rewrite`, `hyde`,
            `sub_questions`, `rerank`) are off.
    """

    def __init__(self, retriever: Retriever, config: AskConfig) -> None:
        self.retriever, self.config = retriever, config
        self._lock = threading.Lock()  # the embedding model is used by one request at a time

    def listing(self) -> JsonObject:
        """Returns the documents with their numbers of chunks."""
        state = self.retriever.index.state
        data = [{"name": n, "chunks": d["count"]} for n, d in sorted(state.documents.items())]
        return {"object": "list", "data": data, "embedder": state.embedder["name"]}

    def search(self, request: SearchRequest) -> JsonObject:
        """Returns the passages for a query, best first."""
        with self._lock:
            hits = self.retriever.search(
                request.query, request.k or self.config.passages, self.config.mode
            )
        data = [{**_shown(hit.chunk), "score": hit.score} for hit in hits]
        return {"object": "list", "data": data}

    def with_passages(self, job: Job, served: ServedModel) -> Job:
        """Returns a job whose last question is asked together with its passages.

        A job without a question, or whose question has no passages, is unchanged.
        """
        talk = job.prompt
        if not isinstance(talk, Conversation) or talk.continue_final_message:
            return job
        question = last_question(talk.messages)
        if not question.strip() or talk.messages[-1].get("role") != "user":
            return job
        passages = self._find(question, served)
        if not passages:
            return job
        *instructions, asked = self._reader(served).messages(question, passages)
        before = list(talk.messages[:-1])
        for instruction in instructions:
            if before and before[0].get("role") == "system":
                content = f"{before[0].get('content') or ''}\n\n{instruction['content']}".strip()
                before[0] = {**before[0], "content": content}
            else:
                before.insert(0, instruction)
        return replace(job, prompt=replace(talk, messages=[*before, asked]))

    def prepare(
        self, request: AskRequest, served: ServedModel
    ) -> tuple[list[JsonObject], list[StoredChunk]]:
        """Returns the messages that ask the model, and the passages in them."""
        passages = self._find(request.question, served)
        return self._reader(served).messages(request.question, passages), passages

    async def answer(
        self,
        request: AskRequest,
        messages: list[JsonObject],
        passages: list[StoredChunk],
        served: ServedModel,
        trace: RequestTrace,
    ) -> JsonObject:
        """Returns the answer with its checked citations, as `easyllm rag ask --json` prints it."""
        text = ""
        if passages:
            params = SamplingParams(
                temperature=0.0, max_tokens=request.max_tokens or self.config.max_tokens
            )
            job = Job(model=served.name, prompt=Conversation(messages=messages), params=params)
            generated = await generate(job, served, trace)
            async for events in generated.events:
                text += "".join(e.text for e in events if isinstance(e, TextDelta))
        text = text.strip()
        citations = cite(request.question, text, passages)
        return {
            "object": "rag.answer",
            "model": served.name,
            "question": request.question,
            "text": text,
            "verdict": verdict_of(text, citations),
            "citations": [citation.as_dict() for citation in citations],
            "passages": [_shown(passage) for passage in passages],
        }

    def _find(self, question: str, served: ServedModel) -> list[StoredChunk]:
        with self._lock:
            return self._reader(served).find(question)[0]

    def _reader(self, served: ServedModel) -> Reader:
        return Reader(self.retriever, EngineGenerator(served.llm), self.config)


def _shown(chunk: StoredChunk) -> JsonObject:
    """Returns a passage as it is sent to clients."""
    return {
        "document": chunk.document,
        "page": chunk.page,
        "headings": list(chunk.headings),
        "start": chunk.start,
        "end": chunk.end,
        "text": chunk.text,
    }


__all__ = ["AskRequest", "Documents", "SearchRequest"]
