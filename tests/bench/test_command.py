"""`maxlike bench`: what it sends over real sockets, prints, writes and refuses, and how it ends its server."""

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import numpy as np
import pytest

import maxlike
from maxlike.bench.client import list_models
from maxlike.bench.command import add_command
from maxlike.bench.lengths import Lengths
from maxlike.bench.own_server import own_server, serve_command
from maxlike.bench.workload import Workload, WorkloadConfig
from maxlike.cli import main
from tests.bench.socket_server import FakeServer, running

ROOT = Path(__file__).resolve().parents[2]
EMBEDDED = Path(maxlike.__file__).parent / "embedded"
FAKE_SERVER = [sys.executable, str(Path(__file__).with_name("socket_server.py"))]


def bench(*argv: str) -> None:
    parser = argparse.ArgumentParser()
    add_command(parser.add_subparsers(), str(EMBEDDED), "1.2.3")
    args = parser.parse_args(["bench", *argv])
    args.run(args)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with running() as found:
        yield found


def test_one_load(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    bench("online", "--base-url", server.url, "--num-prompts", "5", "--input-len", "3", "--output-len", "uniform:2:4",
          "--warmup", "2")
    out = capsys.readouterr().out
    assert out.startswith(f"fake-model at {server.url}, completions: 5 prompts of random text, 3 words, outputs of "
                          "uniform:2:4 tokens\n\nall at once: 5 of 5 requests in ")
    assert len(server.bodies) == 7
    assert {body["model"] for body in server.bodies} == {"fake-model"}
    assert all(len(body["prompt"].split()) == 3 and 2 <= body["max_tokens"] <= 4 for body in server.bodies)
    counted = sum(body["max_tokens"] for body in server.bodies[2:])
    assert f"({counted}; 1.00 a piece of text)" in out
    assert "prompt tokens" in out and "(55, of which 0" in out  # by the server's count


def test_several_loads_with_json_and_plot(server: FakeServer, tmp_path: Path,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    bench("online", "--base-url", f"{server.url}/v1", "--model", "named", "--chat", "--request-rate", "200,inf",
          "--burstiness", "0.5", "--num-prompts", "6", "--output-len", "3", "--goodput", "ttft:60000", "--seed", "3",
          "--stop-at-eos", "--extra-body", '{"temperature": 0.5}', "--api-key", "secret", "--json", "-",
          "--plot", str(tmp_path / "load.png"))
    captured = capsys.readouterr()
    report = json.loads(captured.out)  # and nothing else
    assert [level["request_rate"] for level in report["levels"]] == [200, "inf"]
    assert [level["completed"] for level in report["levels"]] == [6, 6]
    assert [level["output_tokens"] for level in report["levels"]] == [18, 18]
    assert [level["good_share"] for level in report["levels"]] == [1, 1]
    assert (report["benchmark"], report["maxlike"]) == ("online", "1.2.3")
    assert report["config"]["served_model"] == "named"
    assert report["config"]["workload"]["output_len"] == "3"
    assert report["config"]["objectives"] == {"ttft": 60000, "tpot": None, "e2e": None}
    assert "secret" not in captured.out + captured.err
    assert "200 req/s" in captured.err and "goodput/s" in captured.err
    assert set(server.paths) == {"/v1/chat/completions"}
    assert server.bodies[0]["messages"][0]["role"] == "user"
    assert server.bodies[0]["temperature"] == 0.5
    assert "ignore_eos" not in server.bodies[0]
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")


def test_with_a_tokenizer_prompts_are_ids(server: FakeServer) -> None:
    common = ["online", "--base-url", server.url, "--num-prompts", "2", "--warmup", "0", "--output-len", "1",
              "--tokenizer", str(EMBEDDED), "--input-len", "9", "--prefix-len", "4", "--max-total-len", "12"]
    bench(*common)
    assert [len(body["prompt"]) for body in server.bodies] == [11, 11]
    assert server.bodies[0]["prompt"][:4] == server.bodies[1]["prompt"][:4]
    assert all(type(id) is int for body in server.bodies for id in body["prompt"])
    bench(*common, "--text")
    assert all(isinstance(body["prompt"], str) for body in server.bodies[2:])


def test_connections_are_kept(server: FakeServer) -> None:
    peers: set[object] = set()
    verify = server.verify_request

    def note(request: object, address: object) -> bool:
        peers.add(address)
        return verify(request, address)  # type: ignore[arg-type]

    server.verify_request = note  # type: ignore[method-assign, assignment]
    bench("online", "--base-url", server.url, "--concurrency", "2", "--num-prompts", "30", "--output-len", "2",
          "--warmup", "0", "--model", "m")
    assert len(server.bodies) == 30
    assert len(peers) == 2


@pytest.mark.parametrize("load", [["--request-rate", "inf"], ["--concurrency", "24"]])
def test_so_many_connections_as_it_takes_and_no_proxy(load: list[str], monkeypatch: pytest.MonkeyPatch,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    with running("together") as server:
        bench("online", "--base-url", server.url, *load, "--num-prompts", "24", "--output-len", "2", "--warmup", "0")
    assert "24 of 24 requests" in capsys.readouterr().out


@pytest.mark.parametrize(("behaviour", "kind", "message"), [
    ("busy", "HTTP 429", "the queue is full"),
    ("drops", "connection lost", "RemoteProtocolError"),
])
def test_failures_show(behaviour: str, kind: str, message: str, tmp_path: Path,
                       capsys: pytest.CaptureFixture[str]) -> None:
    with running(behaviour) as server:
        bench("online", "--base-url", server.url, "--concurrency", "1", "--num-prompts", "9", "--output-len", "3",
              "--warmup", "0", "--json", str(tmp_path / "report.json"))
    (level,) = json.loads((tmp_path / "report.json").read_text())["levels"]
    assert (level["sent"], level["completed"], level["failed"]) == (9, 6, 3)
    assert level["rejected"] == (3 if behaviour == "busy" else 0)
    (error,) = level["errors"]
    assert (error["kind"], error["count"]) == (kind, 3)
    assert message in error["example"]
    out = capsys.readouterr().out
    assert "3 of 9 requests FAILED" in out
    assert f"3 x {kind}: " in out


def test_when_nothing_succeeds_the_report_is_written_and_the_command_fails(tmp_path: Path) -> None:
    with running() as server:
        url = server.url
    file = tmp_path / "report.json"
    with pytest.raises(ValueError, match=f"No request succeeded. no connection: {url}"):
        bench("online", "--base-url", url, "--model", "m", "--warmup", "0", "--num-prompts", "3", "--json", str(file))
    assert json.loads(file.read_text())["levels"][0]["failed"] == 3
    with pytest.raises(ValueError, match="nothing was measured: no connection"):
        bench("online", "--base-url", url, "--model", "m")
    with pytest.raises(ValueError, match=f"{url}/v1/models cannot be asked for the model"):
        bench("online", "--base-url", url)


def test_what_is_said_of_a_file(server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": [1, 2], "output_len": 2}\n{"prompt": [1, 2, 3], "output_len": 200}\n')
    bench("online", "--base-url", server.url, "--prompts", str(file), "--num-prompts", "3", "--warmup", "0",
          "--max-total-len", "100")
    out = capsys.readouterr().out
    assert "1 prompts of the file were left out as too long." in out
    assert "too few prompts: 2 were sent again" in out
    assert [body["prompt"] for body in server.bodies] == [[1, 2]] * 3


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--base-url", "nowhere"], "A server's URL is expected"),
        (["--input-len", "x"], "Lengths are given as"),
        (["--request-rate", "1", "--concurrency", "1"], "exclude each other"),
        (["--goodput", "ttft"], "Objectives"),
        (["--num-prompts", "0"], "num_prompts must be at least 1"),
        (["--warmup", "-1"], "--warmup must be at least 0"),
        (["--timeout", "0"], "--timeout must be above 0"),
        (["--extra-body", "[1]"], "--extra-body takes a JSON object, as .*; got"),
        (["--extra-body", "{"], "--extra-body takes a JSON object"),
        (["more"], "Not understood: more"),
        (["--base-url", "http://127.0.0.1:1", "--", "--x", "3"], "no server of our own to take --x 3"),
        (["--json", "/none/x.json"], "there is no folder /none"),
        (["--plot", "/none/x.png"], "there is no folder /none"),
        (["--plot", "x.gif"], "ends in .png"),
        (["--prompts", "/none"], "cannot be read"),
        (["--base-url", "http://127.0.0.1:1", "--tokenizer", "/none"], "there is no folder"),
        (["--model", "/none"], "there is no folder"),
    ],
)
def test_refused_before_anything_is_started(flags: list[str], told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object, **options: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", never)
    with pytest.raises(ValueError, match=told):
        bench("online", *flags)


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (404, b"{}", "cannot be asked for the model: .*404"),
        (200, b"<html>", "does not list models"),
        (200, b"[]", "does not list models"),
        (200, b'{"data": [{}]}', "does not list models"),
        (200, b'{"data": []}', "lists no model"),
    ],
)
def test_no_models(status: int, body: bytes, told: str) -> None:
    transport = httpx2.MockTransport(lambda request: httpx2.Response(status, content=body))
    with pytest.raises(ValueError, match=told):
        asyncio.run(list_models("http://server/", transport=transport))


# -- a server of our own


def test_own_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    marker = tmp_path / "marker"
    asked: list[tuple[str, tuple[str, ...]]] = []

    def command(model: str, arguments: tuple[str, ...] = ()) -> list[str]:
        asked.append((model, arguments))
        return [*FAKE_SERVER, "steady", str(marker)]

    monkeypatch.setattr("maxlike.bench.command.serve_command", command)
    bench("online", "--num-prompts", "3", "--input-len", "5", "--output-len", "2", "--json", "-", "--",
          "--max-num-seqs", "4", "--name", "a b")
    report = json.loads(capsys.readouterr().out)
    assert report["levels"][0]["completed"] == 3
    assert asked == [(str(EMBEDDED), ("--max-num-seqs", "4", "--name", "a b"))]
    assert marker.read_text() == "ended in order"
    assert serve_command("m", ["--x"])[1:] == ["-m", "maxlike", "serve", "m", "--host", "127.0.0.1", "--port", "0",
                                               "--x"]


def test_own_server_that_ends(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="ended with exit code 3"), own_server([*FAKE_SERVER, "fails", ""]):
        raise AssertionError("it is not there")
    assert "there is no such model" in capfd.readouterr().err


def test_own_server_that_says_nothing() -> None:
    with pytest.raises(ValueError, match=r"not ready after 0\.3 s"), own_server(
            [*FAKE_SERVER, "silent", ""], start_timeout=0.3):
        raise AssertionError("it is not there")


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_terminated_it_stops_its_server(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    program = f"""
from maxlike.bench import command
command.serve_command = lambda model, arguments=(): {[*FAKE_SERVER, "steady", str(marker)]!r}
from maxlike.cli import main
main(["bench", "online", "--request-rate", "0.01"])
"""
    command, environment = [sys.executable, "-c", program], {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("fake-model at http://127.0.0.1:")  # the server is there
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    assert marker.read_text() == "ended in order"


def test_online_leaves_the_devices_alone(tmp_path: Path) -> None:
    """A server of our own needs them, and an accelerator is given to one process."""
    program = f"""
import argparse, sys
from maxlike.bench import command
command.serve_command = lambda model, arguments=(): {[*FAKE_SERVER, "steady", str(tmp_path / "marker")]!r}
import jax
from maxlike.cli import main
assert main(["bench", "online", "--num-prompts", "2", "--output-len", "1"]) == 0
jax.config.update("jax_num_cpu_devices", 3)  # raises once a backend is there
"""
    environment = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "all at once: 2 of 2 requests" in run.stdout


# -- the command line


def test_mistakes_are_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["online", "--input-len", "x"], ["online", "--base-url", "http://127.0.0.1:1", "--model", "m"],
                 ["offline", "--rounds", "0"], ["offline", "--json", "/none/x.json"], ["offline", "--tp", "3"]):
        assert main(["bench", *argv]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("maxlike: ")
        assert captured.err.count("\n") == 1
    for argv in (["online", "--num-prompts", "x"], ["offline", "more"], []):
        with pytest.raises(SystemExit) as ended:
            main(["bench", *argv])
        assert ended.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_offline_on_the_embedded_model(capsys: pytest.CaptureFixture[str]) -> None:
    """Prefix hits are known: all but the first prompt find the 64 tokens of the one page that all begin with."""
    assert main(["bench", "offline", "--num-prompts", "5", "--prefix-len", "64", "--input-len", "uniform:3:9",
                 "--output-len", "uniform:2:6", "--max-model-len", "96", "--max-num-seqs", "2", "--tp", "1",
                 "--max-num-batched-tokens", "16", "--rounds", "2", "--warmup", "1", "--json", "-"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    asked = Workload(WorkloadConfig(num_prompts=5, prefix_len=64, input_len=Lengths.parse("uniform:3:9"),
                                    output_len=Lengths.parse("uniform:2:6")), "ids", vocabulary=np.arange(9))
    for stage, figures in enumerate(report["rounds"], 1):
        prompts = asked.prompts(stage)
        assert figures["requests"] == 5
        assert figures["prompt_tokens"] == sum(prompt.n_tokens or 0 for prompt in prompts)
        assert figures["output_tokens"] == sum(prompt.output_len for prompt in prompts)
        assert figures["cached_prompt_tokens"] == 5 * 64  # since the warm-up
        assert figures["output_tokens_per_s"] == pytest.approx(figures["output_tokens"] / figures["duration_s"])
    assert report["benchmark"] == "offline"
    assert report["config"]["engine"]["max_num_seqs"] == 2
    assert report["devices"] == ["cpu"]
    assert "output tokens" in captured.err


@pytest.mark.slow
@pytest.mark.parametrize("chat", [False, True])
def test_online_on_the_embedded_model(chat: bool, tmp_path: Path) -> None:
    """The server's counts are the workload's."""
    template = tmp_path / "template.jinja"
    template.write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    command = [sys.executable, "-m", "maxlike", "bench", "online", "--num-prompts", "6", "--prefix-len", "64",
               "--input-len", "uniform:3:9", "--output-len", "uniform:2:6", "--warmup", "1", "--request-rate", "50,inf",
               "--json", str(tmp_path / "report.json"), "--plot", str(tmp_path / "load.svg"), *["--chat"] * chat,
               "--", "--max-model-len", "128", "--max-num-seqs", "4", "--tp", "1", "--max-num-batched-tokens", "16",
               "--chat-template", str(template)]
    run = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    config = WorkloadConfig(num_prompts=6, prefix_len=64, input_len=Lengths.parse("uniform:3:9"),
                            output_len=Lengths.parse("uniform:2:6"))
    asked = Workload(config, "ids", vocabulary=np.arange(9))
    for stage, level in enumerate(report["levels"], 1):
        prompts = asked.prompts(stage)
        assert (level["completed"], level["without_usage"], level["errors"]) == (6, 0, [])
        assert level["output_tokens"] == sum(prompt.output_len for prompt in prompts)
        if not chat:  # whose text is as long but for words that are cut
            assert level["prompt_tokens"] == sum(prompt.n_tokens or 0 for prompt in prompts)
        assert level["cached_prompt_tokens"] == 6 * 64
        assert 0 < level["ttft_ms"]["median"] <= level["e2e_ms"]["max"] < 1e3 * level["duration_s"] + 1
    assert (tmp_path / "load.svg").read_text().count("<path") > 20
