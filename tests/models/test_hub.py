"""Finding a model's folder: local folders, the hub's cache, and every way in which the hub can fail."""

import os
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from maxlike.models import hub
from maxlike.models.hub import resolve, resolve_config

COMMIT, TAGGED = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A hub cache that holds org/name at two commits; the hub is out of reach."""
    repository = tmp_path / "hub" / "models--org--name"
    for ref, commit in (("main", COMMIT), ("v1", TAGGED)):
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text("{}")
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / ref).write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return repository / "snapshots"


@pytest.fixture
def online(monkeypatch):
    """The hub answers: `online(answer)` says what to `snapshot_download`. Returns the calls it got."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def answer(result, probe=None):
        calls = []

        def snapshot_download(*args, **options):
            calls.append((args, options))
            if isinstance(result, Exception):
                raise result
            return str(result)

        def model_info(self, name, **options):
            assert options["timeout"] is not None
            if probe is not None:
                raise probe

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
        return calls

    return answer


def http_error(kind, status=404, message="the server's words"):
    """An error of the hub's own, as raised for an HTTP answer."""
    return kind(message, response=SimpleNamespace(status_code=status, headers={}, request=None))


# -- folders


def test_a_folder_is_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve(tmp_path / "org") == tmp_path / "org"
    assert resolve(str(tmp_path / "org")) == tmp_path / "org"
    assert resolve("org/name") == Path("org/name")  # before any model of that name on the hub
    assert resolve("~/org") == tmp_path / "org"
    assert resolve("./org/name/") == Path("org/name")
    assert isinstance(resolve("org"), Path)
    with pytest.raises(ValueError, match=r"'org' is a folder: a revision \('v1'\)"):
        resolve("org", revision="v1")


@pytest.mark.parametrize(
    "missing",
    [
        "/no/such/folder", "/nowhere", "./nowhere", "../nowhere", "~/nowhere at all", "a/b/c", "models/x/",
        "C:\\models\\x", "models\\x", "", Path("nowhere"), Path("org/name"),
    ],
)  # fmt: skip
def test_a_folder_that_is_missing(tmp_path, monkeypatch, online, missing):
    calls = online(AssertionError("nobody asks the hub"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="there is no folder") as raised:
        resolve(missing)
    assert os.path.expanduser(str(missing)).replace("\\", "\\\\") in str(raised.value)
    assert calls == []


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"model\.safetensors' is a file: give the folder"):
        resolve(tmp_path / "model.safetensors")


# -- the cache, when the hub is out of reach


def test_the_cache_serves_offline(cache):
    assert resolve("org/name") == cache / COMMIT
    assert resolve("org/name", revision="v1") == cache / TAGGED
    assert resolve("org/name", revision=TAGGED) == cache / TAGGED


@pytest.mark.parametrize(
    ("name", "revision"),
    [("org/other", None), ("gpt2", None), ("org/name", "v2"), ("org/name", "c" * 40)],
)
def test_what_the_cache_lacks_offline(cache, name, revision):
    start = time.monotonic()
    with pytest.raises(ValueError, match="could not be reached") as raised:
        resolve(name, revision=revision)
    assert time.monotonic() - start < 5
    text = str(raised.value)
    assert repr(name) in text and "cache" in text and "\n" not in text
    assert revision is None or repr(revision) in text


@pytest.mark.parametrize("name", ["org/na me", "org/name:latest", "-org/name", "a" * 100, "org/na--me", "https:x"])
def test_ids_that_are_none(cache, name):
    with pytest.raises(ValueError, match="neither an existing folder nor a hub id like 'org/name'") as raised:
        resolve(name)
    assert repr(name) in str(raised.value)


def test_a_silent_hub_is_given_up_soon(cache, monkeypatch):
    # A server that takes connections and never answers.
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub, "_PATIENCE", 0.2)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        start = time.monotonic()
        assert resolve("org/name") == cache / COMMIT
        with pytest.raises(ValueError, match=r"could not be reached \(ReadTimeout: timed out\)"):
            resolve("org/other")
        assert time.monotonic() - start < 10


# -- the hub answers


def test_what_is_fetched(tmp_path, online):
    calls = online(tmp_path)
    assert resolve("org/name", revision="v1") == tmp_path
    [((name,), options)] = calls
    assert name == "org/name" and options["revision"] == "v1" and not options["local_files_only"]
    files = [
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "special_tokens_map.json", "chat_template.json", "chat_template.jinja", "additional_chat_templates/rag.jinja",
        "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
    ]  # fmt: skip
    others = [
        "README.md", "pytorch_model.bin", "pytorch_model.bin.index.json", "model.gguf", "original/consolidated.00.pth",
        "consolidated.safetensors", "consolidated-00001-of-00002.safetensors", "onnx/model.onnx",
        "vae/model.safetensors", ".gitattributes", "tf_model.h5", "vocab.json",
    ]  # fmt: skip
    patterns = {key: options[key] for key in ("allow_patterns", "ignore_patterns")}
    assert list(huggingface_hub.utils.filter_repo_objects([*files, *others], **patterns)) == files


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (http_error(errors.RepositoryNotFoundError, 401), "no such model on the hub (or it is private)"),
        (http_error(errors.GatedRepoError, 403), "is gated: accept its terms"),
        (http_error(errors.RevisionNotFoundError), "has no revision 'v1' on the hub"),
        (http_error(errors.DisabledRepoError, 403), "could not be fetched from the hub (DisabledRepoError: the"),
        (http_error(errors.HfHubHTTPError, 500), "could not be fetched from the hub (HfHubHTTPError: the server's"),
        (errors.LocalEntryNotFoundError("not there\nat all"), "reached (LocalEntryNotFoundError: not there)"),
        (OSError(28, "No space left on device"), "could not be fetched from the hub (OSError: [Errno 28] No space"),
        (errors.HTTPError("peer closed connection"), "could not be fetched from the hub (HTTPError: peer closed"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
@pytest.mark.parametrize("probe_fails", [False, True])
def test_failures(online, error, says, probe_fails):
    online(error, probe=error if probe_fails and isinstance(error, errors.HfHubHTTPError) else None)
    with pytest.raises(ValueError, match="'org/name'") as raised:
        resolve("org/name", revision="v1")
    assert says in str(raised.value) and "\n" not in str(raised.value)
    assert raised.value.__cause__ is error


def test_a_hub_that_refuses_may_still_have_been_cached(cache, tmp_path, online):
    calls = online(tmp_path, probe=http_error(errors.GatedRepoError, 403))
    assert resolve("org/name") == tmp_path  # `snapshot_download` answers from the cache by itself
    assert not calls[0][1]["local_files_only"]
    calls = online(tmp_path, probe=errors.HTTPError("no route to host"))
    assert resolve("org/name") == tmp_path
    assert calls[0][1]["local_files_only"]


# -- the config alone


def test_a_config_is_found_without_the_rest(tmp_path, cache, online):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "some-model.json").write_text("{}")
    assert resolve_config(tmp_path) == resolve_config(tmp_path / "config.json") == tmp_path / "config.json"
    assert resolve_config(str(tmp_path / "some-model.json")) == tmp_path / "some-model.json"
    assert resolve_config(tmp_path / "none") == tmp_path / "none" / "config.json"  # which its reader will miss
    with pytest.raises(ValueError, match=r"there is no file '.*missing\.json': give a config\.json, a folder"):
        resolve_config(tmp_path / "missing.json")
    assert resolve_config("org/name") == cache / COMMIT / "config.json"
    calls = online(tmp_path)
    assert resolve_config("org/name") == tmp_path / "config.json"
    ((_, options),) = calls
    assert options["allow_patterns"] == ["config.json"]  # no weights, no tokenizer
