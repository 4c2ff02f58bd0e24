"""What `SamplingParams` and `StructuredOutput` take, and what they say of what they do not."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from maxlike.engine.sampling_params import MAX_EDITS, MAX_LOGPROBS, SamplingParams, StructuredOutput

NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize("wrong, says", [
    (dict(n=0), "n must be between 1 and 128; got 0"),
    (dict(n=129), "n must be between 1 and 128; got 129"),
    (dict(n=1.0), "n must be a whole number; got 1.0"),
    (dict(n=True), "n must be a whole number; got True"),
    (dict(temperature=-0.1), "temperature must be 0 .*got -0.1"),
    (dict(temperature=NAN), "temperature must be 0 .*got nan"),
    (dict(temperature=INFINITY), "temperature must be 0 .*got inf"),
    (dict(temperature=1e39), r"temperature must be 0 .*float32; got 1e\+39"),
    (dict(temperature=10**400), "temperature must be 0 .*float32; got 1000"),
    (dict(temperature="1"), "temperature must be a number; got '1'"),
    (dict(temperature=True), "temperature must be a number; got True"),
    (dict(temperature=None), "temperature must be a number; got None"),
    (dict(top_k=-2), "top_k must be 0 or -1 .*got -2"),
    (dict(top_k=2**31), "top_k must be 0 .*int32; got 2147483648"),
    (dict(top_k=5.0), "top_k must be a whole number; got 5.0"),
    (dict(top_p=0.0), "top_p must be above 0 .*got 0.0"),
    (dict(top_p=1.1), "top_p must be above 0 .*got 1.1"),
    (dict(top_p=NAN), "top_p must be above 0 .*got nan"),
    (dict(top_p=[0.5]), r"top_p must be a number; got \[0.5\]"),
    (dict(min_p=-0.1), "min_p must be between 0 and 1; got -0.1"),
    (dict(min_p=1.01), "min_p must be between 0 and 1; got 1.01"),
    (dict(min_p=NAN), "min_p must be between 0 and 1; got nan"),
    (dict(repetition_penalty=0), "repetition_penalty must be above 0, .*got 0"),
    (dict(repetition_penalty=-1.0), "repetition_penalty must be above 0, .*got -1.0"),
    (dict(repetition_penalty=INFINITY), "repetition_penalty must be .* float32; got inf"),
    (dict(repetition_penalty=1e39), r"repetition_penalty must be .* float32; got 1e\+39"),
    (dict(frequency_penalty=2.1), "frequency_penalty must be between -2 and 2; got 2.1"),
    (dict(presence_penalty=-2.1), "presence_penalty must be between -2 and 2; got -2.1"),
    (dict(presence_penalty=NAN), "presence_penalty must be between -2 and 2; got nan"),
    (dict(logit_bias={-1: 1}), "logit_bias's token id must be between 0 and 2147483647; got -1"),
    (dict(logit_bias={2**31: 1}), "logit_bias's token id must be between 0 .*got 2147483648"),
    (dict(logit_bias={"5": 1}), "logit_bias's token id must be a whole number; got '5'"),
    (dict(logit_bias={5: 100.5}), "logit_bias of token 5 must be between -100 and 100; got 100.5"),
    (dict(logit_bias={5: -INFINITY}), "logit_bias of token 5 must be between -100 and 100; got -inf"),
    (dict(logit_bias={5: "a"}), "logit_bias of token 5 must be a number; got 'a'"),
    (dict(logit_bias=[5]), r"logit_bias must map token ids .*got \[5\]"),
    (dict(logit_bias=dict.fromkeys(range(200), 1), stop_token_ids=range(101)), "may name 300 token ids .*200 and 101"),
    (dict(seed=-(2**63) - 1), "seed must be between -9223372036854775808 and 9223372036854775807; got -922"),
    (dict(seed=2**63), "seed must be between .*got 9223372036854775808"),
    (dict(seed=1.5), "seed must be a whole number; got 1.5"),
    (dict(stop=""), "stop must be texts, none empty; got ''"),
    (dict(stop=["a", ""]), "stop must be texts, none empty; got ''"),
    (dict(stop=[5]), "stop must be texts, none empty; got 5"),
    (dict(stop=5), "stop must be a list; got 5"),
    (dict(stop_token_ids=[-1]), "stop_token_ids must be between 0 and 2147483647; got -1"),
    (dict(stop_token_ids="12"), "stop_token_ids must be a whole number; got '1'"),
    (dict(stop_token_ids=12), "stop_token_ids must be a list; got 12"),
    (dict(max_tokens=-1), "max_tokens must be at least 0; got -1"),
    (dict(max_tokens=2.5), "max_tokens must be a whole number; got 2.5"),
    (dict(min_tokens=-1), "min_tokens must be at least 0; got -1"),
    (dict(min_tokens=17), "min_tokens must be at most max_tokens; got 17 and 16"),
    (dict(logprobs=-1), "logprobs must be between 0 and 20; got -1"),
    (dict(logprobs=MAX_LOGPROBS + 1), "logprobs must be between 0 and 20; got 21"),
    (dict(logprobs=True), "logprobs must be a whole number; got True"),
    (dict(prompt_logprobs=21), "prompt_logprobs must be between 0 and 20; got 21"),
    (dict(structured_output={"regex": "a"}), "structured_output must be a StructuredOutput.*got dict"),
])
def test_params_out_of_range(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        SamplingParams(**wrong)


def test_params_at_the_ends_of_their_ranges() -> None:
    SamplingParams(n=1, temperature=0, top_k=-1, top_p=1e-9, min_p=0, repetition_penalty=1e-9, frequency_penalty=-2,
                   presence_penalty=-2, seed=-(2**63), max_tokens=0, min_tokens=0, logprobs=0, prompt_logprobs=0)
    SamplingParams(n=128, temperature=3.4e38, top_k=2**31 - 1, top_p=1, min_p=1, repetition_penalty=3.4e38,
                   frequency_penalty=2, presence_penalty=2, seed=2**63 - 1, max_tokens=None, min_tokens=2**40,
                   logprobs=MAX_LOGPROBS, prompt_logprobs=MAX_LOGPROBS, logit_bias={0: -100, 2**31 - 1: 100})
    SamplingParams(temperature=1e-44, max_tokens=16, min_tokens=16)
    SamplingParams(logit_bias=dict.fromkeys(range(200), 1), stop_token_ids=range(MAX_EDITS - 220))


def test_defaults_are_those_of_vllm() -> None:
    defaults = dataclasses.asdict(SamplingParams())
    assert defaults == dict(
        n=1, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, frequency_penalty=0.0,
        presence_penalty=0.0, logit_bias={}, seed=None, stop=(), stop_token_ids=(), ignore_eos=False, max_tokens=16,
        min_tokens=0, logprobs=None, prompt_logprobs=None, include_stop_str_in_output=False, skip_special_tokens=True,
        structured_output=None)


def test_one_text_and_none_and_numpys_numbers_are_taken() -> None:
    params = SamplingParams(stop="end", stop_token_ids=np.array([3, 4]), logit_bias=None, temperature=np.float32(0.5),
                            top_k=np.int64(4), seed=np.int32(-2), n=np.uint8(2))
    assert (params.stop, params.stop_token_ids, params.logit_bias) == (("end",), (3, 4), {})
    assert type(params.seed) is int and params.seed == -2
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(stop=None, stop_token_ids=None).stop == ()


def test_what_is_given_is_copied() -> None:
    stop, bias = ["a"], {1: 2.0}
    params = SamplingParams(stop=stop, logit_bias=bias)
    stop.append("")
    bias[2] = 1e9
    assert (params.stop, params.logit_bias) == (("a",), {1: 2.0})
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2


@pytest.mark.parametrize("asked, penalised", [
    (dict(), False), (dict(repetition_penalty=1), False), (dict(repetition_penalty=1.1), True),
    (dict(frequency_penalty=-0.1), True), (dict(presence_penalty=2), True), (dict(logit_bias={1: 1}), False)])
def test_is_penalised(asked: dict[str, Any], penalised: bool) -> None:
    assert SamplingParams(**asked).is_penalised is penalised


@pytest.mark.parametrize("asked, plainly", [
    (dict(), True), (dict(top_k=3, top_p=0.5, min_p=0.2, seed=4, stop="a", prompt_logprobs=3), True),
    (dict(temperature=1e-44), False), (dict(logprobs=0), False), (dict(repetition_penalty=2), False),
    (dict(logit_bias={1: 1}), False), (dict(min_tokens=1), False),
    (dict(structured_output=StructuredOutput(regex="a")), False)])
def test_is_plainly_greedy(asked: dict[str, Any], plainly: bool) -> None:
    assert SamplingParams(**{"temperature": 0, **asked}).is_plainly_greedy is plainly


@pytest.mark.parametrize("given", [
    dict(json={"type": "object"}), dict(json='{"type": "object"}'), dict(json={}), dict(json=True), dict(json="true"),
    dict(json_object=True), dict(regex="[0-9]+"), dict(regex=""), dict(choice=("yes", "no")),
    dict(grammar="start: /a/")])
def test_structured_output_is_one_of_these(given: dict[str, Any]) -> None:
    output = StructuredOutput(**given)
    assert all(getattr(output, name) == value for name, value in given.items())
    assert SamplingParams(structured_output=output).structured_output is output


@pytest.mark.parametrize("wrong, says", [
    (dict(), "takes one of .*got none"),
    (dict(json_object=False), "takes one of .*got none"),
    (dict(regex="a", choice=["a"]), "takes one of .*got regex, choice"),
    (dict(json={}, json_object=True), "takes one of .*got json, json_object"),
    (dict(json="{"), "json is not JSON: Expecting"),
    (dict(json="[" * 100_000), "json is not JSON: "),
    (dict(json=5), "json must be a schema.*got int"),
    (dict(json=["a"]), "json must be a schema.*got list"),
    (dict(regex=5), "regex must be text; got int"),
    (dict(grammar=b"start: /a/"), "grammar must be text; got bytes"),
    (dict(choice="yes"), "choice must be a list of at least one text.*got 'yes'"),
    (dict(choice=[]), r"choice must be a list of at least one text.*got \[\]"),
    (dict(choice=["a", ""]), "choice must be a list of at least one text, none empty; got"),
    (dict(choice=["a", 5]), "choice must be a list of at least one text.*got"),
    (dict(choice=5), "choice must be a list; got 5"),
])
def test_structured_output_that_is_not(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        StructuredOutput(**wrong)


def test_choices_are_copied() -> None:
    choice = ["yes", "no"]
    output = StructuredOutput(choice=choice)
    choice.clear()
    assert output.choice == ("yes", "no")
    assert StructuredOutput(choice=(text for text in ("a", "b"))).choice == ("a", "b")
