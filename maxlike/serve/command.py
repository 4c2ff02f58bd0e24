"""`maxlike serve`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from maxlike.engine.async_engine import AsyncEngine
from maxlike.engine.flags import add_engine_flags, engine_options, memory_size, read_text
from maxlike.serve.config import MAX_PROMPTS, ServeConfig
from maxlike.serve.tool_calls import KINDS, detect


def add_command(commands: Any, embedded_model: str) -> None:
    """Adds `serve` to the subparsers `commands` of the command line.

    `embedded_model` is served where none is named.
    """
    parser = commands.add_parser("serve", help="serve a model over HTTP, as OpenAI does", description=(
        "Serve a model over HTTP with OpenAI's interface. Prints the address once requests are taken. The first "
        "SIGTERM or SIGINT lets running requests finish, the second does not."))
    parser.add_argument("model", nargs="?", metavar="FOLDER|HUB_ID", default=embedded_model,
                        help="a Hugging Face checkpoint; default: the small embedded model of Python source")
    default = ServeConfig()
    server = parser.add_argument_group("server")
    server.add_argument("--host", default=default.host, help=f"address to listen on; default {default.host}, this "
                        "machine alone; 0.0.0.0 for all its addresses")
    server.add_argument("--port", type=int, default=default.port, help=f"default {default.port}; 0: any that is free")
    server.add_argument("--served-model-name", metavar="NAME", help="what clients call the model; default: the hub id, "
                        "or the folder's name; with --adapter the adapter's")
    server.add_argument("--api-key", action="append", default=[], metavar="KEY", help="let in only those who send it; "
                        "may be given several times. Others on this machine can read it in the list of processes: "
                        "rather --api-key-file")
    server.add_argument("--api-key-file", type=Path, metavar="FILE", help="a file of keys, one a line")
    server.add_argument("--cors-origin", action="append", default=[], metavar="ORIGIN", help="pages from there may "
                        "call the server from a browser; *: from anywhere; may be given several times")
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-concurrent-requests", type=int, default=default.max_concurrent_requests, metavar="N",
                        help=f"more are turned away with 429; default {default.max_concurrent_requests}")
    limits.add_argument("--max-queue", type=int, default=MAX_PROMPTS, metavar="N", help="so many prompts may wait for "
                        f"the engine, and more are turned away with 429; also the most continuations that one request "
                        f"may ask for; default {MAX_PROMPTS}")
    limits.add_argument("--max-body-size", type=memory_size, default=default.max_body_bytes, metavar="SIZE",
                        help="longest body of a request; default 4M")
    limits.add_argument("--body-timeout", type=float, default=default.body_timeout, metavar="S", help="seconds in "
                        f"which a request's body must have come; default {default.body_timeout:g}")
    limits.add_argument("--drain-timeout", type=float, default=default.drain_timeout, metavar="S", help="seconds that "
                        f"running requests have to finish after the first signal; default {default.drain_timeout:g}")
    chat = parser.add_argument_group("chat")
    chat.add_argument("--chat-template", type=Path, metavar="FILE", help="a Jinja chat template in place of the "
                      "checkpoint's")
    chat.add_argument("--tool-format", choices=KINDS, help="how the model writes calls of tools; default: what its "
                      "chat template tells")
    add_engine_flags(parser.add_argument_group("engine"))
    parser.set_defaults(run=_serve)


def _serve(args: argparse.Namespace) -> int:
    # Imported here: they take a fifth of a second, which other commands need not cost.
    from maxlike.serve.server import bind, run_server
    from maxlike.serve.service import Service

    if args.max_queue < 1:
        raise ValueError(f"--max-queue must be at least 1; got {args.max_queue}.")
    config = ServeConfig(
        host=args.host, port=args.port, api_keys=(*args.api_key, *_keys(args.api_key_file)),
        served_model_name=args.served_model_name or _name(args.adapter or args.model),
        base_model_name=_name(args.model) if args.adapter else None,
        max_body_bytes=args.max_body_size, body_timeout=args.body_timeout,
        max_concurrent_requests=args.max_concurrent_requests, drain_timeout=args.drain_timeout,
        cors_origins=tuple(args.cors_origin))
    template = None if args.chat_template is None else read_text(args.chat_template, "chat template")
    engine_config, options = engine_options(args, args.model)
    with bind(config) as bound:
        start = time.perf_counter()
        print(f"maxlike: loading {args.model} and compiling its programs, which the first time takes a minute or more",
              file=sys.stderr, flush=True)
        engine = AsyncEngine.from_model(args.model, replace(engine_config, warm_up=True), max_queue=args.max_queue,
                                        chat_template=template, **options)
        print(f"maxlike: {engine.n_compiled} programs (compiled in {engine.compile_s:.1f} s) and "
              f"{engine.metrics.pages_total} pages of {engine.config.page_size} tokens are ready after "
              f"{time.perf_counter() - start:.1f} s; sequences have up to {engine.max_model_len} tokens",
              file=sys.stderr)
        source = engine.tokenizer.chat_template if engine.tokenizer is not None else None
        tool_format = args.tool_format or (None if source is None else detect(source))
        engine.start()
        try:
            return run_server(Service(engine, config, tool_format), bound)
        finally:
            engine.close()


def _name(model: str) -> str:
    """What a folder or hub id is called."""
    folder = Path(os.path.expanduser(model))
    return folder.resolve().name if folder.is_dir() else model


def _keys(file: Path | None) -> Sequence[str]:
    if file is None:
        return []
    keys = [line.strip() for line in read_text(file, "file of API keys").splitlines() if line.strip()]
    if not keys:  # nobody means to let everybody in by that
        raise ValueError(f"The file of API keys {file} is empty: write one key a line.")
    return keys
