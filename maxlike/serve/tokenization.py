"""`/tokenize`, `/detokenize` and `/tokenizer_info`, as vLLM has them."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from maxlike.serve.body import read_body
from maxlike.serve.conversation import conversation_ids
from maxlike.serve.errors import ApiError
from maxlike.serve.json_reply import JsonReply
from maxlike.serve.protocol import DetokenizeRequest, TokenizeRequest
from maxlike.serve.replies import Prompt, TokenizerInfo, Tokens
from maxlike.serve.service import Service, in_thread


async def tokenize(service: Service, request: Request) -> Response:
    """Text, or a conversation, to token ids."""
    body = await read_body(request, TokenizeRequest, service.config)
    service.check_model(body.model)
    if body.messages is not None:
        token_ids = await conversation_ids(service, body.messages, body)
    else:
        assert body.prompt is not None
        tokenizer = service.tokenizer_for("tokenize")
        token_ids = await in_thread(tokenizer.encode, body.prompt,
                                    add_special_tokens=body.add_special_tokens is not False)
    names = await in_thread(lambda: list(map(service.names.name, token_ids))) if body.return_token_strs else None
    return JsonReply(Tokens(count=len(token_ids), max_model_len=service.engine.max_model_len, tokens=token_ids,
                            token_strs=names))


async def detokenize(service: Service, request: Request) -> Response:
    """Token ids to text, special tokens included."""
    body = await read_body(request, DetokenizeRequest, service.config)
    service.check_model(body.model)
    tokenizer = service.tokenizer_for("detokenize")
    return JsonReply(Prompt(prompt=await in_thread(tokenizer.decode, body.tokens, skip_special_tokens=False)))


async def tokenizer_info(service: Service, request: Request) -> Response:
    """The special tokens and the chat template; an `ApiError` (404) without a tokenizer."""
    tokenizer = service.engine.tokenizer
    if tokenizer is None:
        raise ApiError(404, "The model has no tokenizer.")
    return JsonReply(TokenizerInfo(bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token,
                                   pad_token=tokenizer.pad_token, unk_token=tokenizer.unk_token,
                                   chat_template=tokenizer.chat_template))
