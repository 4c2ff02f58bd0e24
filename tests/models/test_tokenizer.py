"""The tokenizer and chat templates against `transformers`, and streaming against decoding at once."""

import json
import random

import jinja2
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from maxlike.models.tokenizer import TextStream, Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog.\n\n    Indented text, 1234567890 numbers!",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
    "Größe, naïve café, Привет мир, 你好世界, こんにちは, 👩‍👩‍👧‍👦 🎉 🇩🇪",
] * 20

TEXTS = [
    "",
    " ",
    "Hello world",
    " leading space, trailing space ",
    "two  spaces   three\n\nlines\r\n\ttab",
    "emoji 🎉🎉 family 👩‍👩‍👧‍👦 flag 🇩🇪 end",
    "你好世界 Привет naïve é é ﬁ",
    "unseen: ꙮ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \u200b\ufeff\ufffd\ufffd!",
    "def f(x):\n    return x ** 2  # ok",
    "<s>special tokens</s> in <|eot|>text",
]

SPECIALS = ["<unk>", "<s>", "</s>", "<pad>"]


def byte_level() -> tokenizers.Tokenizer:
    """In the style of Llama 3: byte-level BPE, a bos token added in front."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(["<|eot|>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def unigram() -> tokenizers.Tokenizer:
    """In the style of SentencePiece unigram models: metaspaces, one of them put in front."""
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return tokenizer


def byte_fallback() -> tokenizers.Tokenizer:
    """In the style of Llama 2: metaspaces by the normalizer, and bytes for unknown characters."""
    vocab = {token: i for i, token in enumerate(SPECIALS)}
    for token in (f"<0x{byte:02X}>" for byte in range(256)):
        vocab[token] = len(vocab)
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("l", "l"), ("he", "ll"), ("▁", "w")]
    for token in [*"▁thelowrdaisn.,", *(a + b for a, b in merges)]:
        vocab[token] = len(vocab)
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


STYLES = {"byte_level": byte_level, "unigram": unigram, "byte_fallback": byte_fallback}
CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": {"__type": "AddedToken", "content": "<pad>", "special": True},
    "unk_token": "<unk>",
}


def write(folder, tokenizer, config=CONFIG, **more):
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **more}))
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module", params=STYLES)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write(folder, STYLES[request.param]())
    return folder


def oracle(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(folder)


# -- text and ids


def test_encodes_and_decodes_as_transformers_does(folder):
    theirs, ours = oracle(folder), Tokenizer.from_folder(str(folder))
    for text in TEXTS:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special)
            for skip in (True, False):
                assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        assert getattr(ours, name) == getattr(theirs, name)
        assert getattr(ours, f"{name}_id") == getattr(theirs, f"{name}_id")
    assert ours.special_ids >= set(theirs.all_special_ids)
    assert ours.vocab_size == len(theirs)


def test_special_tokens(tmp_path):
    tokenizer = write(tmp_path, byte_level())
    assert tokenizer.encode("a")[0] == tokenizer.bos_token_id
    assert tokenizer.encode("a", add_special_tokens=False) == tokenizer.encode("a")[1:]
    ids = tokenizer.encode("<|eot|>x</s>", add_special_tokens=False)
    assert len(ids) == 3 and tokenizer.special_ids >= {ids[0], ids[2]}
    assert tokenizer.decode(ids) == "x"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|eot|>x</s>"
    assert len(tokenizer.special_ids) == 5


def test_names_of_special_tokens(tmp_path):
    bare = write(tmp_path, byte_level(), config={}, bos_token=None, eos_token="<|never heard of|>")
    assert bare.bos_token is bare.bos_token_id is bare.eos_token is bare.eos_token_id is bare.pad_token is None
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"unk_token": {"content": "<unk>"}}))
    assert Tokenizer.from_folder(tmp_path).unk_token_id == 0
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer.from_folder(tmp_path).unk_token == "<unk>"


def test_a_named_token_is_special_even_where_it_is_a_plain_word(tmp_path):
    vocab = {letter: i for i, letter in enumerate("abc")} | {"<end>": 3}
    tokenizer = write(tmp_path, tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[])), {"eos_token": "<end>"})
    assert tokenizer.special_ids == {3} and tokenizer.vocab_size == 4
    assert tokenizer.encode("ab<end>") == [0, 1, 3]
    assert tokenizer.decode([0, 3]) == "a"


def test_vocabulary_with_a_hole(tmp_path):
    tokenizer = byte_level()
    content = json.loads(tokenizer.to_str())
    content["added_tokens"].append({**content["added_tokens"][-1], "content": "<|far|>", "id": 1000})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    ours = Tokenizer.from_folder(tmp_path)
    far = ours.encode("<|far|>", add_special_tokens=False)
    assert ours.vocab_size == max(far) + 1
    assert ours.decode(far, skip_special_tokens=False) == "<|far|>"


def test_truncation_and_padding_of_training_time_are_dropped(tmp_path):
    tokenizer = byte_level()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    ours = write(tmp_path, tokenizer)
    assert ours.decode(ours.encode("a text of more than four tokens")) == "a text of more than four tokens"


@pytest.mark.parametrize("bad", [-1, 10**6, 2**40])
def test_ids_out_of_range(folder, bad):
    tokenizer = Tokenizer.from_folder(folder)
    stream = tokenizer.stream()
    good = tokenizer.encode("Hello")
    for act in (lambda: tokenizer.decode([5, bad]), lambda: stream.push(bad)):
        with pytest.raises(ValueError, match=rf"token id {bad} .*0 to {tokenizer.vocab_size - 1}"):
            act()
        text = "".join(map(stream.push, good)) + stream.flush()  # and the stream is as it was
        assert text == tokenizer.decode(good)
    with pytest.raises(ValueError, match="token id"):
        tokenizer.decode([tokenizer.vocab_size])


def test_text_that_is_not_unicode(folder):
    tokenizer = Tokenizer.from_folder(folder)
    with pytest.raises(ValueError, match="surrogate"):
        tokenizer.encode("half a pair: \ud83d")
    with pytest.raises(TypeError):
        tokenizer.encode(b"bytes")


# -- streaming


def pieces(tokenizer, ids, skip=True):
    stream = tokenizer.stream(skip_special_tokens=skip)
    assert isinstance(stream, TextStream)
    return [*(stream.push(id) for id in ids), stream.flush()]


@pytest.mark.parametrize("skip", [True, False])
def test_streamed_text_is_the_decoded_text(folder, skip):
    tokenizer = Tokenizer.from_folder(folder)
    for text in [*TEXTS, "".join(TEXTS), *CORPUS[:3]]:
        ids = tokenizer.encode(text)
        streamed = pieces(tokenizer, ids, skip)
        assert "".join(streamed) == tokenizer.decode(ids, skip_special_tokens=skip)
        if "\ufffd" not in text:
            assert not any("\ufffd" in piece for piece in streamed)


def test_text_comes_as_soon_as_it_is_certain(folder):
    tokenizer = Tokenizer.from_folder(folder)
    ids = tokenizer.encode("the world then all", add_special_tokens=False)
    for n, piece in enumerate(pieces(tokenizer, ids)[:-1], 1):
        assert piece == tokenizer.decode(ids[:n])[len(tokenizer.decode(ids[: n - 1])) :]
    assert pieces(tokenizer, ids)[-1] == ""


def test_a_character_of_several_tokens_comes_whole(tmp_path):
    for make in (byte_level, byte_fallback):
        tokenizer = write(tmp_path, make())
        ids = tokenizer.encode("ꙮ𝔘", add_special_tokens=False)
        assert len(ids) >= 6
        assert [piece for piece in pieces(tokenizer, ids) if piece] == ["ꙮ", "𝔘"]
        stream = tokenizer.stream()
        assert "".join(stream.push(id) for id in ids[:-1]) == "ꙮ"
        rest = stream.flush()  # what there is of it
        assert rest and set(rest) == {"\ufffd"} and tokenizer.decode(ids[:-1]).endswith(rest)
        assert "".join(map(stream.push, ids)) == "ꙮ𝔘"  # a flushed stream begins anew


def test_spaces_survive_special_tokens_between(folder):
    tokenizer = Tokenizer.from_folder(folder)
    word = tokenizer.encode(" world", add_special_tokens=False)
    for ids in (
        [*word, 2, *word],
        [2, 2, *word, 1, 1, 1, 1, 1, 1, *word, 2],
        [1, 2, 3],
    ):
        for skip in (True, False):
            assert "".join(pieces(tokenizer, ids, skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("style", ["byte_level", "unigram"])
def test_streaming_any_ids_at_all(tmp_path, style):
    tokenizer = write(tmp_path, STYLES[style]())
    rng = random.Random(0)
    for _ in range(300):
        # few ids, so that the same bytes follow one another in every way
        choice = rng.sample(range(tokenizer.vocab_size), rng.choice([3, 20, tokenizer.vocab_size]))
        ids = rng.choices(choice, k=40)
        skip = rng.random() < 0.5
        assert "".join(pieces(tokenizer, ids, skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


def test_streaming_any_characters_by_byte_fallback(tmp_path):
    tokenizer = write(tmp_path, byte_fallback())
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choices("the world\n\x00é\u07ff€ꙮ\ufffd😀\U0010ffff", k=20))
        ids = tokenizer.encode(text)
        assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids) == text
    for _ in range(300):  # bytes that are not UTF-8: no failure, and all but the garbled stretch is there
        garbage = rng.choices(range(len(SPECIALS), len(SPECIALS) + 256), k=30)
        before, after = tokenizer.encode("hello", add_special_tokens=False), tokenizer.encode("the wall")[1:]
        text = "".join(pieces(tokenizer, [*before, *garbage, *after]))
        assert text.startswith("hello") and text.endswith(" the wall")


def test_endless_garbage_is_not_held_back(tmp_path):
    tokenizer = write(tmp_path, byte_level())
    [byte] = [i for i in range(tokenizer.vocab_size) if tokenizer._tokenizer.id_to_token(i) == "Ģ"]  # 0x80
    stream = tokenizer.stream()
    text = ""
    for n in range(100):
        text += stream.push(byte)
        assert n - 4 <= len(text) <= n + 1
    assert text + stream.flush() == "\ufffd" * 100


# -- chat templates, in the styles of the families

LLAMA3 = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}
        {{- message['content'] | trim + '<|eot|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}<|eot|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable and message.content is not string %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

QWEN = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- if '</think>' in content %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last_query_index %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
        {{- content }}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if (loop.first and content) or (not loop.first) %}{{- '\\n' }}{%- endif %}
            {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '<tool_call>\\n{"name": "' ~ tool_call.name ~ '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

GEMMA = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\\n\\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model\\n'}}
{%- endif -%}
"""

MISTRAL = """\
{{ bos_token }}
{% for message in messages %}
    {% if message['role'] == 'system' %}
        {% if not loop.first %}{{ raise_exception('System message must come first') }}{% endif %}
        {% continue %}
    {% endif %}
    {% if message['role'] == 'user' %}
        {{ '[INST] ' + (messages[0]['content'] + '\\n\\n'
            if loop.index0 == 1 and messages[0]['role'] == 'system' else '') }}
        {{ message['content'] + ' [/INST]' }}
    {% elif message['role'] == 'assistant' %}
{% generation %}
        {{ ' ' + (message['content'] or '') + eos_token }}
{% endgeneration %}
    {% else %}
        {{ raise_exception('Only user, system and assistant roles are supported, got ' ~ message.role) }}
    {% endif %}
    {% if loop.index0 > 6 %}{% break %}{% endif %}
{% endfor %}
"""

TEMPLATES = {"llama3": LLAMA3, "qwen": QWEN, "gemma": GEMMA, "mistral": MISTRAL}

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a place — <b>now</b> & here",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string", "enum": ["Köln", "東京"]}},
        },
    },
}
USER, ASSISTANT = (
    {"role": "user", "content": "  What's <this>? 🎉 "},
    {"role": "assistant", "content": 'A "test".\n'},
)
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {
    "role": "assistant",
    "content": None,  # as the OpenAI API writes it
    "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"place": "Köln", "n": 1.5}}}],
}
PARTS = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " What is this? "}]}
CHATS = {
    "one": [USER],
    "turns": [USER, ASSISTANT, USER],
    "system": [SYSTEM, USER, ASSISTANT, USER],
    "answered": [USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes"}],
    "tools": [SYSTEM, USER, CALL, {"role": "tool", "content": "sunny ☀"}],
    "parts": [PARTS],
    "long": [USER, ASSISTANT] * 6,
    "order": [ASSISTANT, USER],
    "late system": [USER, SYSTEM],
}


# What the templates themselves turn down.
REFUSED = {
    *(("gemma", chat) for chat in ("tools", "order", "late system")),
    *(("mistral", chat) for chat in ("tools", "parts", "late system")),
    ("llama3", "parts"),
}


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("family", TEMPLATES)
def test_renders_as_transformers_does(tmp_path, family, chat):
    ours = write(tmp_path, byte_level(), chat_template=TEMPLATES[family])
    theirs = oracle(tmp_path)
    assert ours.chat_template == theirs.chat_template == TEMPLATES[family]
    rendered = 0
    for options in (
        {"add_generation_prompt": True},
        {"add_generation_prompt": False},
        {"add_generation_prompt": True, "tools": [TOOL]},
        {"add_generation_prompt": True, "enable_thinking": False, "bos_token": "<other>"},
    ):
        options["date_string"] = "26 Jul 2024"
        try:
            expected = theirs.apply_chat_template(CHATS[chat], tokenize=False, **options)
        except (jinja2.TemplateError, TypeError) as error:  # what is refused, is refused with the same words
            with pytest.raises(ValueError, match="chat template of") as raised:
                ours.apply_chat_template(CHATS[chat], **options)
            assert str(error) in str(raised.value)
            continue
        assert ours.apply_chat_template(CHATS[chat], **options) == expected
        ids = theirs.apply_chat_template(CHATS[chat], tokenize=True, return_dict=False, **options)
        assert ours.encode_chat(CHATS[chat], **options) == ids
        rendered += 1
    assert rendered > 0 or (family, chat) in REFUSED


def test_prompts_have_one_bos(tmp_path):
    tokenizer = write(tmp_path, byte_level(), chat_template=GEMMA)
    assert tokenizer.encode_chat([USER]).count(tokenizer.bos_token_id) == 1


def test_what_templates_may_use(tmp_path):
    template = (
        "{%- for x in range(9) %}{% if x == 2 %}{% break %}{% endif %}{{ x }}{% endfor %}"
        "{{ messages | tojson }}{{ {'b': 'é<', 'a': [1]} | tojson(sort_keys=true, separators=(',', ':')) }}"
        "{{ strftime_now('%Y') | length }}{% set ns = namespace(a=1) %}{% set ns.b = 2 %}{{ ns.a + ns.b }}"
        "{% generation %}{% set inner = 1 %}{{ undefined_thing }}{% endgeneration %}{{ inner is defined }}"
        "{{ documents is none }}{{ dict(a=1).items() | list }}"
    )
    tokenizer = write(tmp_path, byte_level(), chat_template=template)
    expected = '01[{"role": "user", "content": "é"}]{"a":[1],"b":"é<"}43FalseTrue[(\'a\', 1)]'
    messages = [{"role": "user", "content": "é"}]
    assert tokenizer.apply_chat_template(messages) == expected
    assert oracle(tmp_path).apply_chat_template(messages, tokenize=False) == expected


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for m in messages %}\n{{ m.content }", "line 2"),
        ("{% frobnicate %}", "unknown tag 'frobnicate'"),
        ("{{ messages[0].missing.thing }}", "has no attribute 'missing'"),
        ("{{ messages[0].content + 3 }}", "can only concatenate str"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ [].pop() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% set ns = namespace(__html__=1) %}", "leading underscore"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", "leading underscore"),
        ("{{ range(10**9) }}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_templates_that_fail(tmp_path, template, says):
    tokenizer = write(tmp_path, byte_level(), chat_template=template)
    with pytest.raises(ValueError, match="the chat template of") as raised:
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])
    assert says in str(raised.value) and str(tmp_path) in str(raised.value)


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "expected messages like"),
        (["hello"], "expected messages like"),
        ([{"content": "x"}], "expected messages like"),
        ([{"role": 3, "content": "x"}], "expected messages like"),
        ([{"role": "user", "content": b"x"}], "JSON values"),
        ([{"role": "user", "content": object()}], "JSON values"),
    ],
)
def test_messages_that_are_none(tmp_path, messages, says):
    tokenizer = write(tmp_path, byte_level(), chat_template=QWEN)
    with pytest.raises(ValueError, match=says):
        tokenizer.apply_chat_template(messages)


def test_generation_marks(tmp_path):
    template = ("{% for m in messages %}\n{{ m.role }}:\n{%- generation -%}\n {{ m.content }} \n{%- endgeneration %}\n;"
                "{% endfor %}")
    plain = write(tmp_path, byte_level(), chat_template=template)
    marked = plain.with_generation_marks("<", ">")
    assert plain.apply_chat_template([USER]) == oracle(tmp_path).apply_chat_template([USER], tokenize=False)
    assert marked.apply_chat_template([USER]) == "user:<" + USER["content"] + ">;"
    assert plain.apply_chat_template([USER]) == "user:" + USER["content"] + ";"
    assert marked.with_chat_template("{% generation %}x{% endgeneration %}").apply_chat_template([USER]) == "<x>"
    unmarked = plain.with_chat_template(GEMMA)
    assert unmarked.with_generation_marks("<", ">").apply_chat_template([USER]) == unmarked.apply_chat_template([USER])


def test_offsets(folder):
    tokenizer = Tokenizer.from_folder(folder)
    for text in TEXTS:
        ids, offsets = tokenizer.encode_with_offsets(text)
        assert ids == tokenizer.encode(text, add_special_tokens=False) and len(offsets) == len(ids)
        assert offsets == sorted(offsets) and all(0 <= a <= b <= len(text) for a, b in offsets)
        covered = {i for a, b in offsets for i in range(a, b)}
        assert all(i in covered for i, character in enumerate(text) if character.isalnum())
    with pytest.raises(ValueError, match="surrogate"):
        tokenizer.encode_with_offsets("half a pair: \ud83d")


def test_a_template_cannot_change_what_the_caller_gave(tmp_path):
    tokenizer = write(tmp_path, byte_level(), chat_template="{{ messages | length }}{{ tools }}")
    messages, tools = [{"role": "user", "content": "x", "name": None}], [{"a": [1]}]
    assert tokenizer.apply_chat_template(messages, tools=tools) == "1[{'a': [1]}]"
    assert messages == [{"role": "user", "content": "x", "name": None}] and tools == [{"a": [1]}]


# -- where templates are found


def test_where_templates_are_found(tmp_path):
    message = [{"role": "user", "content": "x"}]
    tokenizer = write(tmp_path, byte_level())
    assert tokenizer.chat_template is None
    with pytest.raises(ValueError, match=f"{tmp_path} has no chat template"):
        tokenizer.apply_chat_template(message)
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.encode_chat(message)

    for entries in ([{"name": "default"}], ["{{ x }}"]):
        (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": entries}))
        with pytest.raises(ValueError, match=f"{tmp_path}: chat_template .*a name and a template"):
            Tokenizer.from_folder(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "processor"}))
    assert Tokenizer.from_folder(tmp_path).chat_template == "processor"

    tokenizer = write(
        tmp_path, byte_level(),
        chat_template=[{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}],
    )  # fmt: skip
    assert tokenizer.chat_template == "plain" and tokenizer.chat_templates.keys() == {"default", "tool_use"}
    theirs = oracle(tmp_path)
    for tools in (None, [], [TOOL]):
        assert tokenizer.apply_chat_template(message, tools=tools) == theirs.apply_chat_template(
            message, tools=tools, tokenize=False
        )

    (tmp_path / "chat_template.jinja").write_text("from its own file ü")
    assert Tokenizer.from_folder(tmp_path).chat_templates == {"default": "from its own file ü"}
    assert oracle(tmp_path).chat_template == "from its own file ü"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("retrieved")
    assert Tokenizer.from_folder(tmp_path).chat_templates == oracle(tmp_path).chat_template

    tokenizer = write(tmp_path, byte_level())
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"no chat template named 'default', only \['rag'\]"):
        Tokenizer.from_folder(tmp_path).apply_chat_template(message)


# -- folders without a usable tokenizer


def test_folders_without_a_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="nowhere: there is no such folder"):
        Tokenizer.from_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=f"{tmp_path} holds no tokenizer"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(ValueError, match=r"only vocab\.json, merges\.txt: convert"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ValueError, match=r"only tokenizer\.model, vocab\.json"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b'{"model": {"type": "Telepathy"}}', b"[1"])
def test_tokenizer_file_that_is_none(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json: not"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff", b"[" * 100_000])
def test_tokenizer_config_that_is_none(tmp_path, content):
    write(tmp_path, byte_level())
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: "):
        Tokenizer.from_folder(tmp_path)


def test_added_words_that_are_not_special(tmp_path):
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    ours = write(tmp_path, tokenizer)
    ids = ours.encode("<think>hm", add_special_tokens=False)
    assert ids[0] == ours.vocab_size - 1 and ids[0] not in ours.special_ids
    assert ours.decode(ids) == "".join(pieces(ours, ids)) == "<think>hm"
