"""A headless Chromium for tests, spoken to in its DevTools protocol (https://chromedevtools.github.io/devtools-protocol).

The messages are JSON that ends in a NUL, over a pair of pipes, so nothing need be installed but the browser itself.
"""

from __future__ import annotations

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE = 60  # seconds; what has not happened until then does not happen
# Chromium reads descriptor 3 and writes 4, which a parent cannot place without code run between fork and exec.
LAUNCH = ("import os, sys; _, commands, answers, *program = sys.argv; os.dup2(int(commands), 3); "
          "os.dup2(int(answers), 4); os.execv(program[0], program)")
KEYS = {"Enter": (13, "\r"), "Escape": (27, "")}
SHIFT = 8


def find_chromium() -> str | None:
    """The browser's path, if there is one."""
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


class Chromium:
    """A browser process. `page()` opens pages, each with a storage of its own."""

    def __init__(self, program: str, folder: Path):
        flags = ["--headless=new", "--remote-debugging-pipe", f"--user-data-dir={folder / 'profile'}", "--no-first-run",
                 "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking", "--disable-extensions",
                 "--disable-component-update", "--hide-scrollbars", "--force-device-scale-factor=1"]
        if os.geteuid() == 0:
            flags.append("--no-sandbox")  # root cannot have one
        self.log = folder / "chromium.log"
        commands, self.commands = os.pipe()
        self.answers, answers = os.pipe()
        above = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (commands, answers)]  # clear of 3 and 4
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([sys.executable, "-c", LAUNCH, *map(str, above), program, *flags],
                                            pass_fds=above, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        for fd in (commands, answers, *above):
            os.close(fd)
        self.received = b""
        self.ids = itertools.count(1)
        self.pages: dict[str, Page] = {}

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """A command's answer. Events that arrive before it go to their pages."""
        id = next(self.ids)
        message = {"id": id, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == id:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            if page := self.pages.get(answer.get("sessionId", "")):
                page.on_event(answer["method"], answer["params"])

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self.received:
            ready, _, _ = select.select([self.answers], [], [], PATIENCE)
            more = os.read(self.answers, 1 << 20) if ready else b""
            assert more, f"Chromium does not answer. It said: {self.log.read_text(errors='replace')[-2000:]}"
            self.received += more
        message, self.received = self.received.split(b"\0", 1)
        return json.loads(message)

    @contextmanager
    def page(self) -> Iterator[Page]:
        """An empty page, which forgets everything when it is closed."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.pages[session] = page = Page(self, session)
        try:
            for domain in ("Page", "Runtime", "Log", "Accessibility"):
                page.call(f"{domain}.enable")
            page.resize(1000, 800)
            yield page
        finally:
            del self.pages[session]
            self.call("Target.disposeBrowserContext", browserContextId=context)

    def close(self) -> None:
        """Ends the process."""
        self.process.terminate()
        try:
            self.process.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.commands)
        os.close(self.answers)


class Page:
    """A page, and what a person does with it.

    `complaints` is what its console says of the page itself, `refused` what it says of requests that failed.
    """

    def __init__(self, browser: Chromium, session: str):
        self.browser, self.session = browser, session
        self.complaints: list[str] = []
        self.refused: list[str] = []

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the protocol, to this page."""
        return self.browser.call(method, self.session, **parameters)

    def on_event(self, method: str, event: dict[str, Any]) -> None:
        """Takes note of what the console shows."""
        if method == "Runtime.exceptionThrown":
            details = event["exceptionDetails"]
            self.complaints.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Runtime.consoleAPICalled" and event["type"] in ("error", "warning", "assert"):
            self.complaints.append(str([argument.get("value") for argument in event["args"]]))
        elif method == "Log.entryAdded" and event["entry"]["level"] in ("error", "warning"):
            entry = event["entry"]
            of = self.refused if entry["source"] == "network" else self.complaints
            of.append(f"{entry['text']} {entry.get('url', '')}")

    def open(self, url: str) -> None:
        """Goes there and waits until it is loaded."""
        assert "errorText" not in (loaded := self.call("Page.navigate", url=url)), loaded
        self.wait("document.readyState === 'complete'")

    def evaluate(self, expression: str) -> Any:
        """A JavaScript expression's value, as JSON has it."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, f"{expression}: {answer['exceptionDetails']}"
        return answer["result"].get("value")

    def text(self, selector: str) -> str:
        """What stands in the first such element."""
        return self.evaluate(f"document.querySelector({json.dumps(selector)}).textContent")

    def texts(self, selector: str) -> list[str]:
        """What stands in each such element."""
        return self.evaluate(f"[...document.querySelectorAll({json.dumps(selector)})].map((e) => e.textContent)")

    def wait(self, expression: str) -> Any:
        """The expression's value as soon as it is true."""
        end = time.monotonic() + PATIENCE
        while not (value := self.evaluate(expression)):
            shown = self.evaluate("document.body && document.body.innerText")
            assert time.monotonic() < end, f"{expression} has not come true. Console: {self.complaints}. Page: {shown}"
            time.sleep(0.01)
        return value

    def wait_for_text(self, selector: str, part: str) -> None:
        """Waits until one such element holds the text."""
        self.wait(f"[...document.querySelectorAll({json.dumps(selector)})]"
                  f".some((e) => e.checkVisibility() && e.textContent.includes({json.dumps(part)}))")

    def type(self, text: str) -> None:
        """Text, into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, modifiers: int = 0) -> None:
        """A key, down and up."""
        code, text = KEYS[key]
        about = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **about)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def click(self, selector: str) -> None:
        """A mouse click in the element's middle; fails if something else lies there."""
        x, y = self.evaluate(
            "(() => {"
            f"  const element = document.querySelector({json.dumps(selector)});"
            "   element.scrollIntoView({block: 'nearest'});"
            "   const box = element.getBoundingClientRect();"
            "   const [x, y] = [box.x + box.width / 2, box.y + box.height / 2];"
            "   if (!element.contains(document.elementFromPoint(x, y))) throw Error('something lies over it');"
            "   return [x, y];"
            "})()")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def fill(self, selector: str, text: str) -> None:
        """Puts text into a field as a person does, in place of what is there."""
        self.evaluate(f"document.querySelector({json.dumps(selector)}).select()")
        self.evaluate(f"document.querySelector({json.dumps(selector)}).focus()")
        self.type(text)

    def turn_wheel(self, selector: str, pixels: int) -> None:
        """Turns the mouse's wheel over the element; up is negative."""
        x, y = self.evaluate(f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])"
                             f"(document.querySelector({json.dumps(selector)}).getBoundingClientRect())")
        self.call("Input.dispatchMouseEvent", type="mouseWheel", x=x, y=y, deltaX=0, deltaY=pixels)

    def resize(self, width: int, height: int) -> None:
        """The window's size in pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def prefer(self, scheme: str) -> None:
        """`light` or `dark`, as the system would say."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, file: Path) -> None:
        """The window's picture, as PNG."""
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
