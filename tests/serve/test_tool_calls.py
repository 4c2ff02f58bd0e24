"""Tool calls: however a text is cut, the same comes of it, and all of it; what is forced is read back."""

import json
from typing import Any

import llguidance
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxlike.engine.sampling_params import StructuredOutput
from maxlike.serve.tool_calls import KINDS, ToolCallParser, detect, schema_for

HARD = {"a": "}</tool_call>{\"[", "b": {"c": [{"d": "\\"}, [], None, 1.5]}, "é": "日本 👩‍👩‍👧 \n\t", "q": '"name": {'}
HARD_JSON = json.dumps(HARD, ensure_ascii=False)
OPENING = {"hermes": "<tool_call>", "llama": "<|python_tag|>", "mistral": "[TOOL_CALLS]"}


def parsed(kind: str, *pieces: str) -> tuple[str, list[tuple[str, Any]]]:
    """Content, and name and arguments of each call, as a client puts them together."""
    parser = ToolCallParser(kind)
    answers = [*map(parser.push, pieces), parser.flush()]
    deltas = [delta for _, calls in answers for delta in calls]
    assert [delta["index"] for delta in deltas] == list(range(len(deltas)))
    assert all(delta["type"] == "function" and delta.keys() == {"index", "id", "type", "function"} for delta in deltas)
    assert len({delta["id"] for delta in deltas}) == len(deltas)
    calls = [(delta["function"]["name"], json.loads(delta["function"]["arguments"])) for delta in deltas]
    return "".join(content for content, _ in answers), calls


def one(name: str, arguments: str, key: str = "arguments") -> str:
    return f'{{"name": "{name}", "{key}": {arguments}}}'


F, G = one("f", HARD_JSON), one("get.w-2", "{}")
LF, LG = one("f", HARD_JSON, "parameters"), one("get.w-2", "{}", "parameters")
CALLS = [("f", HARD), ("get.w-2", {})]

WELL_FORMED: dict[str, list[tuple[str, str, list[Any]]]] = {
    "hermes": [
        (f"<tool_call>\n{F}\n</tool_call>\n<tool_call>\n{G}\n</tool_call>", "", CALLS),
        (f"Let's <see>…\n\n<tool_call>{F}</tool_call>", "Let's <see>…", CALLS[:1]),
        (f"a<tool_call>{F}</tool_call>\n b <tool_call>{G}</tool_call> \n", "a\n b", CALLS),
        (f"<tool_call>{F}</tool_call><tool_call>{G}", "", CALLS),  # cut off, or without its end
        (f"<tool_call>{F}\n</tool_", "", CALLS[:1]),
        ('<tool_call>{"arguments": {"x": 1}, "name": "f", "id": 3, "more": {}}</tool_call>', "", [("f", {"x": 1})]),
        ('<tool_call>{"name": "f"}</tool_call>', "", [("f", {})]),
        ('<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>', "", [("f", {"x": 1})]),
        ('<tool_call>{"name": "f", "arguments": {"x": "two\nlines"}}</tool_call>', "", [("f", {"x": "two\nlines"})]),
        ('<tool_call>{"name": "f", "arguments": {"x": "\\ud800"}}</tool_call>', "", [("f", {"x": "\ud800"})]),
        ('<tool_call>{"name": "f", "arguments": {"x": "\\\\"}}</tool_call>', "", [("f", {"x": "\\"})]),
    ],
    "llama": [
        (LF, "", CALLS[:1]),
        (f"\n\n{LF}; {LG}\n", "", CALLS),
        (f"{LF}\n{LG} and more", " and more", CALLS),
        (f"<|python_tag|>{LF};{LG}", "", CALLS),
        (f"Sure: <|python_tag|> {LF}", "Sure:", CALLS[:1]),
        (f'{{"type": "function", "name": "f", "parameters": {HARD_JSON}}}', "", CALLS[:1]),
        (F, "", CALLS[:1]),
        (f"{LF}; {{x}}", "; {x}", CALLS[:1]),
        (f"{LF}<|python_tag|>{LG}", "", CALLS),
    ],
    "mistral": [
        (f"[TOOL_CALLS][{F}, {G}]", "", CALLS),
        (f"\n[TOOL_CALLS] [\n{F} ,\n{G}]\n", "", CALLS),
        (f"Well [1] [TOOL_CALLS] [{F}] then", "Well [1] then", CALLS[:1]),
        (f"[{F}]", "", CALLS[:1]),
        (f'[TOOL_CALLS][{{"name": "f", "arguments": {HARD_JSON}, "id": "abcdefghi"}}]', "", CALLS[:1]),
    ],
}
NO_CALLS = {
    "hermes": [
        "", " \n", "no call", "a < b <tool_cal", F, "<tool_call>", "<tool_call> \n", "<tool_call>f(x)</tool_call>",
        '<tool_call>\n{"name": "f", "arguments": {"x": 1}\n</tool_call> \n', "<tool_call>{}</tool_call>",
        f"<tool_call>{F}}}</tool_call>", f"<tool_call>{F}</tool_cell>", f"<tool_call>[{F}</tool_call>",
        f"<tool_call>{F[:-9]}", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "</tool_call> \t",
        '<tool_call>{"name": "f", "arguments": "x"}</tool_call>', '<tool_call>{"name": "f g"}</tool_call>',
        '<tool_call>{"name": 1, "arguments": {}}</tool_call>', '<tool_call>{"name": "f" "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>', '<tool_call>{"a": [}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": 1e999}}</tool_call>', '<tool_call>{"name": "\\ud800"}</tool_call>',
        '<tool_call>{"name": "f", "arguments": ' + '{"x": ' * 20_000 + "1" + "}" * 20_001 + "</tool_call>",
    ],
    "llama": [
        "{", '{"name": "Bob"}', '{"name": "Bob", "parameters": {}, "age": 5}', "{x} is a set", f"I say {LF}", LF[:-1],
        "<|python_tag|>print({})", "<|python_tag|>", '{"answer": 42}; {"answer": 43}', f" {LF}"[:-2], "<|python_tag",
    ],
    "mistral": [
        "[1] says so", "[]", "[TOOL_CALLS]", "[TOOL_CALLS][]", "[TOOL_CALLS]f[ARGS]{}", f"[TOOL_CALLS]{F}", f"[{F}",
        f"[TOOL_CALLS][{F}, 1]", '[{"name": "Bob"}]', '[{"a": "b"}, "c"]', "[TOOL", "[link](there)", " [ ",
    ],
}
EVERY: list[tuple[str, str, str, list[Any]]] = [(kind, text, content, calls) for kind in KINDS for text, content, calls
    in [*WELL_FORMED[kind], *((text, text, []) for text in NO_CALLS[kind])]]


@pytest.mark.parametrize(("kind", "text", "content", "calls"), EVERY)
def test_every_cut_gives_the_same(kind: str, text: str, content: str, calls: list[Any]) -> None:
    assert parsed(kind, text) == (content, calls)
    assert parsed(kind, *text) == (content, calls)
    step = 1 + len(text) // 500 * 10
    for at in range(0, len(text), step):
        assert parsed(kind, text[:at], text[at:]) == (content, calls), at


PIECES = ["<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", F, G, LF, LG, "[", "]", "{", "}", '"', "\\",
          ",", " ", "\n", ";", "x", "<", '"name"', ": ", "é", "👩‍👩‍👧", "1"]


@given(st.sampled_from(KINDS), st.lists(st.sampled_from(PIECES)), st.data())
def test_nothing_is_lost(kind: str, parts: list[str], data: st.DataObject) -> None:
    text = "".join(parts)
    content, calls = parsed(kind, text)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parsed(kind, *pieces) == (content, calls)
    if not calls:
        assert content == text
    # In the order of the text, the content is in it; the rest is the calls, and what they are set in.
    left = iter(text)
    assert all(character in left for character in content)
    assert len(calls) <= sum(map(text.count, [F, G, LF, LG]))


NAMES = st.text("azAZ09_.-", min_size=1, max_size=64)
VALUES = (st.none() | st.booleans() | st.integers(-(2**63), 2**64) | st.text(max_size=20)
          | st.floats(allow_nan=False, allow_infinity=False))
KEYS = st.text(max_size=5)
ARGUMENTS = st.dictionaries(KEYS, VALUES | st.lists(VALUES | st.dictionaries(KEYS, VALUES)), max_size=5)


@settings(max_examples=50)
@given(st.sampled_from(KINDS), st.lists(st.tuples(NAMES, ARGUMENTS), min_size=1, max_size=3), st.booleans(),
       st.integers(1, 9))
def test_any_arguments_come_through(kind: str, calls: list[tuple[str, Any]], escaped: bool, width: int) -> None:
    key = "parameters" if kind == "llama" else "arguments"
    texts = [json.dumps({"name": name, key: arguments}, ensure_ascii=escaped) for name, arguments in calls]
    text = {"hermes": "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in texts), "llama": "; ".join(texts),
            "mistral": f"[TOOL_CALLS] [{', '.join(texts)}]"}[kind]
    assert parsed(kind, *(text[i : i + width] for i in range(0, len(text), width))) == ("", calls)


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_may_belong_to_a_call_is_held_back(kind: str) -> None:
    parser, opening = ToolCallParser(kind), OPENING[kind]
    assert parser.push("Well, a < b\n") == ("Well, a < b", [])
    assert parser.push("and") == ("\nand", [])
    assert parser.push(" " + opening[:-1]) == ("", [])
    assert parser.push("?") == (f" {opening[:-1]}?", [])


def test_a_call_comes_as_soon_as_it_is_complete() -> None:
    parser = ToolCallParser("hermes")
    assert parser.push(f"<tool_call>{F}</tool_call")[1] == []
    assert len(parser.push("> ")[1]) == 1
    parser = ToolCallParser("llama")
    assert parser.push(LF[:-1])[1] == []
    assert len(parser.push("}")[1]) == 1


def test_mistrals_ids_are_those_its_templates_take() -> None:
    (call,) = ToolCallParser("mistral").push(f"[TOOL_CALLS][{F}]")[1]
    assert len(call["id"]) == 9 and call["id"].isalnum()


@pytest.mark.parametrize(
    ("template", "kind"),
    [
        (None, None),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", None),
        ("{{- '<tool_call>\\n{\"name\": \"' }}{{ c.name }}{{ '\", \"arguments\": ' }}", "hermes"),
        ("return as <tool_call>\\n<function=name>\\n<parameter=x>\\n1\\n</parameter>", None),
        ("<tool_call>{function-name}\\n<arg_key>{key}</arg_key>", None),
        ("{{ '[TOOL_CALLS]' + m['tool_calls'] | string + eos_token }}", "mistral"),
        ("{{ '[TOOL_CALLS]' + name + '[ARGS]' + arguments }}", None),
        ("'Respond in the format {\"name\": function name, \"parameters\": dictionary of argument name}.'",
         "llama"),
        ("'<|python_tag|>' and [func_name1(param1=value1)]", None),
    ],
)
def test_detect(template: str | None, kind: str | None) -> None:
    assert detect(template) == kind


def tool(name: str, parameters: dict[str, Any] | None) -> dict[str, Any]:
    function = {"name": name, "description": "it"} | ({} if parameters is None else {"parameters": parameters})
    return {"type": "function", "function": function}


TOOLS = [
    tool("weather", {"type": "object", "properties": {"city": {"$ref": "#/$defs/City"}, "n": {"type": "integer"}},
                     "required": ["city"], "additionalProperties": False, "$defs": {"City": {"type": "string"}}}),
    tool("now", None),
    tool("note", {"properties": {"text": {"$ref": "#/$defs/City"}}, "$defs": {"City": {"enum": ["a\n", '"é"']}},
                  "required": ["text"], "additionalProperties": False}),
]
WEATHER = {"city": "München {\"} </tool_call>"}
MADE = [("weather", WEATHER), ("weather", {"city": "", "n": -3}), ("now", {}), ("note", {"text": '"é"'})]
REFUSED = [("weather", {}), ("weather", {"city": 1}), ("weather", {"city": "x", "m": 1}), ("now", {"x": 1}),
           ("note", {"text": "b"}), ("weathe", WEATHER), ("note", None), ("now", [])]


def written(kind: str, calls: list[tuple[str, Any]]) -> str:
    key = "parameters" if kind == "llama" else "arguments"
    texts = [json.dumps({"name": name, key: arguments}, ensure_ascii=False) for name, arguments in calls]
    return {"hermes": "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in texts), "llama": "; ".join(texts),
            "mistral": f"[{', '.join(texts)}]"}[kind]


def allows(structured: StructuredOutput, text: str) -> bool:
    """Whether the grammar takes the whole text, a byte for a token, and may end there."""
    tokenizer = llguidance.LLTokenizer("byte")
    assert structured.grammar is not None
    source = llguidance.LLMatcher.grammar_from_lark(structured.grammar)
    failed, says = llguidance.LLMatcher.validate_grammar_with_warnings(source, tokenizer)
    assert not failed and not says, says
    matcher = llguidance.LLMatcher(tokenizer, source)
    data = list(text.encode())
    return matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting()


@pytest.mark.parametrize("kind", KINDS)
def test_forced_calls_are_read_back(kind: str) -> None:
    required, one_alone = schema_for(kind, TOOLS, several=True), schema_for(kind, TOOLS, several=False)
    named = schema_for(kind, TOOLS[:1], several=False)
    for call in MADE:
        text = written(kind, [call])
        assert allows(required, text) and allows(one_alone, text)
        assert allows(named, text) == (call[0] == "weather")
        assert parsed(kind, *text) == ("", [call])
        assert not allows(required, "Sure. " + text) and not allows(required, text[:-1])
    several = written(kind, MADE)
    assert allows(required, several) == (kind != "llama")  # its templates take one call a message
    assert parsed(kind, *several) == ("", MADE)
    assert not allows(named, written(kind, MADE[:2])) and not allows(one_alone, several)
    assert not allows(required, written(kind, []))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", REFUSED)
def test_what_the_schema_forbids_cannot_be_made(kind: str, call: tuple[str, Any]) -> None:
    assert not allows(schema_for(kind, TOOLS, several=True), written(kind, [call]))


def test_what_cannot_be_forced_is_said() -> None:
    with pytest.raises(ValueError, match="no tools"):
        schema_for("hermes", [], several=True)
    with pytest.raises(ValueError, match=r"'xml'.*hermes, llama, mistral"):
        schema_for("xml", TOOLS, several=True)
    with pytest.raises(ValueError, match="'xml'"):
        ToolCallParser("xml")
    for parameters in ({"type": "array"}, {"type": ["string", "null"]}):
        with pytest.raises(ValueError, match=r"parameters of function 'f'.*object"):
            schema_for("hermes", [tool("f", parameters)], several=True)
