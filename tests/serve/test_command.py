"""`maxlike serve`: its flags. What it does with them is in test_end_to_end.py."""

import socket
from pathlib import Path
from typing import Any

import pytest

from maxlike.cli import EMBEDDED_MODEL, main
from maxlike.engine.async_engine import AsyncEngine
from maxlike.engine.config import EngineConfig
from maxlike.serve import command
from maxlike.serve.config import ServeConfig
from maxlike.serve.service import Service
from tests.serve.fake_engine import FakeEngine


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--port", "70000"], "port must be between"),
        (["--api-key", ""], "API key 1 of 1"),
        (["--api-key-file", "nowhere"], "nowhere cannot be read"),
        (["--chat-template", "nowhere"], "nowhere cannot be read"),
        (["--max-queue", "0"], "--max-queue"),
        (["--drain-timeout", "-1"], "drain_timeout"),
        (["no/such/model/here"], "there is no folder"),
        (["--host", "no.such.host.invalid"], "cannot have"),
        (["--num-pages", "0"], "num_pages"),
    ],
)
def test_bad_flags_are_told_in_a_line(flags: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--port", "0", *flags]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("maxlike: ") and says in said.err
    assert said.err.count("\n") == 1


def test_bad_sizes_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--max-body-size", "many"])
    assert "a size is expected" in capsys.readouterr().err


def test_a_port_that_is_taken_is_told_before_the_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "--port", str(taken.getsockname()[1])]) == 2
    assert "in use" in capsys.readouterr().err


def test_an_empty_file_of_keys_does_not_open_the_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "keys").write_text("\n\n")
    assert main(["serve", "--api-key-file", str(tmp_path / "keys")]) == 2
    assert "is empty" in capsys.readouterr().err


def test_flags_become_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    services: list[Service] = []
    loaded: list[tuple[Any, ...]] = []

    def run(service: Service, bound: socket.socket) -> int:
        assert service.engine.is_ready
        services.append(service)
        return 7

    def load(model: str, config: EngineConfig, **options: Any) -> FakeEngine:
        loaded.append((model, config, options))
        engine = FakeEngine()
        assert engine.tokenizer is not None
        engine.tokenizer.chat_templates["default"] = options["chat_template"]
        return engine

    (tmp_path / "keys").write_text("two\n\n three \n")
    (tmp_path / "chat.jinja").write_text("<tool_call>")
    monkeypatch.setattr(command, "run_server", run)
    monkeypatch.setattr(AsyncEngine, "from_model", load)
    flags = [
        "serve", "--port", "0", "--api-key", "one", "--api-key-file", str(tmp_path / "keys"), "--served-model-name",
        "m", "--cors-origin", "https://a.example", "--max-concurrent-requests", "5", "--max-queue", "6",
        "--max-body-size", "2K", "--body-timeout", "3", "--drain-timeout", "4", "--chat-template",
        str(tmp_path / "chat.jinja"), "--max-num-seqs", "3", "--dtype", "float32"]
    # The server's code is the command's.
    assert main(flags) == 7
    assert main([*flags, "--tool-format", "llama"]) == 7
    found, other = services
    assert found.config == ServeConfig(
        port=0, api_keys=("one", "two", "three"), served_model_name="m", max_body_bytes=2048, body_timeout=3,
        max_concurrent_requests=5, drain_timeout=4, cors_origins=("https://a.example",))
    assert found.has_chat_template
    assert (found.tool_format, other.tool_format) == ("hermes", "llama")  # the template's, or what is asked for
    model, config, options = loaded[0]
    assert model == str(EMBEDDED_MODEL) and config == EngineConfig(max_num_seqs=3, warm_up=True)
    assert options["max_queue"] == 6 and options["chat_template"] == "<tool_call>" and options["dtype"] == "float32"
    assert not found.engine.is_ready  # it was closed behind the server


@pytest.mark.parametrize(
    ("model", "name"), [(str(EMBEDDED_MODEL), "embedded"), (f"{EMBEDDED_MODEL}/", "embedded")]
)
def test_a_folders_name_is_the_models(model: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    services: list[Service] = []
    monkeypatch.setattr(command, "run_server", lambda service, bound: services.append(service))
    monkeypatch.setattr(AsyncEngine, "from_model", lambda *args, **options: FakeEngine())
    assert main(["serve", model, "--port", "0"]) == 0
    assert services[0].config.served_model_name == name
