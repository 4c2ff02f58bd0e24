"""`POST /v1/embeddings`."""

from __future__ import annotations

import asyncio
import base64
import uuid
from collections.abc import Sequence

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from maxlike.engine.output import EmbeddingOutput
from maxlike.serve.body import read_body
from maxlike.serve.json_reply import JsonReply
from maxlike.serve.protocol import EmbeddingRequest
from maxlike.serve.replies import Embedding, Embeddings, EmbeddingUsage
from maxlike.serve.service import Service


async def embeddings(service: Service, request: Request) -> Response:
    """The endpoint `/v1/embeddings`; an `ApiError` that it raises becomes its answer."""
    body = await read_body(request, EmbeddingRequest, service.config)
    service.check_model(body.model)
    prompts = await service.token_ids(body.input)
    service.check_count(len(prompts), 1)
    for prompt in prompts:
        service.room_for(len(prompt), 0, "input")
    outputs = await service.admission.run(_embed(service, prompts), request.receive)
    data = [Embedding(index=i, embedding=_encode(output.embedding, body.encoding_format == "base64"))
            for i, output in enumerate(outputs)]
    n_tokens = sum(map(len, prompts))
    return JsonReply(Embeddings(data=data, model=service.name,
                                usage=EmbeddingUsage(prompt_tokens=n_tokens, total_tokens=n_tokens)))


async def _embed(service: Service, prompts: Sequence[list[int]]) -> list[EmbeddingOutput]:
    name = uuid.uuid4().hex
    tasks = [asyncio.create_task(service.engine.embed(prompt, f"{name}-{i}")) for i, prompt in enumerate(prompts)]
    try:
        return await asyncio.gather(*tasks)
    finally:
        # One that fails ends the others, and so does a client that hangs up.
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _encode(embedding: Sequence[float], as_base64: bool) -> list[float] | str:
    if as_base64:
        return base64.b64encode(np.asarray(embedding, "<f4").tobytes()).decode()
    return list(embedding)
