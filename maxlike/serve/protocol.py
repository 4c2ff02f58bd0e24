"""What a request may say: OpenAI's fields, and vLLM's beside them. What is not here is refused by name.

Fields that are `None` count as not given. Every field has its effect; the exceptions are in `Harmless`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, WrapValidator
from pydantic import model_validator as validator

from maxlike.engine.sampling_params import MAX_LOGPROBS, SamplingParams, StructuredOutput
from maxlike.serve.config import MAX_PROMPTS

MAX_STOP = 4096
"""Most characters of all stop texts: the engine takes time to prepare them, for each continuation."""

Text = Annotated[str, StringConstraints(min_length=1)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]


def _in_one_line(expected: str) -> WrapValidator:
    """Says what is expected in one line, where pydantic has several for each alternative."""

    def validate(value: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise ValueError(f"must be {expected}; got {repr(value)[:80]}.") from None

    return WrapValidator(validate)


Prompts = Annotated[
    str | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)] | TokenIds
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)],
    _in_one_line(f"a text, a list of texts, a list of token ids, or a list of such lists, none empty, at most "
                 f"{MAX_PROMPTS} of them")]
Stop = Annotated[Text | Annotated[list[Text], Field(max_length=64)],
                 _in_one_line("a text or at most 64 of them, none empty")]


class Body(BaseModel):
    """An object whose fields are all known, of the types that they say, and finite."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class Harmless(Body):
    """Fields of OpenAI's that are taken and do nothing, since they never change the answer: they are for its books."""

    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class StreamOptions(Body):
    """`include_usage`: a last chunk says how many tokens there were."""

    include_usage: bool | None = None


class StructuredOutputs(Body):
    """What the text must look like: one of these."""

    json_schema: dict[str, Any] | str | bool | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: Annotated[list[Text], Field(min_length=1)] | None = None
    grammar: str | None = None

    def structured_output(self) -> StructuredOutput:
        """The same for the engine. Raises `ValueError` for none or several."""
        return StructuredOutput(json=self.json_schema, json_object=bool(self.json_object), regex=self.regex,
                                choice=self.choice, grammar=self.grammar)


class Generation(Harmless):
    """What completions and chat completions share."""

    model: str | None = None
    n: int | None = Field(None, ge=1, le=128)
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[Annotated[str, StringConstraints(pattern=r"^[0-9]{1,10}$")],
                     Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = None
    max_tokens: int | None = Field(None, ge=0)
    min_tokens: int | None = Field(None, ge=0)
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    priority: int | None = Field(None, ge=-(2**31), lt=2**31)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @validator(mode="after")
    def _stop_is_short(self) -> Self:
        length = len(self.stop) if isinstance(self.stop, str) else sum(map(len, self.stop or ()))
        if length > MAX_STOP:
            raise ValueError(f"stop may have {MAX_STOP} characters in all; got {length}.")
        return self

    @validator(mode="after")
    def _options_of_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream to be true.")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of figures."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling_params(self, **more: Any) -> SamplingParams:
        """What the engine is asked for; `more` are further fields of it, and win. Raises `ValueError`."""
        names = ("n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty",
                 "presence_penalty", "seed", "stop", "stop_token_ids", "ignore_eos", "max_tokens", "min_tokens",
                 "include_stop_str_in_output", "skip_special_tokens")
        given: dict[str, Any] = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.logit_bias:
            given["logit_bias"] = {int(id): bias for id, bias in self.logit_bias.items()}
        if self.structured_outputs is not None:
            given["structured_output"] = self.structured_outputs.structured_output()
        return SamplingParams(**(given | more))


class CompletionRequest(Generation):
    """`POST /v1/completions`."""

    prompt: Prompts
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    best_of: int | None = Field(None, ge=1, le=128)
    suffix: None = None

    @validator(mode="after")
    def _best_of_is_n(self) -> Self:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError(f"best_of={self.best_of} with n={self.n or 1}: the server returns all that it generates, "
                             "so best_of must equal n.")
        return self


class TextPart(Body):
    """A part of a message's content; text is all there is."""

    type: Literal["text"]
    text: str


class CalledFunction(Body):
    """What an assistant called; `arguments` is a JSON object, as text."""

    name: str
    arguments: str


class ToolCall(Body):
    """A call in an assistant's message."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Body):
    """A message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | list[TextPart], _in_one_line("a text, or a list of parts {'type': 'text', 'text': ...}; "
                                                          "there are no others")] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    # What OpenAI's client sends back of our answers, as empty as it was.
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None


class Function(Body):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool; functions are all there is."""

    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    """A function by its name."""

    name: str


class NamedTool(Body):
    """A tool by its name."""

    type: Literal["function"]
    function: NamedFunction


class NamedSchema(Body):
    """A JSON schema with a name. It is always held to, so that `strict` may be either."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """What an answer must look like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @validator(mode="after")
    def _schema_where_it_belongs(self) -> Self:
        if self.type != "json_schema":
            if self.json_schema is not None:
                raise ValueError(f"type {self.type!r} takes no json_schema.")
        elif self.json_schema is None or self.json_schema.schema_ is None:
            raise ValueError("type 'json_schema' needs a json_schema.schema.")
        return self

    def structured_output(self) -> StructuredOutput | None:
        """The same for the engine."""
        if self.json_schema is not None:
            return StructuredOutput(json=self.json_schema.schema_)
        return StructuredOutput(json_object=True) if self.type == "json_object" else None


class Templated(Body):
    """What goes into the chat template beside the messages."""

    tools: Annotated[list[Tool], Field(min_length=1, max_length=128)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None


class ChatRequest(Generation, Templated):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    response_format: ResponseFormat | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None

    @validator(mode="after")
    def _belongs_together(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true.")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError(f"max_tokens={self.max_tokens} and max_completion_tokens={self.max_completion_tokens} are "
                             "the same thing: give one of them.")
        if self.tool_choice not in (None, "none") and not self.tools:
            raise ValueError("tool_choice needs tools.")
        if isinstance(self.tool_choice, NamedTool):
            names = [tool.function.name for tool in self.tools or []]
            if self.tool_choice.function.name not in names:
                raise ValueError(f"tool_choice names {self.tool_choice.function.name!r}, which is not among the tools: "
                                 f"{', '.join(names)}.")
        return self


class EmbeddingRequest(Harmless):
    """`POST /v1/embeddings`."""

    input: Prompts
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None


class TokenizeRequest(Templated):
    """`POST /tokenize`: a text, or messages and what the chat template makes of them."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    @validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages.")
        stray = [name for name in Templated.model_fields if getattr(self, name) is not None and self.messages is None]
        if stray:
            raise ValueError(f"{', '.join(stray)} goes with messages; there is a prompt.")
        if self.messages is not None and self.add_special_tokens:
            raise ValueError("add_special_tokens goes with prompt; the chat template writes its own special tokens.")
        return self


class DetokenizeRequest(Body):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: list[TokenId] = Field(fail_fast=True)
