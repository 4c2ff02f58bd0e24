"""The published OpenAPI: true, and a source of requests that the server must bear."""

import warnings
from typing import Any

import httpx2
import hypothesis
import pytest

from maxlike.serve.endpoints import ENDPOINTS
from maxlike.serve.openapi import describe
from tests.serve.fake_engine import FakeEngine
from tests.serve.serving import serving

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of libraries that it brings
    schemathesis = pytest.importorskip("schemathesis")
    from schemathesis.checks import load_all_checks

# What the server does is what it says, whatever comes in. (That what it says is valid is taken, and nothing else is,
# goes further than a schema can say: the prompt must fit the model, the JSON schema must be one.)
load_all_checks()
CHECKS = [schemathesis.checks.CHECKS.get_one(name) for name in (
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance",
    "negative_data_rejection", "unsupported_method")]
SCHEMA = schemathesis.openapi.from_dict(describe(ENDPOINTS, with_key=False))


def settings(max_examples: int) -> hypothesis.settings:
    return hypothesis.settings(max_examples=max_examples, deadline=None, database=None,
                               suppress_health_check=list(hypothesis.HealthCheck))


@SCHEMA.parametrize()
@settings(max_examples=10)
def test_whatever_it_allows_or_forbids_is_answered(case: Any, client: httpx2.Client) -> None:
    case.call_and_validate(base_url=str(client.base_url), checks=CHECKS)


@pytest.mark.slow
@SCHEMA.parametrize()
@settings(max_examples=200)
def test_more_of_it(case: Any, client: httpx2.Client) -> None:
    case.call_and_validate(base_url=str(client.base_url), checks=CHECKS)


def test_it_is_published(client: httpx2.Client) -> None:
    document = client.get("/openapi.json").json()
    assert document["openapi"] == "3.1.0" and "securitySchemes" not in document["components"]
    for path, body in (("/v1/completions", "CompletionRequest"), ("/v1/chat/completions", "ChatRequest")):
        content = document["paths"][path]["post"]["requestBody"]["content"]
        assert content["application/json"]["schema"] == {"$ref": f"#/components/schemas/{body}"}
        assert document["components"]["schemas"][body]["additionalProperties"] is False
    assert "422" not in client.get("/openapi.json").text


def test_a_key_is_part_of_it() -> None:
    with serving(FakeEngine(), api_keys=("key",)) as (client, _):
        document = client.get("/openapi.json", headers={"Authorization": "Bearer key"}).json()
    assert document["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert ("401" in operation["responses"]) == ("security" in operation) == (
                path not in ("/", "/health", "/ready"))
