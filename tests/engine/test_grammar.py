"""Structured output: what a random walk under the masks writes is checked by `json`, `jsonschema` and `re`."""

import functools
import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import maxlike
from maxlike.engine import grammar as grammar_module
from maxlike.engine.grammar import GrammarCompiler
from maxlike.engine.sampling_params import StructuredOutput
from maxlike.models.tokenizer import Tokenizer
from tests.models.test_tokenizer import byte_fallback, unigram

EMBEDDED = Tokenizer.from_folder(Path(maxlike.__file__).parent / "embedded")
LLAMA2 = Tokenizer(byte_fallback(), named_tokens={"eos_token": "</s>"})
COMPILERS = {
    # logits that the tokenizer has no tokens for, and two ways to end
    "embedded": (EMBEDDED, GrammarCompiler(EMBEDDED, EMBEDDED.vocab_size + 100, [1, 4000, EMBEDDED.vocab_size + 3])),
    "llama2": (LLAMA2, GrammarCompiler(LLAMA2, LLAMA2.vocab_size + 5, [2])),
}


@pytest.fixture(params=COMPILERS)
def kind(request):
    return COMPILERS[request.param]


def allowed(compiler, grammar, **options):
    """The ids of the mask's bits."""
    words = np.full(-(-compiler._vocab_size // 32), 0x55555555, np.uint32)
    grammar.fill_mask(words, **options)
    return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()  # on little-endian machines


@functools.cache
def closing(tokenizer):
    """Tokens that help a text to its end, the best first."""
    return [id for end in (b'"', b"}", b"]", b"a") for id in range(tokenizer.vocab_size)
            if tokenizer.token_bytes(id) == end]  # fmt: skip


def walk(kind, wanted, rng, n=60):
    """Text of a random walk; after n steps it makes for the end."""
    tokenizer, compiler = kind
    grammar = compiler.compile(wanted)
    stream, text = tokenizer.stream(after=tokenizer.encode("the")), ""
    for step in range(2000):
        ids = allowed(compiler, grammar)
        assert ids, text
        ends = [id for id in ids if id in compiler._eos]
        assert bool(ends) == grammar.may_end and ends in ([], compiler._eos)
        if ends and (len(ids) == len(ends) or step > n or rng.random() < 0.2):
            assert len(ids) == len(ends) or not grammar.is_finished
            return text + stream.flush()
        words = [id for id in ids if id not in ends]
        assert not set(words) & tokenizer.special_ids and max(words) < tokenizer.vocab_size
        last = [id for id in closing(tokenizer) if id in words] if step > n else []
        id = last[0] if last else int(rng.choice(words))
        assert grammar.accept(id)
        text += stream.push(id)
    raise AssertionError(f"no end: {text}")


SCHEMAS = [
    {"type": "object", "properties": {"name": {"type": "string", "maxLength": 9}, "age": {"type": "integer"}},
     "required": ["name", "age"], "additionalProperties": False},
    {"type": "object", "properties": {"a": {"type": "null"}}, "additionalProperties": {"type": "boolean"}},
    {"type": "array", "items": {"enum": ["é", 1, None, {"b": [2]}]}, "minItems": 2, "maxItems": 3},
    {"type": "string", "pattern": "^[a-f]+€$", "minLength": 3, "maxLength": 5},
    {"type": "string", "format": "date"},
    {"type": "integer", "minimum": -5, "exclusiveMaximum": 17},
    {"type": ["number", "null"], "multipleOf": 0.5},
    {"$defs": {"node": {"type": "object", "required": ["next"], "additionalProperties": False,
                        "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}}},
     "$ref": "#/$defs/node"},
    {"oneOf": [{"type": "object", "properties": {"kind": {"const": "a"}, "v": {"type": "integer"}},
                "required": ["kind", "v"]},
               {"type": "object", "properties": {"kind": {"const": "b"}}, "required": ["kind"]}]},
    {"allOf": [{"minimum": 3}, {"type": "integer"}, {"maximum": 9}]},
    {"const": "exactly 'this' \"text\" \n\\ é😀"},
    True,
]  # fmt: skip


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:40])
def test_json_schema(kind, schema):
    rng = np.random.default_rng(0)
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    for form in (schema, json.dumps(schema)):
        for _ in range(8):
            validator.validate(json.loads(walk(kind, StructuredOutput(json=form), rng)))


def test_any_json_object(kind):
    rng = np.random.default_rng(0)
    for _ in range(15):
        assert isinstance(json.loads(walk(kind, StructuredOutput(json_object=True), rng)), dict)


@pytest.mark.parametrize("regex", ["a|ab", "(the|wall)( [0-9]{2,4}){1,3}", "[^a-z\n]{4}", "(?i)é{3}x*", r"a/b\\\.", "",
                                   "👩‍👩‍👧?|한글", r"[a-zé]{1,8}@[^@]{1,5}\.com", "a\nb"])  # fmt: skip
def test_regex(kind, regex):
    rng = np.random.default_rng(0)
    for _ in range(8):
        text = walk(kind, StructuredOutput(regex=regex), rng)
        assert re.fullmatch(regex, text), text


CHOICE = st.lists(st.text("ab \"\\\n\x00/|é😀\u2028{}", min_size=1, max_size=6), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(choice=CHOICE, seed=st.integers(0, 99))
@example(["a", "ab", "abc"], 0)
def test_choice(choice, seed):
    for kind in COMPILERS.values():
        rng = np.random.default_rng(seed)
        assert {walk(kind, StructuredOutput(choice=choice), rng) for _ in range(3)} <= set(choice)


def test_many_choices(kind):
    choice = [f"word {i}" for i in range(5000)]
    assert walk(kind, StructuredOutput(choice=choice), np.random.default_rng(0)) in choice


def test_grammar(kind):
    lark = 'start: sum\nsum: product | sum "+" product\nproduct: NUMBER | "(" sum ")"\nNUMBER: /[1-9][0-9]{0,3}/'
    rng = np.random.default_rng(0)
    for _ in range(5):
        grammar, text = kind[1].compile(StructuredOutput(grammar=lark)), ""
        for _ in range(12):
            id = int(rng.choice(allowed(kind[1], grammar)))
            if id in kind[1]._eos:
                assert eval(text) > 0
                break
            assert grammar.accept(id)
            text += kind[0].token_bytes(id).decode()
        assert re.fullmatch(r"[0-9+()]+", text)


DOCUMENT = {"name": "Ann", "tags": ["é", "b c"], "n": -1.5e3, "deep": {"x": None, "y": [True, {}]}, "q": '"\\\n'}


@pytest.mark.parametrize("wanted", [
    StructuredOutput(json_object=True),
    StructuredOutput(json={"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}),
    StructuredOutput(json={}),
    StructuredOutput(regex=r"\{(.|\n)*\}"),
], ids=["json_object", "schema", "any", "regex"])  # fmt: skip
@pytest.mark.parametrize("indent", [None, 2, 8])
def test_a_right_text_is_accepted_and_a_wrong_token_refused(kind, wanted, indent):
    tokenizer, compiler = kind
    grammar = compiler.compile(wanted)
    text = json.dumps(DOCUMENT, indent=indent, ensure_ascii=False)
    for id in tokenizer.encode(text, add_special_tokens=False)[text[0] != "{" :]:
        if tokenizer.token_bytes(id) == b" ":  # a tokenizer's own, in front of the text
            continue
        refused = next((i for i in range(tokenizer.vocab_size) if not grammar.copy().accept(i)), None)
        if refused is not None and len(text) < 200:
            before = allowed(compiler, grammar)
            assert refused not in before and not grammar.accept(refused)
            assert allowed(compiler, grammar) == before and not grammar.is_finished
        assert grammar.accept(id), tokenizer.token(id)
    assert grammar.may_end
    assert grammar.is_finished == (wanted.regex is None)


def test_what_the_mask_allows_is_accepted(kind):
    _, compiler = kind
    grammar = compiler.compile(StructuredOutput(regex="(ab|é|x{2}) ?(the)?y"))
    for _ in range(8):
        ids = allowed(compiler, grammar)
        for id in range(compiler._vocab_size):
            assert grammar.copy().accept(id) >= (id in ids)
        if grammar.is_finished:
            break
        assert grammar.accept(ids[0])
    assert ids == compiler._eos


def test_the_end(kind):
    _, compiler = kind
    grammar = compiler.compile(StructuredOutput(regex="a+"))
    [a] = [id for id in allowed(compiler, grammar) if kind[0].token_bytes(id) == b"a"]
    assert not grammar.may_end and not set(compiler._eos) & set(allowed(compiler, grammar))
    assert grammar.accept(a) and grammar.may_end and not grammar.is_finished
    with_end, without = (allowed(compiler, grammar, may_end=may_end) for may_end in (True, False))
    assert sorted([*without, *compiler._eos]) == with_end and a in without
    for eos in compiler._eos:
        ended = grammar.copy()
        assert ended.accept(eos) and ended.is_finished
    assert not grammar.is_finished  # a copy goes its own way

    only = compiler.compile(StructuredOutput(choice=["a"]))
    assert only.accept(a) and only.may_end and only.is_finished and only.error is None
    for may_end in (True, False):
        assert allowed(compiler, only, may_end=may_end) == compiler._eos
    assert not only.accept(a)


def test_tokens_are_held_back_unless_they_are_all(kind):
    tokenizer, compiler = kind
    a = [id for id in range(tokenizer.vocab_size) if tokenizer.token_bytes(id) == b"a"]
    grammar = compiler.compile(StructuredOutput(regex="[ab]a?"))
    free = allowed(compiler, grammar)
    assert allowed(compiler, grammar, held_back=a * 2) == [id for id in free if id not in a] and set(a) < set(free)
    assert grammar.accept(a[0]) and {*a, *compiler._eos} == set(allowed(compiler, grammar))
    assert allowed(compiler, grammar, held_back=a) == compiler._eos
    assert allowed(compiler, grammar, may_end=False) == a
    assert allowed(compiler, grammar, may_end=False, held_back=a) == sorted([*a, *compiler._eos])


def test_characters_may_stand_in_json_by_their_numbers(kind):
    wanted = StructuredOutput(json={"type": "string"})
    for text in (r'"\u00e9\u65e5x"', r'"\u0041"', r'"\n\u000a"'):
        grammar = kind[1].compile(wanted)
        ids = [next(id for id in range(kind[0].vocab_size) if kind[0].token_bytes(id) == bytes([byte]))
               for byte in text.encode()]
        assert all(map(grammar.accept, ids)) and grammar.may_end, text


def test_mask_words(kind):
    compiler = kind[1]
    grammar, n = compiler.compile(StructuredOutput(regex="a+")), -(-compiler._vocab_size // 32)
    rows = np.full((3, n), 7, np.uint32)
    before = rows.copy()
    grammar.fill_mask(rows[1], may_end=False)
    assert (rows[[0, 2]] == before[[0, 2]]).all() and (rows[1] != before[1]).any()
    with_gaps = rows.ravel()[: 2 * n : 2]
    for bad in (np.zeros(n + 1, np.uint32), np.zeros((1, n), np.uint32), np.zeros(n, np.int32), with_gaps):
        with pytest.raises(ValueError, match=rf"A mask is uint32\[{n}\]"):
            grammar.fill_mask(bad)


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ({"json": {"type": "strin"}}, "Invalid type: strin"),
        ({"json": {"type": "array", "uniqueItems": True}}, r'Unimplemented keys: \["uniqueItems"\]'),
        ({"json": {"x-guidance": {"lenient": True}, "not": {}}}, r'Unimplemented keys: \["not"\]'),
        ({"json": {"if": {"type": "null"}, "then": {}}}, "Unimplemented keys"),
        ({"json": {"type": "string", "format": "shoe-size"}}, "Unknown format: shoe-size"),
        ({"json": {"type": "string", "pattern": "a(?=b)"}}, "look-around"),
        ({"json": {"$ref": "#/$defs/none"}}, "'/\\$defs/none' does not exist"),
        ({"json": {"$ref": "http://example.com/s.json"}}, "does not fetch"),
        ({"json": {"minLength": 5, "maxLength": 3, "type": "string"}}, "minLength"),
        ({"json": {"$ref": "#"}}, "there is no such text"),
        ({"json": {"enum": ["\ud800"]}}, "hex escape"),
        ({"json": {"minimum": float("nan")}}, "This JSON schema is not possible"),
        ({"json": {"default": object()}}, "not JSON serializable"),
        ({"json": {"x-guidance": 3}}, "x-guidance must be an object; got 3"),
        ({"json": "3"}, "an object, true or false, not 3"),
        ({"json": '["a"]'}, "an object, true or false"),
        ({"json": False}, "allows nothing"),
        ({"json": {"description": "x" * 200_000}}, "may have 131072 characters; got 200"),
        ({"regex": "("}, "unclosed group"),
        ({"regex": r"(a)\1"}, "backreferences are not supported"),
        ({"regex": "[a&&b]"}, "there is no such text"),
        ({"regex": "\udfff"}, "must be Unicode text"),
        ({"regex": "(a{1000}){1000}"}, "too many expressions"),  # found at its first token
        ({"regex": "x" * 200_000}, "may have 131072 characters; got 200000"),
        ({"choice": ["\ud800"]}, "must be Unicode text"),
        ({"grammar": "start: nowhere"}, 'unknown name: "nowhere"'),
        ({"grammar": "start: start"}, "there is no such text"),
        ({"grammar": "start: <|nosuch|>"}, "unknown special token"),
        ({"grammar": "start: (((" + "(" * 10_000}, "too deeply nested"),
    ],
)
def test_what_cannot_be_held_to_is_refused(wanted, says):
    compiler = COMPILERS["embedded"][1]
    for _ in range(2):
        with pytest.raises(ValueError, match=says) as raised:
            compiler.compile(StructuredOutput(**wanted))
        assert "state" not in str(raised.value)


def test_schema_nested_beyond_all_measure():
    deep = {}
    for _ in range(100_000):
        deep = {"items": deep}
    with pytest.raises(ValueError, match="This JSON schema is not possible"):
        COMPILERS["embedded"][1].compile(StructuredOutput(json=deep))
    while deep:  # taken apart by hand: Python's own way is recursive too
        deep = deep.pop("items")


CHAINS = """
import json
from maxlike.engine.grammar import GrammarCompiler
from maxlike.engine.sampling_params import StructuredOutput
from maxlike.models.tokenizer import Tokenizer
import maxlike, threading
from pathlib import Path
tokenizer = Tokenizer.from_folder(Path(maxlike.__file__).parent / "embedded")
compiler, n = GrammarCompiler(tokenizer, tokenizer.vocab_size, [1]), 2000
defs = {f"{i}": {"properties": {"x": {"$ref": f"#/$defs/{i + 1}"}}} for i in range(n)} | {f"{n}": {}}
rules = "start: a0\\n" + "".join(f"a{i}: a{i + 1}\\n" for i in range(3 * n)) + f'a{3 * n}: "x"'
before = threading.stack_size()
for wanted in (StructuredOutput(json={"$defs": defs, "$ref": "#/$defs/0"}), StructuredOutput(grammar=rules)):
    grammar = compiler.compile(wanted)
    assert grammar.accept(tokenizer.encode("{" if wanted.json else "x", add_special_tokens=False)[0])
assert threading.stack_size() == before
"""


def test_long_chains_of_definitions_do_not_end_the_process():
    root = Path(maxlike.__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", CHAINS], cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_a_grammar_too_large_to_follow_ends_and_says_why():
    tokenizer, compiler = COMPILERS["embedded"]
    grammar = compiler.compile(StructuredOutput(regex="((a{1,9999}){1,9999}){1,9999}"))
    [a] = tokenizer.encode("a", add_special_tokens=False)
    for _ in range(100):
        if grammar.is_finished:
            break
        allowed(compiler, grammar)
        grammar.accept(a)
    assert grammar.is_finished and "too many expressions" in grammar.error
    assert allowed(compiler, grammar) == compiler._eos and not grammar.accept(a)
    # Copies share what was used up; who asks for it next gets a new one.
    fresh = compiler.compile(StructuredOutput(regex="((a{1,9999}){1,9999}){1,9999}"))
    assert a in allowed(compiler, fresh) and fresh.accept(a) and fresh.error is None


# -- the compiler


def test_a_grammar_is_made_anew_after_so_many_copies(monkeypatch):
    compiler, made = GrammarCompiler(EMBEDDED, EMBEDDED.vocab_size, [1]), []
    make = compiler._make
    monkeypatch.setattr(compiler, "_make", lambda text: made.append(text) or make(text))
    monkeypatch.setattr(grammar_module, "MAX_COPIES", 3)
    for n in (1, 1, 1, 2, 2, 2, 3):
        compiler.compile(StructuredOutput(regex="a"))
        assert len(made) == n


def test_compiled_grammars_are_kept(monkeypatch):
    compiler, made = GrammarCompiler(EMBEDDED, EMBEDDED.vocab_size, [1]), []
    make = compiler._make
    monkeypatch.setattr(compiler, "_make", lambda text: made.append(text) or make(text))
    monkeypatch.setattr(grammar_module, "MAX_CACHED", 3)

    def n_made(*regexes):
        made.clear()
        for regex in regexes:
            compiler.compile(StructuredOutput(regex=regex)).accept(1)  # the kept one is not touched
        return len(made)

    assert n_made("a", "b", "c", "a", "b", "c") == 3
    assert n_made("a", "d", "a", "c") == 1 and n_made("b") == 1  # b was used the longest ago
    monkeypatch.setattr(grammar_module, "MAX_CACHED_LENGTH", 700)
    assert n_made("x" * 300, "y" * 300) == 2 and n_made("y" * 300) == 0 and n_made("x" * 300) == 1
    assert n_made("z" * 900, "z" * 900) == 2 and not compiler._cache  # larger than all that is kept


def test_many_threads():
    compiler, texts = GrammarCompiler(EMBEDDED, EMBEDDED.vocab_size, [1]), []

    def work(seed):
        rng = np.random.default_rng(seed)
        for _ in range(5):
            texts.append(walk((EMBEDDED, compiler), StructuredOutput(regex="(ab|the){2}[0-9]"), rng))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 30 and all(re.fullmatch("(ab|the){2}[0-9]", text) for text in texts)


def test_compilers_that_cannot_be():
    for ids in ([], [399]):
        with pytest.raises(ValueError, match="neither model nor tokenizer has one"):
            GrammarCompiler(Tokenizer(byte_fallback()), 400, ids)
    with pytest.raises(ValueError, match="has 4096 tokens; the model knows 4000 only"):
        GrammarCompiler(EMBEDDED, 4000, [1])
    with pytest.raises(ValueError, match=r"not possible with this tokenizer: .*Metaspace"):
        GrammarCompiler(Tokenizer(unigram()), 400, [2]).compile(StructuredOutput(regex="a"))
    own = GrammarCompiler(LLAMA2, LLAMA2.vocab_size, [])
    grammar = own.compile(StructuredOutput(regex=""))
    assert allowed(own, grammar) == [LLAMA2.eos_token_id]
