"""Calls of tools in what models write, whole and cut at every place; and grammars that force one."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import maxlike
from maxlike.engine.grammar import GrammarCompiler
from maxlike.models.tokenizer import Tokenizer
from maxlike.serve.tool_calls import KINDS, ToolCallParser, detect, schema_for
from tests.models.test_tokenizer import LLAMA3, QWEN

OPENINGS = {"hermes": "<tool_call>", "llama": "<|python_tag|>", "mistral": "[TOOL_CALLS]"}


def parse(kind, pieces):
    """Content, and (name, arguments) of the calls."""
    parser, content, calls = ToolCallParser(kind), "", []
    for text, found in [*map(parser.push, pieces), parser.flush()]:
        content += text
        for call in found:
            assert call.keys() == {"index", "id", "type", "function"} and call["type"] == "function"
            assert call["index"] == len(calls)
            calls.append(call)
    assert parser.flush() == ("", [])
    assert len({call["id"] for call in calls}) == len(calls)
    for call in calls:
        assert len(call["id"]) == 9 and call["id"].isalnum() if kind == "mistral" else call["id"].startswith("call_")
    return content, [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]


def check(kind, text, content, calls):
    assert parse(kind, [text]) == (content, calls)
    assert parse(kind, list(text)) == (content, calls)
    for i in range(len(text) + 1):
        assert parse(kind, [text[:i], text[i:]]) == (content, calls), i
    assert parse(kind, ["", *(text[i : i + 3] for i in range(0, len(text), 3)), ""]) == (content, calls)


A, B = ("get", {"city": "Köln", "n": [1, {"x": None}]}), ("f", {})
TRICKY = ("say", {"text": 'a "quoted" } ] </tool_call> <tool_call> [TOOL_CALLS] \\" \n; {', "😀": -1.5e3})


def hermes(name, arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"


def llama(name, arguments):
    return json.dumps({"name": name, "parameters": arguments})


def mistral(*calls):
    listed = [{"name": name, "arguments": arguments} for name, arguments in calls]
    return f"[TOOL_CALLS] {json.dumps(listed, ensure_ascii=False)}"


@pytest.mark.parametrize(
    ("kind", "text", "content", "calls"),
    [
        ("hermes", hermes(*A), "", [A]),
        ("hermes", f"{hermes(*A)}\n{hermes(*TRICKY)}\n{hermes(*B)}", "", [A, TRICKY, B]),
        ("hermes", f"\n\nLet me see.\n{hermes(*A)}\n\n{hermes(*B)}\n", "\n\nLet me see.", [A, B]),
        ("hermes", f"<think>\nhm {{\n</think>\n\n{hermes(*A)} So.", "<think>\nhm {\n</think> So.", [A]),
        ("hermes", hermes(*A).removesuffix("</tool_call>"), "", [A]),  # ended by its length or a stop text
        ("hermes", hermes(*A).replace("\n</tool_call>", "<tool_call>") + hermes(*B).removeprefix("<tool_call>"), "",
         [A, B]),
        ("hermes", hermes(*B).replace(', "arguments": {}', ""), "", [B]),
        ("hermes", hermes(*B).replace("{}", "null"), "", [B]),
        ("hermes", hermes("get", json.dumps(A[1])), "", [A]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "b\nc\\ud800"}}</tool_call>', "",
         [("f", {"a": "b\nc\ud800"})]),
        ("hermes", '{"name": "f", "arguments": {}}', '{"name": "f", "arguments": {}}', []),
        ("llama", llama(*A), "", [A]),
        ("llama", f"  <|python_tag|>{llama(*A)}", "", [A]),
        ("llama", f"{llama(*A)}; {llama(*TRICKY)};{llama(*B)}", "", [A, TRICKY, B]),
        ("llama", f"<|python_tag|>{llama(*A)}; <|python_tag|>{llama(*B)}", "", [A, B]),
        ("llama", f"{llama(*A)}\n{llama(*B)}\n", "", [A, B]),
        ("llama", f"I call. <|python_tag|>{llama(*A)}; and", "I call.; and", [A]),
        ("llama", f"{llama(*A)}; <|python", "; <|python", [A]),
        ("llama", json.dumps({"type": "function", "name": "get", "parameters": A[1]}), "", [A]),
        ("mistral", mistral(A, TRICKY, B), "", [A, TRICKY, B]),
        ("mistral", mistral(A).replace("] [", "][") + mistral(B), "", [A, B]),
        ("mistral", f"Well [1].\n{mistral(A)}", "Well [1].", [A]),
        ("mistral", mistral(A, B).removeprefix("[TOOL_CALLS]"), "", [A, B]),
        ("mistral", f" {mistral(A)} [1]", " [1]", [A]),
    ],
)  # fmt: skip
def test_calls(kind, text, content, calls):
    check(kind, text, content, calls)


BROKEN = {
    "hermes": [
        "<tool_call>\n{'name': 'f', 'arguments': {}}\n</tool_call>",
        '<tool_call>{"name": "f", "arguments": {"a": 1}',
        '<tool_call>{"name": "f", "arguments": {"a": "</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": "\\',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "no JSON"}</tool_call>',
        '<tool_call>{"name": "", "arguments": {}}</tool_call>',
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": 1e999}}</tool_call>',
        f'<tool_call>{{"name": "f", "arguments": {{"x": {"9" * 5000}}}}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>',
        '<tool_call>{"name": "f" "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {}]</tool_call>',
        "<tool_call>[]</tool_call> ",
        "<tool_call>get(city)</tool_call>",
        "<tool_call>",
        "\n<tool_call>\n\n",
        "< tool_call> <tool_cal <<tool_call",
        "",
        " \n ",
    ],
    "llama": [
        '{"name": "f", "parameters": {"a": 1}',
        '{"name": "Ann", "age": 3}',
        '{"name": "f", "parameters": null}',
        '{"answer": [1, 2]} and so on',
        "{ braces } in {text}",
        '<|python_tag|>brave_search.call(query="x")',
        '[{"answer": 3}]',
        " ; {",
    ],
    "mistral": [
        '[TOOL_CALLS] [{"name": "f", "arguments": {}}, {"name": "g"',
        '[TOOL_CALLS] [{"name": "f", "arguments": {}}, 3]',
        "[TOOL_CALLS] f {}",
        "[1, 2, 3]",
        '["a", {"name": "f"}]',
        "[TOOL_CALL] [T",
        " [",
    ],
}


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in BROKEN.items() for text in texts])
def test_what_is_no_call_is_content(kind, text):
    if len(text) < 1000:
        check(kind, text, text, [])
    assert parse(kind, [text]) == (text, [])
    # ... and hides none that follows
    good = {"hermes": hermes(*A), "llama": f"<|python_tag|>{llama(*A)}", "mistral": mistral(A)}[kind]
    ends_inside = '"</tool_call>' in text or text.endswith("\\")  # of a text in JSON
    if not ends_inside and text.strip():
        content, calls = parse(kind, [text, "\n.", good])
        assert calls == [A] and content == f"{text}\n."


def test_arguments_nested_beyond_all_measure_are_content():
    text = '<tool_call>{"name": "f", "arguments": ' + '{"a":' * 100_000 + "1" + "}" * 100_001 + "</tool_call>"
    assert parse("hermes", [text]) == (text, [])


@settings(max_examples=500, deadline=None)
@given(data=st.data(), kind=st.sampled_from(KINDS))
def test_however_a_text_is_cut(data, kind):
    calls = {"hermes": hermes(*A), "llama": llama(*A), "mistral": mistral(A, B)}[kind]
    part = st.one_of(st.sampled_from([calls, OPENINGS[kind], "</tool_call>", "{", "}", "[", "]", '"', "\\", ";", " ",
                                      "\n", '{"name": "f", "parameters": {}}', '"a": 1', ","]),
                     st.text("ab<|[{", max_size=3))  # fmt: skip
    text = "".join(data.draw(st.lists(part, max_size=12)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    content, calls = parse(kind, pieces)
    assert (content, calls) == parse(kind, [text]) == parse(kind, list(text))
    if not calls:
        assert content == text
    letters = iter(text)
    assert all(letter in letters for letter in content)  # in order, and nothing made up


def test_text_comes_at_once_where_no_call_is_in_sight():
    for kind in KINDS:
        parser = ToolCallParser(kind)
        for piece in ("A", " text", " of 3", " <b", "races>", ", {", "}."):
            given = parser.push(piece)[0]
            assert given.strip() == piece.strip() or piece == " <b"
        assert parser.push(" \n")[0] == "" and parser.flush()[0] == " \n"


# -- which form


def test_detect():
    assert detect(LLAMA3) == "llama"
    assert detect(QWEN) == "hermes"
    assert detect("[AVAILABLE_TOOLS]{{ tools }}[/AVAILABLE_TOOLS]{{ '[TOOL_CALLS] [' }}") == "mistral"
    for other in ("", "{{ messages }}", "<tool_call>\n<function=f>", "<tool_call>f\n<arg_key>a</arg_key>",
                  "[TOOL_CALLS]f[ARGS]{}", '{"name": x} "parameters"'):  # fmt: skip
        assert detect(other) is None


# -- forced calls

TOKENIZER = Tokenizer.from_folder(Path(maxlike.__file__).parent / "embedded")
COMPILER = GrammarCompiler(TOKENIZER, TOKENIZER.vocab_size, [1])
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "x", "parameters": {
        "type": "object", "properties": {"city": {"enum": ["Köln", "Rome"]}, "days": {"$ref": "#/$defs/few"}},
        "required": ["city", "days"], "additionalProperties": False, "$defs": {"few": {"enum": [1, 2, 3]}}}}},
    {"type": "function", "function": {"name": "stop-it.now"}},
    {"type": "function", "function": {"name": "log", "parameters": {
        "properties": {"level": {"$ref": "#/$defs/few"}}, "$defs": {"few": {"const": "low"}}, "required": ["level"],
        "additionalProperties": False}}},
]  # fmt: skip


def forced(structured, rng):
    grammar, ids = COMPILER.compile(structured), []
    while not grammar.is_finished:
        words = np.empty(TOKENIZER.vocab_size // 32, np.uint32)
        grammar.fill_mask(words)
        allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
        tight = [id for id in allowed if not TOKENIZER.token_bytes(id).isspace()]  # whitespace in JSON is no news
        id = int(rng.choice(allowed if grammar.may_end else tight or allowed))
        if id == 1:
            break
        assert grammar.accept(id)
        ids.append(id)
    return TOKENIZER.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("choice", ["required", "get_weather", "stop-it.now", "log"])
@pytest.mark.parametrize("several", [True, False])
def test_a_forced_call_is_one(kind, choice, several):
    rng, numbers = np.random.default_rng(0), set()
    for _ in range(8):
        text = forced(schema_for(kind, TOOLS, choice, several), rng)
        content, calls = parse(kind, [text])
        assert content == ""
        numbers.add(len(calls))
        for name, arguments in calls:
            assert name == choice or choice == "required"
            match name:
                case "get_weather":
                    assert arguments.keys() == {"city", "days"}
                    assert arguments["city"] in ("Köln", "Rome") and arguments["days"] in (1, 2, 3)
                case "log":
                    assert arguments == {"level": "low"}
                case _:
                    assert name == "stop-it.now" and arguments == {}
    assert numbers == {1} if choice != "required" or not several else max(numbers) > 1 and 0 not in numbers


@pytest.mark.parametrize("kind", KINDS)
def test_forced_calls_are_written_as_the_model_knows_them(kind):
    arguments = {"city": "Rome", "days": 2}
    text = {"hermes": hermes("get_weather", arguments), "llama": llama("get_weather", arguments),
            "mistral": mistral(("get_weather", arguments)).removeprefix("[TOOL_CALLS] ")}[kind]  # fmt: skip
    grammar = COMPILER.compile(schema_for(kind, TOOLS, "required"))
    for id in TOKENIZER.encode(text, add_special_tokens=False):
        assert grammar.accept(id), TOKENIZER.token(id)
    assert grammar.may_end


def test_calls_that_cannot_be_forced():
    with pytest.raises(ValueError, match=r"No tool is named 'x'; there are: get_weather, stop-it\.now, log"):
        schema_for("hermes", TOOLS, "x")
    for schema in ({"type": "array"}, 3, {"type": ["object"]}):
        with pytest.raises(ValueError, match="parameters of f must be a JSON schema of type object"):
            schema_for("llama", [{"function": {"name": "f", "parameters": schema}}], "f")
    unknown = [{"function": {"name": "f", "parameters": {"x-guidance": {"lenient": True}, "not": {}}}}]
    with pytest.raises(ValueError, match=r'Unimplemented keys: \["not"\]'):
        COMPILER.compile(schema_for("mistral", unknown, "required"))
    for make in (ToolCallParser, lambda kind: schema_for(kind, TOOLS, "required")):
        with pytest.raises(ValueError, match="one of the forms hermes, llama, mistral; got 'xml'"):
            make("xml")
