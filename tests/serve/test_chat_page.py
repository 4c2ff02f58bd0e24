"""The chat page in a headless Chromium, against a server whose every word the test gives."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.chromium import SHIFT, Chromium, Page, find_chromium
from tests.serve.scripted_server import Exchange, ScriptedServer

PROGRAM = find_chromium()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="the chat page is tested in Chromium, which is not installed "
                                                        "(on Debian: apt install chromium)")
SAYS = ".answer .text"
READY = "!document.querySelector('#send').disabled"
IDLE = "document.querySelector('#stop').hidden"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    assert PROGRAM is not None
    browser = Chromium(PROGRAM, tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    server = ScriptedServer()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def page(browser: Chromium) -> Iterator[Page]:
    with browser.page() as page:
        yield page
        assert page.complaints == []


@pytest.fixture
def chat(page: Page, server: ScriptedServer) -> Page:
    """The page, with the model found."""
    page.open(server.url)
    page.wait(READY)
    return page


def ask(page: Page, server: ScriptedServer, text: str) -> Exchange:
    page.fill("#input", text)
    page.press("Enter")
    return server.next()


def tell(page: Page, exchange: Exchange, text: str) -> None:
    """A whole answer, and waits until the page has it."""
    exchange.say(text)
    exchange.finish()
    page.wait(IDLE)


def test_an_answer_appears_piece_by_piece(chat: Page, server: ScriptedServer) -> None:
    assert chat.text("#model") == "tiny" and "tiny" in chat.evaluate("document.title")
    exchange = ask(chat, server, "Hi <there>")
    assert exchange.path == "/v1/chat/completions" and "Authorization" not in exchange.headers
    assert exchange.body == {"model": "tiny", "stream": True, "stream_options": {"include_usage": True},
                             "max_tokens": 512, "messages": [{"role": "user", "content": "Hi <there>"}]}
    assert chat.texts(".prompt .text") == ["Hi <there>"]
    assert chat.evaluate("document.querySelector('#input').value") == ""
    assert chat.evaluate("document.querySelector('#log').ariaBusy") == "true"
    for piece, shown in (("Good", ["Good"]), (" morning", ["Good morning"]), (",\n\nand", ["Good morning,", "and"]),
                         (" a `b", ["Good morning,", "and a `b"]), ("`.", ["Good morning,", "and a b."])):
        exchange.say(piece)
        paragraphs = f"[...document.querySelectorAll('{SAYS} > p')].map((e) => e.textContent)"
        chat.wait(f"JSON.stringify({paragraphs}) === JSON.stringify({json.dumps(shown)})")
        assert not chat.evaluate(IDLE)
    exchange.finish("length", prompt=7, completion=12, cached=4)
    chat.wait(IDLE)
    figures = chat.text(".figures")
    assert "7 tokens read (4 from the cache)" in figures and "12 written" in figures and "cut off" in figures
    assert "tokens/s" in figures and "first after" in figures
    assert chat.text("#status") == "Answered." and chat.evaluate("document.querySelector('#log').ariaBusy") == "false"
    assert chat.evaluate("document.activeElement.id") == "input"
    assert chat.refused == [] and set(server.asked) == {"GET /", "GET /v1/models", "POST /v1/chat/completions"}


def test_history_and_settings_are_sent(chat: Page, server: ScriptedServer) -> None:
    chat.click("#toggle")
    for field, text in (("system", "Be brief."), ("temperature", "0.25"), ("top-p", "0.9"), ("max-tokens", "33")):
        chat.fill(f"#{field}", text)
    chat.click("#toggle")
    tell(chat, ask(chat, server, "One?"), "1.")
    tell(chat, ask(chat, server, "Two?"), "2,\n\n2.")
    exchange = ask(chat, server, "Three?")
    assert exchange.body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"}, {"role": "assistant", "content": "1."},
        {"role": "user", "content": "Two?"}, {"role": "assistant", "content": "2,\n\n2."},
        {"role": "user", "content": "Three?"}]
    assert [exchange.body[name] for name in ("temperature", "top_p", "max_tokens")] == [0.25, 0.9, 33]
    chat.click("#new")
    assert exchange.hung_up.wait(60)
    assert chat.texts("article") == [] and chat.text("#status") == ""
    again = ask(chat, server, "Four?")
    assert [message["content"] for message in again.body["messages"]] == ["Be brief.", "Four?"]
    tell(chat, again, "4")
    chat.call("Page.reload")
    chat.wait(f"document.readyState === 'complete' && {READY}")
    assert chat.evaluate("document.querySelector('#temperature').value") == "0.25"  # settings last, the talk does not
    assert chat.texts("article") == []


def test_a_setting_out_of_range_is_shown_and_nothing_sent(chat: Page, server: ScriptedServer) -> None:
    chat.click("#toggle")
    chat.fill("#max-tokens", "4096")  # as many as the model takes, the prompt included
    chat.click("#toggle")
    chat.fill("#input", "Hi")
    chat.press("Enter")
    assert chat.evaluate("document.activeElement.id") == "max-tokens"
    assert chat.evaluate("document.querySelector('#input').value") == "Hi" and "POST" not in str(server.asked)


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop_hangs_up(chat: Page, server: ScriptedServer, how: str) -> None:
    exchange = ask(chat, server, "Count.")
    exchange.say("1, 2")
    chat.wait_for_text(SAYS, "1, 2")
    chat.click("#stop") if how == "button" else chat.press("Escape")
    assert exchange.hung_up.wait(60)
    chat.wait(IDLE)
    assert chat.texts(".figures") == ["stopped"] and chat.texts(".trouble") == []
    following = ask(chat, server, "Go on.")  # what was said before it stopped is part of the conversation
    assert [message["content"] for message in following.body["messages"]] == ["Count.", "1, 2", "Go on."]
    chat.click("#stop")
    chat.wait_for_text(".trouble", "Stopped before there was an answer.")
    last = ask(chat, server, "Hm.")  # and what has no answer is not
    assert [message["content"] for message in last.body["messages"]] == ["Count.", "1, 2", "Hm."]


MARKUP = '<img src=x onerror="document.title=\'owned\'"><script>document.title=\'owned\'</script><b>&lt;</b>'


def test_markup_stays_text(page: Page, server: ScriptedServer) -> None:
    name = f"model {MARKUP}"
    server.models[0]["id"] = name
    page.open(server.url)
    page.wait(READY)
    title = page.evaluate("document.title")
    exchange = ask(page, server, MARKUP)
    answer = f"{MARKUP} and `{MARKUP}`\n\n```{MARKUP}\n{MARKUP}\n```\n"
    tell(page, exchange, answer)
    refused = ask(page, server, "Hi")
    refused.refuse(400, MARKUP)
    page.wait_for_text(".trouble", MARKUP)
    assert page.text("#model") == name and page.texts(".answer h2") == [name, name]
    assert page.texts(".prompt .text") == [MARKUP, "Hi"]
    assert page.texts(f"{SAYS} > p") == [f"{MARKUP} and {MARKUP}"]
    assert page.texts("figcaption > span") == [MARKUP] and page.texts("pre") == [MARKUP]
    made = "document.querySelectorAll('#log img, #log script, #log b, header img, header b').length"
    assert page.evaluate(made) == 0 and page.evaluate("document.title") == title
    # While an answer arrives, each of its beginnings may be shown.
    assert page.evaluate(
        "(() => {"
        f" const answer = {json.dumps(answer)};"
        "  const shown = document.querySelector('.answer .text');"
        "  for (let n = 0; n <= answer.length; n++) {"
        "    render(shown, answer.slice(0, n), false);"
        "    if (shown.querySelector(':not(p, code, figure, figcaption, span, button, pre)')) return n;"
        "  }"
        "  return -1;"
        "})()") == -1


def text(source: str) -> dict[str, str]:
    return {"kind": "text", "label": "", "source": source}


def code(source: str, label: str = "") -> dict[str, str]:
    return {"kind": "code", "label": label, "source": source}


@pytest.mark.parametrize(("answer", "blocks"), [
    ("", []),
    ("one\ntwo\n\n\nthree\n", [text("one\ntwo"), text("three")]),
    ("so:\n```python\nx = 1\n\ny = 2\n```\ndone", [text("so:"), code("x = 1\n\ny = 2", "python"), text("done")]),
    ("```\nnot closed yet", [code("not closed yet")]),
    ("```\n```", [code("")]),
    ("````md\n```\ninner\n```\n````", [code("```\ninner\n```", "md")]),
    ("~~~\n```\n~~~", [code("```")]),
    ("1. item\n   ```sh\n   ls\n   ```", [text("1. item"), code("   ls", "sh")]),
    ("```inline``` is no fence", [text("```inline``` is no fence")]),
    ("```\na\n``` b\n```", [code("a\n``` b")]),
])
def test_blocks(chat: Page, answer: str, blocks: list[dict[str, str]]) -> None:
    assert chat.evaluate(f"blocksOf({json.dumps(answer)})") == blocks


@pytest.mark.parametrize(("source", "pieces"), [
    ("plain", ["plain"]),
    ("a `b` c", ["a ", ["b"], " c"]),
    ("`a``b` and ``c`d``", [["a``b"], " and ", ["c`d"]]),
    ("one ` alone", ["one ` alone"]),
    ("`x` `y`", [["x"], " ", ["y"]]),
])
def test_code_in_a_line(chat: Page, source: str, pieces: list[Any]) -> None:
    found = chat.evaluate(f"[...paragraph({json.dumps(source)}).childNodes].filter((n) => n.textContent)"
                          ".map((n) => n.nodeName === 'CODE' ? [n.textContent] : n.textContent)")
    assert found == pieces


def test_what_is_complete_stays_in_place(chat: Page, server: ScriptedServer) -> None:
    """So that a selection in it does, while more arrives."""
    exchange = ask(chat, server, "Hi")
    exchange.say("first\n\n```\nx = 1\n")
    chat.wait_for_text("pre", "x = 1")
    chat.evaluate("window.before = [...document.querySelectorAll('.answer .text > *')].map((e) => e), 0")
    exchange.say("y = 2\n```\nlast")
    chat.wait_for_text(SAYS, "last")
    assert chat.evaluate("window.before.map((e, i) => e === document.querySelector('.answer .text').children[i])") \
        == [True, True]
    assert chat.texts("pre") == ["x = 1\ny = 2"]
    exchange.finish()
    chat.wait(IDLE)


def test_events_may_be_cut_anywhere(chat: Page) -> None:
    stream = 'data: {"a":"Grüß "}\r\n\r\n: a comment\n\ndata:[1,"🙂"]\n\ndata: [DONE]\n\ndata: {"too": "late"}\n\n'
    assert chat.evaluate(
        "(async () => {"
        "  const body = new ReadableStream({ start(to) {"
        f"   for (const byte of new TextEncoder().encode({json.dumps(stream)})) to.enqueue(new Uint8Array([byte]));"
        "    to.close();"
        "  } });"
        "  const seen = [];"
        "  for await (const event of events(new Response(body))) seen.push(event);"
        "  return seen;"
        "})()") == [{"a": "Grüß "}, [1, "🙂"]]


def test_a_key_is_asked_for_and_sent(page: Page, server: ScriptedServer) -> None:
    server.key = "right"
    page.open(server.url)
    page.wait_for_text("#status", "wants an API key")
    assert page.evaluate("document.activeElement.id") == "key" and not page.evaluate(READY)
    assert page.evaluate("document.querySelector('#key').type") == "password"
    page.type("wrong")
    page.press("Enter")
    page.wait_for_text("#status", "does not accept this API key")
    page.wait_for_text("#status", "Invalid <b>API</b> key.")
    page.fill("#key", "right")
    page.press("Enter")
    page.wait(READY)
    exchange = ask(page, server, "Hi")
    assert exchange.headers["Authorization"] == "Bearer right" and "right" not in json.dumps(exchange.body)
    tell(page, exchange, "Hello")
    assert "right" in page.evaluate("Object.values(sessionStorage)") and page.evaluate("localStorage.length") == 0
    assert page.evaluate("document.cookie") == ""
    server.key = "another"  # the key is withdrawn in the midst of the conversation
    page.fill("#input", "Still there?")
    page.press("Enter")
    page.wait_for_text(".trouble", "does not accept this API key")
    assert page.evaluate("document.activeElement.id") == "key"
    page.fill("#key", "another")
    page.click(".retry")
    exchange = server.next()
    assert [message["content"] for message in exchange.body["messages"]] == ["Hi", "Hello", "Still there?"]
    tell(page, exchange, "Yes")
    assert page.texts(".trouble") == [] and page.texts(SAYS) == ["Hello", "Yes"]


@pytest.mark.parametrize(("status", "told"), [(429, "The server is busy. (64 wait.)"),
                                              (503, "The server takes no requests now. (64 wait.)")])
def test_a_busy_server_is_asked_again_when_it_says(chat: Page, server: ScriptedServer, status: int, told: str) -> None:
    first = ask(chat, server, "Hi")
    first.refuse(status, "64 wait.", {"Retry-After": "1"})
    chat.wait_for_text(".trouble", told)
    chat.wait_for_text(".trouble", "Trying again in 1 s.")
    second = server.next()
    assert second.body == first.body
    tell(chat, second, "Hello")
    assert chat.texts(".trouble") == [] and chat.texts(SAYS) == ["Hello"] and len(chat.refused) == 1


def test_waiting_can_be_stopped(chat: Page, server: ScriptedServer) -> None:
    ask(chat, server, "Hi").refuse(429, "Busy.", {"Retry-After": "30"})
    chat.wait_for_text(".trouble", "Trying again in")
    chat.click("#stop")
    chat.wait_for_text(".trouble", "Stopped")
    chat.wait(IDLE)
    chat.click(".retry")
    tell(chat, server.next(), "Hello")
    assert chat.texts(SAYS) == ["Hello"]


@pytest.mark.parametrize(("status", "headers", "told"), [
    (429, {"Retry-After": "3600"}, "The server is busy. (No.)"),  # longer than anyone looks at a page
    (503, {}, "The server takes no requests now. (No.)"),
    (400, {}, "The server refused: No."),
    (500, {"Retry-After": "1"}, "The server refused: No."),
])
def test_other_refusals_leave_it_to_the_reader(chat: Page, server: ScriptedServer, status: int,
                                               headers: dict[str, str], told: str) -> None:
    first = ask(chat, server, "Hi")
    first.refuse(status, "No.", headers)
    chat.wait_for_text(".trouble", told)
    chat.wait(IDLE)
    assert server.exchanges.empty()
    chat.click(".retry")
    second = server.next()
    assert second.body == first.body
    tell(chat, second, "Hello")
    assert chat.texts(".prompt .text") == ["Hi"] and chat.texts(SAYS) == ["Hello"]


def test_a_stream_that_fails_keeps_what_came(chat: Page, server: ScriptedServer) -> None:
    for end, told in (
        (lambda e: e.event({"error": {"message": "The engine stopped."}}), "The server failed: The engine stopped."),
        (lambda e: e.break_off(), "The answer broke off."),
        (lambda e: e.end(), "The server broke off."),
        (lambda e: e.raw(b"data: {no json\n\n"), "The answer broke off."),
    ):
        exchange = ask(chat, server, "Hi")
        exchange.say("half an")
        chat.wait_for_text(SAYS, "half an")
        end(exchange)
        chat.wait(IDLE)
        chat.wait_for_text(".trouble", told)
        exchange.end()
        assert chat.texts(SAYS) == ["half an"]
        chat.click(".retry")
        again = server.next()
        assert len(again.body["messages"]) == 1
        tell(chat, again, "whole")
        assert chat.texts(SAYS) == ["whole"] and chat.texts(".trouble") == []
        chat.click("#new")


def test_only_the_last_answer_can_be_tried_again(chat: Page, server: ScriptedServer) -> None:
    exchange = ask(chat, server, "Hi")
    exchange.say("half an")
    exchange.end()
    chat.wait_for_text(".retry", "Try again")
    tell(chat, ask(chat, server, "Go on."), "answer")
    assert chat.texts(".trouble") == ["The server broke off."] and chat.texts(".retry") == []


def test_a_server_that_is_not_ready_is_waited_for(page: Page, server: ScriptedServer) -> None:
    server.unready = "1"
    page.open(server.url)
    page.wait_for_text("#status", "takes no requests now. (Loading.)")
    assert not page.evaluate(READY)
    page.type("Hi")  # can be written, and is kept
    page.press("Enter")
    server.unready = None
    page.wait(READY)
    assert page.text("#status") == "" and page.evaluate("document.querySelector('#input').value") == "Hi"
    page.press("Enter")
    tell(page, server.next(), "Hello")


def test_a_server_that_is_gone_is_told(chat: Page, server: ScriptedServer) -> None:
    server.shutdown()
    server.server_close()
    chat.fill("#input", "Hi")
    chat.press("Enter")
    chat.wait_for_text(".trouble", "The server cannot be reached.")
    assert chat.evaluate(IDLE)


def test_without_a_chat_template_text_is_continued(page: Page, server: ScriptedServer) -> None:
    server.models[0]["maxlike"] = {"has_chat_template": False, "max_model_len": 256}
    page.open(server.url)
    page.wait(READY)
    assert page.evaluate("document.querySelector('#system').disabled")
    assert page.evaluate("document.querySelector('#max-tokens').value") == "128"  # and room for a prompt
    page.press("Enter")  # there is nothing to continue yet
    exchange = ask(page, server, "def f(x):\n ")
    assert exchange.path == "/v1/completions"
    assert exchange.body == {"model": "tiny", "stream": True, "stream_options": {"include_usage": True},
                             "max_tokens": 128, "prompt": "def f(x):\n "}
    tell(page, exchange, "   return `x`\n\n\n```")
    assert page.texts(SAYS) == ["   return `x`\n\n\n```"]  # as it is
    page.press("Enter")  # nothing added: further on
    exchange = server.next()
    assert exchange.body["prompt"] == "def f(x):\n    return `x`\n\n\n```"
    tell(page, exchange, "!")
    assert len(page.texts(".prompt")) == 1
    assert ask(page, server, "?").body["prompt"] == "def f(x):\n    return `x`\n\n\n```!?"


def test_another_model_begins_another_chat(page: Page, server: ScriptedServer) -> None:
    server.models.append({"id": "big", "maxlike": {"has_chat_template": True, "max_model_len": 8192}})
    page.open(server.url)
    page.wait(READY)
    tell(page, ask(page, server, "Hi"), "Hello")
    page.click("#toggle")
    page.evaluate("(() => { const e = document.querySelector('#name'); e.value = 'big';"
                  " e.dispatchEvent(new Event('change', {bubbles: true})); })()")
    assert page.text("#model") == "big" and page.texts("article") == []
    exchange = ask(page, server, "Hi")
    assert exchange.body["model"] == "big" and len(exchange.body["messages"]) == 1


def test_enter_sends_and_shift_enter_does_not(chat: Page, server: ScriptedServer) -> None:
    chat.fill("#input", "one")
    before = chat.evaluate("document.querySelector('#input').clientHeight")
    chat.press("Enter", SHIFT)
    chat.type("two")
    assert chat.evaluate("document.querySelector('#input').clientHeight") > before
    # An input method's Enter ends a word there.
    chat.evaluate("document.querySelector('#input').dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', "
                  "isComposing: true, bubbles: true, cancelable: true}))")
    assert server.exchanges.empty() and "POST" not in str(server.asked)
    chat.press("Enter")
    exchange = server.next()
    assert exchange.body["messages"][0]["content"] == "one\ntwo"
    chat.fill("#input", "too early")
    chat.press("Enter")  # kept until the answer is there
    tell(chat, exchange, "Hello")
    assert chat.evaluate("document.querySelector('#input').value") == "too early"
    assert chat.evaluate("document.querySelector('#input').clientHeight") == before
    assert server.asked.count("POST /v1/chat/completions") == 1


def test_the_view_follows_until_the_reader_scrolls(chat: Page, server: ScriptedServer) -> None:
    gap = "(({scrollHeight, scrollTop, clientHeight}) => scrollHeight - scrollTop - clientHeight)" \
          "(document.querySelector('#view'))"
    exchange = ask(chat, server, "Much?")
    exchange.say("line\n\n" * 100)
    chat.wait(f"document.querySelectorAll('{SAYS} > p').length === 100")
    assert abs(chat.evaluate(gap)) <= 1
    chat.turn_wheel("#view", -600)
    chat.wait(f"{gap} > 500 && !document.querySelector('#newest').hidden")
    # Scrolling may be animated: wait for its end.
    top = chat.wait("new Promise((done) => { let last = -1; const look = () => { const now = "
                    "document.querySelector('#view').scrollTop; if (now === last) done(now); last = now; "
                    "setTimeout(look, 200); }; look(); })")
    exchange.say("line\n\n" * 50)
    chat.wait(f"document.querySelectorAll('{SAYS} > p').length === 150")
    assert chat.evaluate("document.querySelector('#view').scrollTop") == top
    chat.click("#newest")
    chat.wait(f"Math.abs({gap}) <= 1 && document.querySelector('#newest').hidden")
    exchange.say("line\n\n" * 50)
    chat.wait(f"document.querySelectorAll('{SAYS} > p').length === 200 && Math.abs({gap}) <= 1")
    exchange.finish()
    chat.wait(IDLE)


def luminance(color: str) -> float:
    """WCAG 2.2's relative luminance of `rgb(r, g, b)`, https://www.w3.org/TR/WCAG22/#dfn-relative-luminance."""
    parts = [int(part) / 255 for part in color.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read(chat: Page, server: ScriptedServer, scheme: str) -> None:
    """Contrast of at least 4.5, as WCAG's level AA asks, against the nearest background that is painted."""
    chat.prefer(scheme)
    chat.click("#toggle")
    tell(chat, ask(chat, server, "Hi"), "Text with `code`.\n\n```py\nx = 1\n```")
    ask(chat, server, "Again").refuse(400, "No.")
    chat.wait_for_text(".trouble", "No.")
    chat.wait(IDLE)
    pairs = chat.evaluate(
        "[...document.querySelectorAll('body *')].filter((e) => e.checkVisibility() && "
        "[...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())).map((e) => {"
        "  let under = e;"
        "  while (getComputedStyle(under).backgroundColor === 'rgba(0, 0, 0, 0)') under = under.parentElement;"
        "  return [e.outerHTML, getComputedStyle(e).color, getComputedStyle(under).backgroundColor];"
        "})")
    assert len(pairs) > 15
    assert (luminance(chat.evaluate("getComputedStyle(document.body).backgroundColor")) > 0.5) == (scheme == "light")
    for element, *colors in pairs:
        dark, light = sorted(map(luminance, colors))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, f"{element}: {colors}"


def test_everything_has_a_name(chat: Page, server: ScriptedServer) -> None:
    chat.click("#toggle")
    tell(chat, ask(chat, server, "Hi"), "```\nx\n```")
    nodes = chat.call("Accessibility.getFullAXTree")["nodes"]
    seen: dict[str, list[str]] = {}
    for node in nodes:
        role, name = node.get("role", {}).get("value"), node.get("name", {}).get("value", "")
        if role in ("button", "textbox", "spinbutton", "combobox", "log", "region", "form", "status"):
            seen.setdefault(role, []).append(name)
    assert all(name for role, names in seen.items() if role not in ("status", "log") for name in names), seen
    assert {"New chat", "Settings", "Send", "Copy"} <= set(seen["button"])
    assert {"Message", "Temperature", "Top-p", "Max tokens"} <= set(seen["textbox"] + seen["spinbutton"])
    assert any(name.startswith("API key") for name in seen["textbox"])


@pytest.mark.parametrize("width", [320, 375, 1000])
def test_it_fits_any_width(chat: Page, server: ScriptedServer, width: int, tmp_path: Path) -> None:
    chat.resize(width, 667)
    name = "an-organisation/a-model-with-quite-a-long-name-instruct"
    chat.evaluate(f"document.querySelector('#model').textContent = {json.dumps(name)}")
    tell(chat, ask(chat, server, "x" * 300), f"{'y' * 300} `{'z' * 300}`\n\n```\n{'w' * 300}\n```\n\nend")
    for shown in (False, True):
        if shown:
            chat.click("#toggle")
        assert chat.evaluate("document.documentElement.scrollWidth") == width
        assert chat.evaluate("document.querySelector('#view').scrollWidth") <= width
        assert chat.evaluate("document.documentElement.scrollHeight") <= 667
        box = "(({left, right, bottom}) => left >= 0 && right <= innerWidth && bottom <= innerHeight)"
        for id in ("new", "toggle", "input", "send"):
            assert chat.evaluate(f"{box}(document.querySelector('#{id}').getBoundingClientRect())"), id
    chat.screenshot(picture := tmp_path / "page.png")
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000
