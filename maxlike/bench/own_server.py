"""A server of our own for the length of a benchmark: `maxlike serve` in a process beside this one."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import httpx2

_ADDRESS = re.compile(rb"https?://[^\s/]+:\d+")
_PATIENCE_S = 60.0  # for it to stop


def serve_command(model: str, arguments: Sequence[str] = ()) -> list[str]:
    """The command that serves `model` on a free port of this machine, with further `arguments` of `maxlike serve`."""
    return [sys.executable, "-m", "maxlike", "serve", model, "--host", "127.0.0.1", "--port", "0", *arguments]


@contextmanager
def own_server(command: Sequence[str], *, start_timeout: float = 1800.0) -> Iterator[str]:
    """Starts a server and stops it at the end; yields its URL once it is ready (`/ready` answers 200).

    The command prints the server's URL on stdout, where that may be anything; its stderr is ours.

    Raises:
        ValueError: it ends instead, or is not ready after `start_timeout` seconds.
    """
    # A group of its own: an interrupt from the keyboard is for us, and we stop it.
    process = subprocess.Popen(list(command), stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, start_new_session=True)
    found: list[str] = []
    reader = threading.Thread(target=_read_address, args=(process, found), daemon=True)
    reader.start()
    try:
        yield _wait_until_ready(process, found, time.monotonic() + start_timeout, start_timeout)
    finally:
        process.terminate()
        try:
            process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        reader.join()
        assert process.stdout is not None
        process.stdout.close()


def _read_address(process: subprocess.Popen[bytes], found: list[str]) -> None:
    """Reads all that the server prints, so that it never waits for a reader; the first URL goes to `found`."""
    assert process.stdout is not None
    for line in process.stdout:
        if not found and (match := _ADDRESS.search(line)):
            found.append(match[0].decode())


def _wait_until_ready(process: subprocess.Popen[bytes], found: Sequence[str], until: float, timeout: float) -> str:
    with httpx2.Client(trust_env=False, timeout=5.0) as http:
        while time.monotonic() < until:
            if process.poll() is not None:
                raise ValueError(f"The server ended with exit code {process.returncode} before it was ready; what it "
                                 "said stands above.")
            if found:
                try:
                    if http.get(f"{found[0]}/ready").status_code == 200:
                        return found[0]
                except httpx2.TransportError:
                    pass  # not yet
            time.sleep(0.05)
    raise ValueError(f"The server was not ready after {timeout:g} s.")
