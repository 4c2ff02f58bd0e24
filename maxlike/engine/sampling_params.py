"""What a request asks for: how tokens are drawn, when to stop, what else to report."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

MAX_LOGPROBS = 20
"""Most alternatives that are reported beside a token, as OpenAI has it."""
MAX_EDITS = 320
"""Most token ids that a request may treat apart: `logit_bias`, and those that `min_tokens` holds back."""
_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)
_SMALLEST_FLOAT32 = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class StructuredOutput:
    """What the text must look like: exactly one of these.

    Args:
        json: a JSON schema, as an object or as text.
        json_object: any JSON object.
        regex: a regular expression that the whole text matches.
        choice: one of these texts.
        grammar: a context-free grammar in llguidance's Lark dialect.

    Raises:
        ValueError: none or several are given, or one is of the wrong type.
    """

    json: str | Mapping[str, Any] | bool | None = None
    json_object: bool = False
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("json", "regex", "choice", "grammar") if getattr(self, name) is not None]
        given += ["json_object"] * bool(self.json_object)
        if len(given) != 1:
            raise ValueError("StructuredOutput takes one of json, json_object, regex, choice and grammar; got "
                             f"{', '.join(given) or 'none'}.")
        if isinstance(self.json, str):
            try:
                json.loads(self.json)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"StructuredOutput.json is not JSON: {error}.") from None
        elif not isinstance(self.json, Mapping | bool | None):
            raise ValueError("StructuredOutput.json must be a schema, as an object or as text; got "
                             f"{type(self.json).__name__}.")
        if self.choice is not None:
            texts = () if isinstance(self.choice, str) else _listed("StructuredOutput.choice", self.choice)
            if not texts or not all(isinstance(text, str) and text for text in texts):
                raise ValueError("StructuredOutput.choice must be a list of at least one text, none empty; got "
                                 f"{self.choice!r}.")
            object.__setattr__(self, "choice", texts)
        for name in ("regex", "grammar"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ValueError(f"StructuredOutput.{name} must be text; got {type(value).__name__}.")


@dataclass(frozen=True)
class SamplingParams:
    """How a request's tokens are drawn, by the names and with the defaults of vLLM.

    Args:
        n: independent continuations of the prompt.
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: only the k likeliest tokens; 0 or -1: all.
        top_p: only the likeliest tokens that together reach this probability (Holtzman et al. 2020,
            https://arxiv.org/abs/1904.09751), measured after temperature and top-k; 1: all.
        min_p: only tokens at least so likely, relative to the likeliest (Nguyen et al. 2024,
            https://arxiv.org/abs/2407.01082), measured after temperature; 0: all.
        repetition_penalty: logits of tokens in prompt or output are divided by it where positive, else multiplied
            (Keskar et al. 2019, https://arxiv.org/abs/1909.05858); 1: none.
        frequency_penalty, presence_penalty: taken off a token's logit for each time that it stands in the output, and
            once if it does (OpenAI); 0: none.
        logit_bias: token id -> added to its logit; at most -100 and 100 forbid and force, as OpenAI has it.
        seed: of the draws; the same seed gives the same text, whatever else runs. `None`: another one each time.
        stop: texts that end the output, themselves left out of it.
        stop_token_ids: token ids that end it, beside the model's own.
        ignore_eos: go on past the model's own.
        max_tokens: at most so many new ones; `None`: as many as the model takes. With 0 the prompt is only read, for
            `prompt_logprobs`.
        min_tokens: before so many, no token that would end the output is drawn, and no stop text looked for.
        logprobs: report each token's log-probability, and those of so many likeliest; `None`: not.
        prompt_logprobs: the same of the prompt's tokens. Log-probabilities are the model's own: before penalties,
            bias, temperature and limits.
        include_stop_str_in_output: leave the stop text in.
        skip_special_tokens: leave special tokens out of the text.
        structured_output: what the text must look like.

    Raises:
        ValueError: a value is out of range.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    structured_output: StructuredOutput | None = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else _listed("stop", self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", _listed("stop_token_ids", self.stop_token_ids))
        if not isinstance(self.logit_bias, Mapping | None):
            raise ValueError("logit_bias must map token ids to what is added to their logits, such as {11: -100}; got "
                             f"{self.logit_bias!r}.")
        object.__setattr__(self, "logit_bias", dict(self.logit_bias or {}))
        _whole("n", self.n, 1, 128)
        _between("temperature", self.temperature, 0, _LARGEST_FLOAT32, "0 (greedy) or above, within float32")
        if self.top_k != -1:
            _whole("top_k", self.top_k, 0, 2**31 - 1, "0 or -1 (all tokens) or above, within int32")
        if not (_number("top_p", self.top_p) and 0 < self.top_p <= 1):
            raise ValueError(f"top_p must be above 0 and at most 1; got {self.top_p}.")
        _between("min_p", self.min_p, 0, 1)
        if not (_number("repetition_penalty", self.repetition_penalty)
                and _SMALLEST_FLOAT32 <= self.repetition_penalty <= _LARGEST_FLOAT32):
            raise ValueError(f"repetition_penalty must be above 0, within float32; got {self.repetition_penalty}.")
        _between("frequency_penalty", self.frequency_penalty, -2, 2)
        _between("presence_penalty", self.presence_penalty, -2, 2)
        if self.seed is not None:
            _whole("seed", self.seed, -(2**63), 2**63 - 1)
            object.__setattr__(self, "seed", int(self.seed))  # the seeds of n > 1 follow it, beyond a numpy integer's
        if self.max_tokens is not None:
            _whole("max_tokens", self.max_tokens, 0)
        _whole("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens must be at most max_tokens; got {self.min_tokens} and {self.max_tokens}.")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 0, MAX_LOGPROBS)
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise ValueError(f"stop must be texts, none empty; got {text!r}.")
        for id in self.stop_token_ids:
            _whole("stop_token_ids", id, 0, 2**31 - 1)
        if len(self.logit_bias) + len(self.stop_token_ids) > MAX_EDITS - 20:
            raise ValueError(f"logit_bias and stop_token_ids may name {MAX_EDITS - 20} token ids together; got "
                             f"{len(self.logit_bias)} and {len(self.stop_token_ids)}.")
        for id, bias in self.logit_bias.items():
            _whole("logit_bias's token id", id, 0, 2**31 - 1)
            _between(f"logit_bias of token {id}", bias, -100, 100)
        if self.structured_output is not None and not isinstance(self.structured_output, StructuredOutput):
            raise ValueError("structured_output must be a StructuredOutput, such as StructuredOutput(regex='[0-9]+'); "
                             f"got {type(self.structured_output).__name__}.")

    @property
    def is_penalised(self) -> bool:
        """Whether tokens are treated by how often they stand in prompt and output."""
        return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1, 0, 0)

    @property
    def is_plainly_greedy(self) -> bool:
        """Whether the model's likeliest token is always taken, and no more is asked."""
        return (self.temperature == 0 and self.logprobs is None and self.structured_output is None
                and not (self.is_penalised or self.logit_bias or self.min_tokens))


def _number(name: str, value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise ValueError(f"{name} must be a number; got {value!r}.")
    return bool(-math.inf < value < math.inf)  # unlike math.isfinite, for whole numbers of any size


def _listed(name: str, values: Any) -> tuple[Any, ...]:
    if not isinstance(values, Iterable | None):
        raise ValueError(f"{name} must be a list; got {values!r}.")
    return () if values is None else tuple(values)


def _between(name: str, value: Any, low: float, high: float, says: str = "") -> None:
    if not (_number(name, value) and low <= value <= high):
        raise ValueError(f"{name} must be {says or f'between {low} and {high}'}; got {value}.")


def _whole(name: str, value: Any, low: int, high: int | None = None, says: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ValueError(f"{name} must be a whole number; got {value!r}.")
    if value < low or (high is not None and value > high):
        says = says or (f"at least {low}" if high is None else f"between {low} and {high}")
        raise ValueError(f"{name} must be {says}; got {value}.")
