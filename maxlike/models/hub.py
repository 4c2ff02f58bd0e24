"""From what the user calls a model, a folder or a Hugging Face hub id, to a folder."""

import os
from collections.abc import Sequence
from pathlib import Path

_WANTED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",  # not read; but the tokenizer can then say what there is instead of tokenizer.json
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "*.safetensors",
    "*.safetensors.index.json",
    "adapter_config.json",
)
# The same weights a second time: in a subfolder for other programs, or under their maker's own names.
_UNWANTED = ("*/*.safetensors", "consolidated*.safetensors")

_PATIENCE = 5.0  # seconds for the hub to answer (each of its addresses); then the local cache must do


def resolve(model: str | os.PathLike[str], *, revision: str | None = None) -> Path:
    """The folder of `model`: an existing folder as it is, else the local copy of a hub id ("org/name").

    What is missing from the local cache is downloaded: config, tokenizer, chat template and `*.safetensors`,
    at `revision` (branch, tag or commit; "main" by default). When the hub cannot be reached, the cache must do.

    Raises `ValueError` when there is no such folder, or the hub has no such model, withholds it, or cannot be
    reached and the model is not in the cache.
    """
    name = os.fspath(model)
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        if revision is not None:
            raise ValueError(f"{name!r} is a folder: a revision ({revision!r}) is for models from the hub")
        return Path(path)
    if os.path.exists(path):
        raise ValueError(f"{name!r} is a file: give the folder that holds config.json and the weights")
    if not name or not isinstance(model, str) or _looks_like_a_path(name):
        raise ValueError(f"there is no folder {path!r}: give an existing folder, or a hub id like 'org/name'")
    return _fetch(name, revision, _WANTED)


def resolve_config(model: str | os.PathLike[str]) -> Path:
    """The `config.json` of `model`: that file itself, the one in a folder, or of a hub id, of which nothing else is
    downloaded.

    Raises `ValueError` as `resolve`.
    """
    path = os.path.expanduser(os.fspath(model))
    if os.path.isfile(path):
        return Path(path)
    if not path or (path.endswith(".json") and not os.path.isdir(path)):
        raise ValueError(f"there is no file {path!r}: give a config.json, a folder that has one, or a hub id like "
                         "'org/name'")
    if os.path.isdir(path) or not isinstance(model, str) or _looks_like_a_path(path):
        return Path(path) / "config.json"
    return _fetch(path, None, ("config.json",)) / "config.json"


def _looks_like_a_path(name: str) -> bool:
    return name.startswith((".", "~")) or os.path.isabs(name) or "\\" in name or name.count("/") > 1


def _fetch(name: str, revision: str | None, wanted: Sequence[str]) -> Path:
    # Imported here: it takes a third of a second, which a local folder need not cost.
    import huggingface_hub as hub
    from huggingface_hub import errors

    what = f"model {name!r}" if revision is None else f"model {name!r} at revision {revision!r}"
    # The parents of all the library's failures: HTTP and network errors, and errors of files and sockets.
    failures = (errors.HTTPError, OSError)
    unreachable = None
    try:
        # `snapshot_download` sets no time limit on its first request: a firewall that swallows packets would
        # hold it for minutes. This request has one.
        hub.HfApi().model_info(name, revision=revision, timeout=_PATIENCE)
    except errors.HFValidationError as error:
        raise ValueError(f"{name!r} is neither an existing folder nor a hub id like 'org/name': {error}") from error
    except errors.HfHubHTTPError:
        pass  # the hub is there; what it answers counts below, where the cache may still help
    except failures as error:
        unreachable = error
    try:
        folder = hub.snapshot_download(
            name,
            revision=revision,
            allow_patterns=list(wanted),
            ignore_patterns=list(_UNWANTED),
            local_files_only=unreachable is not None,
        )
    except errors.GatedRepoError as error:
        raise ValueError(
            f"{what} is gated: accept its terms on its page on the hub, then log in with `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"model {name!r} has no revision {revision!r} on the hub") from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"there is no folder {name!r}, and no such model on the hub (or it is private): "
            "check the name, or log in with `hf auth login`"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise ValueError(
            f"there is no folder {name!r}; the hub could not be reached ({_line(unreachable or error)}), and "
            f"{what} is not, or not wholly, in its local cache: go online, or give the folder of a local copy"
        ) from error
    except failures as error:
        raise ValueError(
            f"{what} could not be fetched from the hub ({_line(error)}): try again, what was fetched is kept"
        ) from error
    return Path(folder)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
