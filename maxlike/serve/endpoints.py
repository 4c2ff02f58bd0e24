"""Every path that the server has, stated once: routes and OpenAPI are made of this list."""

from __future__ import annotations

from importlib import resources

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from maxlike.serve.chat import chat_completions
from maxlike.serve.completions import completions
from maxlike.serve.embeddings import embeddings
from maxlike.serve.json_reply import JsonReply
from maxlike.serve.openapi import Endpoint, describe
from maxlike.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from maxlike.serve.replies import (
    ChatCompletion,
    Completion,
    Embeddings,
    ModelCard,
    ModelFacts,
    ModelList,
    Prompt,
    Status,
    TokenizerInfo,
    Tokens,
)
from maxlike.serve.service import Service
from maxlike.serve.tokenization import detokenize, tokenize, tokenizer_info

_PAGE_POLICY = "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'"


async def list_models(service: Service, request: Request) -> Response:
    """The model, in a list."""
    return JsonReply(ModelList(data=[_card(service)]))


async def get_model(service: Service, request: Request) -> Response:
    """The model, by its name, which may have slashes in it."""
    service.check_model(request.path_params["model"])
    return JsonReply(_card(service))


def _card(service: Service) -> ModelCard:
    limit = service.engine.max_model_len
    return ModelCard(id=service.name, created=service.created, parent=service.config.base_model_name,
                     max_model_len=limit,
                     maxlike=ModelFacts(has_chat_template=service.has_chat_template, max_model_len=limit))


async def health(service: Service, request: Request) -> Response:
    """200 for as long as the engine lives."""
    if service.engine.error is not None:
        return JsonReply(Status(status="the engine has failed"), 503)
    return JsonReply(Status(status="alive"))


async def ready(service: Service, request: Request) -> Response:
    """200 while new requests are welcome: the engine is warm, and nobody has told the server to stop."""
    if service.admission.draining:
        return JsonReply(Status(status="draining"), 503)
    if service.engine.error is not None:
        return JsonReply(Status(status="the engine has failed"), 503)
    if not service.engine.is_ready:
        return JsonReply(Status(status="starting"), 503)
    return JsonReply(Status(status="ready"))


async def metrics(service: Service, request: Request) -> Response:
    """For Prometheus."""
    return Response(service.metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def page(service: Service, request: Request) -> Response:
    """A page to chat with the model."""
    text = resources.files("maxlike.serve").joinpath("chat.html").read_bytes()
    return Response(text, media_type="text/html; charset=utf-8", headers={
        "Content-Security-Policy": _PAGE_POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"})


async def openapi(service: Service, request: Request) -> Response:
    """The description of all this."""
    return JSONResponse(describe(ENDPOINTS, with_key=bool(service.config.api_keys)))


ENDPOINTS = (
    Endpoint("POST", "/v1/chat/completions", chat_completions, "Answer a conversation", ChatRequest, ChatCompletion,
             streams=True),
    Endpoint("POST", "/v1/completions", completions, "Continue a text", CompletionRequest, Completion, streams=True),
    Endpoint("POST", "/v1/embeddings", embeddings, "Embed texts", EmbeddingRequest, Embeddings),
    Endpoint("GET", "/v1/models", list_models, "The model, in a list", reply=ModelList),
    Endpoint("GET", "/v1/models/{model:path}", get_model, "The model by its name", reply=ModelCard,
             may_lack=True),
    Endpoint("POST", "/tokenize", tokenize, "Text to token ids", TokenizeRequest, Tokens),
    Endpoint("POST", "/detokenize", detokenize, "Token ids to text", DetokenizeRequest, Prompt),
    Endpoint("GET", "/tokenizer_info", tokenizer_info, "Special tokens and chat template", reply=TokenizerInfo,
             may_lack=True),
    Endpoint("GET", "/health", health, "Whether the engine lives", reply=Status, not_ready=True),
    Endpoint("GET", "/ready", ready, "Whether new requests are welcome", reply=Status, not_ready=True),
    Endpoint("GET", "/metrics", metrics, "Figures for Prometheus", media_type="text/plain"),
    Endpoint("GET", "/openapi.json", openapi, "This description"),
    Endpoint("GET", "/", page, "A page to chat with the model", media_type="text/html"),
)
"""All of them."""
