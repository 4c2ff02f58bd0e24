"""What the server answers, published in the OpenAPI; the chunks of a stream follow OpenAI's."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

FinishReason = Literal["stop", "length", "tool_calls", "abort"]


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """Any answer that is not 2xx."""

    error: ErrorDetail


class PromptTokensDetails(BaseModel):
    """How many of the prompt's tokens were in the cache already."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(BaseModel):
    """Log-probabilities, a list each over the tokens; `None` for a prompt's first, which nothing precedes.

    `text_offset` is where the choice's text goes on with the token, in characters.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """A continuation. `stop_reason` is the text or token id of the request that ended it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None


class Completion(BaseModel):
    """Of `POST /v1/completions`."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class TopLogprob(BaseModel):
    """A token that was likely, and its UTF-8 bytes, which may be a part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """The token that was drawn."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Of each token of a message."""

    content: list[TokenLogprob]
    refusal: None = None


class CalledFunction(BaseModel):
    """`arguments` is a JSON object, as text."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A function that the model wants called."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class AssistantMessage(BaseModel):
    """The model's answer."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    """An answer. `stop_reason` is the text or token id of the request that ended it."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None


class ChatCompletion(BaseModel):
    """Of `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class EmbeddingUsage(BaseModel):
    """Tokens read."""

    prompt_tokens: int
    total_tokens: int


class Embedding(BaseModel):
    """A text's embedding: numbers, or base64 of little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Embeddings(BaseModel):
    """Of `POST /v1/embeddings`."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class ModelFacts(BaseModel):
    """What clients of maxlike ask beyond OpenAI's."""

    has_chat_template: bool
    max_model_len: int


class ModelCard(BaseModel):
    """The model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "maxlike"
    parent: str | None = None
    """The base under an adapter."""
    max_model_len: int
    maxlike: ModelFacts


class ModelList(BaseModel):
    """Of `GET /v1/models`: there is one."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Tokens(BaseModel):
    """Of `POST /tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Prompt(BaseModel):
    """Of `POST /detokenize`."""

    prompt: str


class TokenizerInfo(BaseModel):
    """Of `GET /tokenizer_info`: what a client needs to build prompts of its own."""

    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None


class Status(BaseModel):
    """Of `GET /health` and `GET /ready`."""

    status: str
