"""`maxlike bench online` and `maxlike bench offline`."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal, TextIO

import jax
from tqdm import tqdm

from maxlike.bench.client import Client, RequestRecord, list_models, server_root
from maxlike.bench.figures import LevelFigures, Objectives
from maxlike.bench.lengths import Lengths
from maxlike.bench.load import Load, parse_loads
from maxlike.bench.offline import run_offline
from maxlike.bench.online import run_online
from maxlike.bench.own_server import own_server, serve_command
from maxlike.bench.plot import check_plot, plot
from maxlike.bench.report import check_writable, document, level_text, summary_text, write_json
from maxlike.bench.workload import DEFAULT_INPUT_LEN, DEFAULT_OUTPUT_LEN, Workload, WorkloadConfig, random_ids
from maxlike.engine.flags import add_engine_flags, engine_options
from maxlike.engine.llm import LLM
from maxlike.engine.loading import has_tokenizer
from maxlike.models.hub import resolve
from maxlike.models.registry import parse_config
from maxlike.models.tokenizer import Tokenizer


@dataclass(frozen=True)
class OnlineConfig:
    """What is asked of which server, and how.

    Args:
        loads: one after the other.
        base_url: of the server; `None`: one of our own for `model`.
        model: the name that the server knows (`None`: the first that it lists); a checkpoint for a server of our own.
        api_key: for the server.
        chat: ask for chat completions rather than completions.
        text: send random prompts as text where they could be token ids.
        tokenizer: the folder or hub id of a tokenizer, by which random prompts are as long as asked.
        ignore_eos: outputs have exactly the length asked for, by an option of vLLM that OpenAI does not have.
        extra_body: more fields of each request.
        timeout: seconds that a request may take.
        warm_up: requests beforehand that are not counted.
        objectives: that goodput goes by.
        server_args: further arguments of `maxlike serve`.

    Raises:
        ValueError: a value is out of range, or two exclude each other.
    """

    loads: tuple[Load, ...]
    base_url: str | None = None
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)
    chat: bool = False
    text: bool = False
    tokenizer: str | None = None
    ignore_eos: bool = True
    extra_body: dict[str, Any] = field(default_factory=dict)
    timeout: float = 600.0
    warm_up: int = 8
    objectives: Objectives | None = None
    server_args: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.warm_up < 0:
            raise ValueError(f"--warmup must be at least 0; got {self.warm_up}.")
        if not self.timeout > 0:
            raise ValueError(f"--timeout must be above 0 seconds; got {self.timeout}.")
        if self.base_url is not None:
            server_root(self.base_url)
            if self.server_args:
                raise ValueError(f"With --base-url there is no server of our own to take {' '.join(self.server_args)}.")
        if self.server_args and not self.server_args[0].startswith("-"):
            raise ValueError(f"Not understood: {' '.join(self.server_args)} (arguments of the server stand behind --).")

    def as_json(self) -> dict[str, Any]:
        """The configuration as the report shows it: all but the key, and the loads, which stand with their figures."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("loads", "api_key")}
        return values | {"objectives": self.objectives and asdict(self.objectives)}


def add_command(commands: Any, embedded_model: str, version: str) -> None:
    """Adds `bench` to the subparsers `commands` of the command line.

    `embedded_model` is measured where none is named; reports tell maxlike's `version`.
    """
    bench = commands.add_parser("bench", help="measure throughput and latency",
                                description="Measure latency of a server under load, or the engine's throughput.")
    kinds = bench.add_subparsers(required=True, metavar="online|offline")
    online = kinds.add_parser("online", help="latency of a server under load", description=(
        "Send requests to a server as they would come from users, and report time to first token, time a token, "
        "throughput and errors, for one load or several. Without --base-url a server of its own is started for "
        "--model, and stopped at the end."))
    _add_online_flags(online)
    online.set_defaults(run=lambda args: _online(args, embedded_model, version))


    offline = kinds.add_parser("offline", help="throughput of the engine in this process", description=(
        "Give the engine all requests at once, and report requests and tokens a second. Programs are compiled "
        "beforehand."))
    _add_offline_flags(offline, embedded_model)
    offline.set_defaults(run=lambda args: _offline(args, version))


def _add_online_flags(parser: argparse.ArgumentParser) -> None:
    server = parser.add_argument_group("server")
    server.add_argument("--base-url", metavar="URL", help="an OpenAI-compatible server, as http://127.0.0.1:8000")
    server.add_argument("--model", metavar="NAME", help="with --base-url, the name that the server knows (default: the "
                        "first that it lists); else a folder or hub id to serve (default: the embedded model)")
    server.add_argument("--api-key", metavar="KEY", help="sent as a bearer token")
    server.add_argument("server_args", nargs="*", metavar="-- ARG", help="behind --, for the server of our own: "
                        "further arguments of `maxlike serve`, as in -- --max-num-seqs 64")
    load = parser.add_argument_group("load")
    load.add_argument("--request-rate", metavar="R,R,...", help="requests a second, one load after the other; inf, the "
                      "default: all at once")
    load.add_argument("--concurrency", metavar="N,N,...", help="so many requests under way at a time, "
                      "rather than a rate")
    load.add_argument("--burstiness", type=float, default=1.0, metavar="SHAPE", help="of arrivals at a rate: 1, the "
                      "default, is a Poisson process; less comes in bursts, more comes evenly (gamma distribution)")
    load.add_argument("--warmup", type=int, default=8, metavar="N", help="requests beforehand that do not count; "
                      "default 8")
    requests = parser.add_argument_group("requests")
    _add_workload_flags(requests)
    requests.add_argument("--chat", action="store_true", help="chat completions rather than completions")
    requests.add_argument("--text", action="store_true", help="send random prompts as text where they could be "
                          "token ids")
    requests.add_argument("--tokenizer", metavar="FOLDER|HUB_ID", help="with --base-url: the model's tokenizer, by "
                          "which random prompts are as long as asked; without it they are so many English words")
    requests.add_argument("--stop-at-eos", action="store_true", help="let the model end its outputs; otherwise "
                          "ignore_eos is sent, which vLLM, SGLang and maxlike know and OpenAI does not")
    requests.add_argument("--extra-body", metavar="JSON", default="{}", help="more fields of each request, as "
                          "'{\"temperature\": 0.7}'")
    requests.add_argument("--timeout", type=float, default=600.0, metavar="S", help="seconds a request may take; "
                          "default 600")
    report = parser.add_argument_group("report")
    report.add_argument("--goodput", metavar="TTFT,...", help="also count the requests that keep these objectives, in "
                        "ms: ttft:500,tpot:50,e2e:10000")
    report.add_argument("--json", metavar="FILE", help="write all figures as JSON; -: to stdout, the table to stderr")
    report.add_argument("--plot", metavar="FILE", type=Path, help="draw latency against load, as .png, .svg or .pdf")


def _add_offline_flags(parser: argparse.ArgumentParser, embedded_model: str) -> None:
    engine = parser.add_argument_group("engine")
    engine.add_argument("--model", metavar="FOLDER|HUB_ID", default=embedded_model, help="a Hugging Face checkpoint; "
                        "default: the small embedded model of Python source")
    add_engine_flags(engine)
    requests = parser.add_argument_group("requests")
    _add_workload_flags(requests)
    requests.add_argument("--rounds", type=int, default=1, metavar="N", help="measure so many times, with new prompts, "
                          "and report the medians; default 1")
    requests.add_argument("--warmup", type=int, default=8, metavar="N", help="requests beforehand that do not count; "
                          "default 8")
    report = parser.add_argument_group("report")
    report.add_argument("--json", metavar="FILE", help="write all figures as JSON; -: to stdout, the table to stderr")


def _add_workload_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--num-prompts", type=int, default=100, metavar="N", help="requests at each load, or in each "
                       "round; default 100")
    group.add_argument("--input-len", metavar="LEN", help=f"tokens of a prompt: N, uniform:LOW:HIGH, normal:MEAN:STD "
                       f"or lognormal:MEAN:STD; default {DEFAULT_INPUT_LEN}")
    group.add_argument("--output-len", metavar="LEN", help=f"tokens of an output, likewise; default "
                       f"{DEFAULT_OUTPUT_LEN}, or what the file of prompts says")
    group.add_argument("--prefix-len", type=int, default=0, metavar="N", help="further tokens with which all prompts "
                       "begin, to measure the prefix cache")
    group.add_argument("--num-prefixes", type=int, default=1, metavar="N", help="so many different such beginnings")
    group.add_argument("--prompts", type=Path, metavar="FILE", help="prompts from a file: JSON Lines with `prompt` or "
                       "`messages` and perhaps `output_len`, or ShareGPT's conversations")
    group.add_argument("--max-total-len", type=int, metavar="N", help="longest prompt and output together")
    group.add_argument("--seed", type=int, default=0, help="of prompts, lengths and arrivals")


def _workload_config(args: argparse.Namespace) -> WorkloadConfig:
    return WorkloadConfig(
        num_prompts=args.num_prompts, prefix_len=args.prefix_len, num_prefixes=args.num_prefixes,
        input_len=None if args.input_len is None else Lengths.parse(args.input_len),
        output_len=None if args.output_len is None else Lengths.parse(args.output_len),
        prompts=args.prompts, max_total_len=args.max_total_len, seed=args.seed)


def _online_config(args: argparse.Namespace) -> OnlineConfig:
    try:
        extra_body = json.loads(args.extra_body)
    except ValueError as error:
        raise ValueError(f"--extra-body takes a JSON object: {error}.") from error
    if not isinstance(extra_body, dict):
        raise ValueError(f"--extra-body takes a JSON object, as '{{\"temperature\": 0.7}}'; got {args.extra_body}.")
    return OnlineConfig(
        loads=tuple(parse_loads(args.request_rate, args.concurrency, args.burstiness)), base_url=args.base_url,
        model=args.model, api_key=args.api_key, chat=args.chat, text=args.text, tokenizer=args.tokenizer,
        ignore_eos=not args.stop_at_eos, extra_body=extra_body, timeout=args.timeout, warm_up=args.warmup,
        objectives=None if args.goodput is None else Objectives.parse(args.goodput),
        server_args=tuple(args.server_args))


def _online(args: argparse.Namespace, embedded_model: str, version: str) -> None:
    config, workload_config = _online_config(args), _workload_config(args)
    if args.plot is not None:
        check_plot(args.plot)
        check_writable(args.plot)
    if args.json not in (None, "-"):
        check_writable(args.json)
    out: TextIO = sys.stderr if args.json == "-" else sys.stdout
    checkpoint = resolve(config.model or embedded_model) if config.base_url is None else None
    workload = _workload(config, workload_config, checkpoint)
    with _orderly_at_sigterm(), _server(config, checkpoint) as base_url:
        model = config.model if config.base_url is not None else None
        model = model or asyncio.run(list_models(base_url, api_key=config.api_key))[0]
        print(f"{model} at {base_url}, {'chat ' * config.chat}completions: {workload}", file=out, flush=True)
        client = Client(base_url, model, endpoint="chat" if config.chat else "completions", api_key=config.api_key,
                        ignore_eos=config.ignore_eos, extra_body=config.extra_body, timeout=config.timeout)
        levels = asyncio.run(_measure(client, workload, config, out))
    if len(levels) > 1:
        print(f"\n{summary_text(levels)}", file=out)
    for said in _about_file(workload):
        print(said, file=out)
    if args.json is not None:
        shown = config.as_json() | {"served_model": model, "workload": _as_json(workload_config)}
        write_json(document("online", version, shown, repeated_prompts=workload.repeated,
                            left_out_prompts=workload.left_out,
                            levels=[figures.as_json() for figures in levels]), args.json)
    if not any(figures.completed for figures in levels):
        error = levels[0].errors[0]
        raise ValueError(f"No request succeeded. {error.kind}: {error.example}")
    if args.plot is not None:
        plot(levels, args.plot, f"{model}: {workload}")


def _offline(args: argparse.Namespace, version: str) -> None:
    if args.rounds < 1 or args.warmup < 0:
        raise ValueError(f"--rounds must be at least 1, and --warmup at least 0; got {args.rounds} and {args.warmup}.")
    workload_config = _workload_config(args)
    if args.json not in (None, "-"):
        check_writable(args.json)
    folder = resolve(args.model)
    tokenizer = Tokenizer.from_folder(folder) if has_tokenizer(folder) else None
    workload = Workload(workload_config, "ids", tokenizer=tokenizer,
                        vocabulary=random_ids(tokenizer, parse_config(folder)[0].vocab_size))
    engine_config, options = engine_options(args, args.model)
    engine_config = replace(engine_config, warm_up=True)  # or the first round would compile
    out: TextIO = sys.stderr if args.json == "-" else sys.stdout
    print(f"{args.model}: {workload}", file=out, flush=True)
    figures = run_offline(lambda: LLM(folder, engine_config, **options), workload, rounds=args.rounds,
                          warm_up=args.warmup, use_tqdm=True)
    for said in (str(figures), *_about_file(workload)):
        print(said, file=out)
    if args.json is not None:
        devices = [device.device_kind for device in options["devices"].devices.flat]
        config = {"model": args.model, "engine": asdict(engine_config), "tp": len(devices), "dtype": args.dtype,
                  "kv_cache_dtype": args.kv_cache_dtype, "attention": args.attention, "adapter": args.adapter,
                  "adapter_mode": args.adapter_mode, "warm_up": args.warmup,
                  "workload": _as_json(workload_config)}
        write_json(document("offline", version, config, jax=jax.__version__, devices=devices,
                            repeated_prompts=workload.repeated, left_out_prompts=workload.left_out,
                            **figures.as_json()), args.json)


def _workload(config: OnlineConfig, workload: WorkloadConfig, checkpoint: Path | None) -> Workload:
    """Random prompts are token ids where the vocabulary is known and nothing asks for text."""
    folder = checkpoint if config.tokenizer is None else resolve(config.tokenizer)
    # One that was named must be there; a checkpoint may be without.
    wanted = folder is not None and (config.tokenizer is not None or has_tokenizer(folder))
    tokenizer = Tokenizer.from_folder(folder) if folder is not None and wanted else None
    vocab_size = None if checkpoint is None else parse_config(checkpoint)[0].vocab_size
    known = tokenizer is not None or vocab_size is not None
    form: Literal["ids", "text"] = "ids" if known and not (config.chat or config.text) else "text"
    return Workload(workload, form, vocabulary=random_ids(tokenizer, vocab_size) if known else None,
                    tokenizer=tokenizer)


def _server(config: OnlineConfig, checkpoint: Path | None) -> AbstractContextManager[str]:
    if config.base_url is not None:
        return nullcontext(server_root(config.base_url))
    assert checkpoint is not None
    return own_server(serve_command(str(checkpoint), config.server_args))


async def _measure(client: Client, workload: Workload, config: OnlineConfig, out: TextIO) -> list[LevelFigures]:
    bars: list[tqdm] = []

    def on_load(load: Load) -> Any:
        bars.append(tqdm(total=workload.config.num_prompts, desc=load.label, unit="req", leave=False, disable=None))

        def on_end(record: RequestRecord) -> None:
            bars[-1].update()

        return on_end

    def on_figures(figures: LevelFigures) -> None:
        bars[-1].close()
        print(f"\n{level_text(figures)}", file=out, flush=True)

    async with client:
        return await run_online(client, workload, config.loads, warm_up=config.warm_up, objectives=config.objectives,
                                on_load=on_load, on_figures=on_figures)


def _about_file(workload: Workload) -> Sequence[str]:
    found = []
    if workload.left_out:
        found.append(f"{workload.left_out} prompts of the file were left out as too long.")
    if workload.repeated:
        found.append(f"The file has too few prompts: {workload.repeated} were sent again, and may have come from the "
                     "prefix cache.")
    return found


def _as_json(config: WorkloadConfig) -> dict[str, Any]:
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    return {name: str(value) if isinstance(value, Lengths | Path) else value for name, value in values.items()}


@contextmanager
def _orderly_at_sigterm() -> Iterator[None]:
    """A SIGTERM ends the process by an exception, so that a server of ours is stopped and does not stay behind."""
    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
