"""`maxlike serve` on the embedded model, in a process of its own."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def maxlike_serve(*flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process, and its URL."""
    command = [sys.executable, "-m", "maxlike", "serve", "--port", "0", "--dtype", "float32", "--max-num-seqs", "8",
               "--max-num-batched-tokens", "64", "--num-pages", "128", *flags]
    one_device = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"  # the last one counts
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": one_device}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)
    said: list[str] = []
    assert process.stdout is not None and process.stderr is not None
    reader = threading.Thread(target=lambda: said.extend(process.stderr or ()))
    reader.start()
    try:
        line = process.stdout.readline()
        found = re.fullmatch(r"maxlike: \S+ is served at (http://127\.0\.0\.1:\d+)\n", line)
        assert found, (line, said)
        yield process, found[1]
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        reader.join()
        process.stdout.close()
        process.stderr.close()


def figures(url: str) -> dict[str, float]:
    """The server's metrics without labels, and without `maxlike_`."""
    families = text_string_to_metric_families(httpx2.get(f"{url}/metrics").text)
    return {sample.name.removeprefix("maxlike_"): sample.value
            for family in families for sample in family.samples if not sample.labels}
