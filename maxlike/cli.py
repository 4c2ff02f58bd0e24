"""The command line: `maxlike generate`, `serve`, `train`, `export`, `plan`, `bench` and `info`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import flax
import jax

import maxlike
from maxlike.bench.command import add_command as add_bench_command
from maxlike.engine.config import EngineConfig
from maxlike.engine.flags import (
    add_adapter_flags,
    add_cache_dtype_flag,
    add_compilation_cache_flag,
    add_load_flags,
    devices_present,
    mesh_of_size,
    read_text,
)
from maxlike.engine.loading import has_tokenizer, load_engine
from maxlike.engine.request import check_prompt
from maxlike.engine.sampling_params import SamplingParams
from maxlike.kernels.paged_attention import choose_implementation, implementation_named
from maxlike.models.build import compute_dtype, default_kv_params
from maxlike.models.hub import resolve
from maxlike.models.registry import FAMILIES, parse_config
from maxlike.models.tokenizer import Tokenizer
from maxlike.plan.command import add_command as add_plan_command
from maxlike.serve.command import add_command as add_serve_command
from maxlike.train.command import add_commands as add_train_commands
from maxlike.train.command import start_processes
from maxlike.train.settings import nearest

EMBEDDED_MODEL = Path(__file__).parent / "embedded"
"""A small model of Python source, for a first try without a network."""
PROGRAMS = "~/.cache/maxlike/programs"
"""Where compiled programs are kept."""


class _Parser(argparse.ArgumentParser):
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:  # here, and not by the parser of all commands, since this one knows what there is
            hint = nearest(unknown[0].partition("=")[0], [flag for flag in self._option_string_actions])
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint if 'did you mean' in hint else ''}")
        return known, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"maxlike: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: the command's, or 2 for bad input, told in one line on stderr."""
    args = _parser().parse_args(argv)
    if hasattr(args, "compilation_cache"):
        _keep_programs(args.compilation_cache)
    if hasattr(args, "topology"):
        _prepare_for_plans()
    try:
        if hasattr(args, "coordinator"):
            start_processes(args, _initialize)
        code = args.run(args)
        sys.stdout.flush()  # at exit it would be too late to find that nobody reads
    except ValueError as error:
        print("maxlike:", "; ".join(line.strip() for line in str(error).splitlines() if line.strip()), file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our text has seen enough
        # What is still in the buffer goes nowhere, or Python would complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    return code or 0


def _initialize(coordinator: str | None, n: int | None, i: int | None) -> None:
    """`jax.distributed.initialize`; here, since it concerns the whole process."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # CPU devices of several processes have no other
    jax.distributed.initialize(coordinator, n, i)


def _prepare_for_plans() -> None:
    """Has the TPU's compiler work without a TPU, and JAX look for none; here, since it concerns the whole process."""
    # libtpu reads these when it is loaded. Without them it asks a metadata server what machine this is, complains at
    # length when none answers, and lets no second process load it.
    for name, value in (("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"), ("TPU_SKIP_MDS_QUERY", "1"),
                        ("TPU_WORKER_HOSTNAMES", "localhost"), ("TPU_ACCELERATOR_TYPE", "v6e-4")):
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")  # whatever JAX_PLATFORMS asks for: there may be no such device
    # A program kept by a host without the device could not be loaded again.
    jax.config.update("jax_enable_compilation_cache", False)


def _keep_programs(folder: str | None) -> None:
    """Has JAX keep what it compiles, in `folder`, for the next start; here, since it concerns the whole process."""
    if folder == "none":
        jax.config.update("jax_compilation_cache_dir", None)
    elif folder is not None or jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(folder or PROGRAMS))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # all programs, the quick ones too


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="maxlike", description="A sharded decoder-only transformer for JAX.")
    parser.add_argument("--version", action="version", version=f"maxlike {maxlike.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="continue a prompt", description="Continue a prompt: text to "
                                   "stdout as it comes, one line of figures to stderr.")
    _add_model_flags(generate)
    prompt = generate.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", help="the text to continue; without any prompt, stdin is read")
    prompt.add_argument("--prompt-file", type=Path, metavar="FILE", help="a UTF-8 file to continue")
    prompt.add_argument("--prompt-ids", metavar="1,2,3", help="token ids to continue; no tokenizer is needed")
    generate.add_argument("--chat", action="store_true", help="the prompt is a user's message: put it into the "
                          "checkpoint's chat template")
    generate.add_argument("--chat-template", type=Path, metavar="FILE", help="with --chat: a Jinja template in place "
                          "of the checkpoint's")
    generate.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default 128")
    generate.add_argument("--temperature", type=float, default=0.0, help="0, the default, takes the likeliest token")
    generate.add_argument("--top-k", type=int, default=0, metavar="K", help="draw among the K likeliest; 0: all")
    generate.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw among the likeliest that "
                          "together reach probability P")
    generate.add_argument("--min-p", type=float, default=0.0, metavar="P", help="draw among those at least P times as "
                          "likely as the likeliest")
    generate.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1: rather not what "
                          "stands in the text already")
    generate.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be "
                          "given several times")
    generate.add_argument("--seed", type=int, default=0, help="of the draws")
    add_cache_dtype_flag(generate)
    add_adapter_flags(generate)
    add_compilation_cache_flag(generate)
    generate.add_argument("--json", action="store_true", help="print one JSON object instead of text and figures")
    generate.set_defaults(run=_generate)

    info = commands.add_parser("info", help="show devices, mesh and backends")
    _add_model_flags(info)
    info.set_defaults(run=_info)

    add_serve_command(commands, str(EMBEDDED_MODEL))
    add_compilation_cache_flag(add_train_commands(commands, maxlike.__version__))
    add_plan_command(commands, str(EMBEDDED_MODEL))
    add_bench_command(commands, str(EMBEDDED_MODEL), maxlike.__version__)
    return parser


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="FOLDER|HUB_ID", default=str(EMBEDDED_MODEL),
                        help="a Hugging Face checkpoint; default: the small embedded model of Python source")
    add_load_flags(parser)


def _generate(args: argparse.Namespace) -> None:
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1; got {args.max_new_tokens}.")
    sampling = SamplingParams(
        temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, min_p=args.min_p, seed=args.seed,
        repetition_penalty=args.repetition_penalty, stop=args.stop, max_tokens=args.max_new_tokens)
    if args.chat and args.prompt_ids is not None:
        raise ValueError("--chat needs text to put into the template; --prompt-ids gives token ids.")
    if args.chat_template is not None and not args.chat:
        raise ValueError("--chat-template says how --chat puts the prompt: give both.")
    folder = resolve(args.model)
    config, _ = parse_config(folder)
    mesh = mesh_of_size(config, args.tp)
    # A checkpoint without a tokenizer is still good for ids.
    tokenizer = None if args.prompt_ids is not None and not has_tokenizer(folder) else Tokenizer.from_folder(folder)
    if args.stop and tokenizer is None:
        raise ValueError(f"--stop is about text, and {folder} has no tokenizer.json.")
    if args.chat_template is not None and tokenizer is not None:
        tokenizer = tokenizer.with_chat_template(read_text(args.chat_template, "chat template"))
    prompt = _prompt_ids(args, tokenizer)
    check_prompt(prompt, config.vocab_size, config.max_position_embeddings)  # before the weights, which take a while

    start = time.perf_counter()
    longest = min(len(prompt) + args.max_new_tokens, config.max_position_embeddings)
    engine = load_engine(folder, EngineConfig(max_num_seqs=1, max_model_len=longest), devices=mesh, dtype=args.dtype,
                         kv_cache_dtype=args.kv_cache_dtype,
                         implementation=args.attention and implementation_named(args.attention),
                         adapter=args.adapter, adapter_mode=args.adapter_mode)
    load_s = time.perf_counter() - start
    start = time.perf_counter()
    engine.compile_for(len(prompt), sampling)
    compile_s = time.perf_counter() - start
    (request,) = engine.add("generate", prompt, sampling)
    text = ""
    while engine.has_work():
        engine.step()
        piece = request.take_delta()
        new = piece.text if tokenizer is not None else "".join(f"{token} " for token in piece.token_ids)
        text += new
        if not args.json:
            print(new, end="", flush=True)
    token_ids, metrics = request.output_token_ids, request.metrics
    assert metrics.first_scheduled and metrics.first_token and metrics.finished
    prefill_s, decode_s = metrics.first_token - metrics.first_scheduled, metrics.finished - metrics.first_token
    prefill_tok_s, decode_tok_s = len(prompt) / prefill_s, (len(token_ids) - 1) / decode_s if len(token_ids) > 1 else 0
    if args.json:
        print(json.dumps({
            "prompt_token_ids": prompt, "token_ids": token_ids, "text": None if tokenizer is None else text,
            "load_s": round(load_s, 3), "compile_s": round(compile_s, 3),
            "prefill_tok_s": round(prefill_tok_s, 2), "decode_tok_s": round(decode_tok_s, 2)}))
        return
    print(flush=True)
    full = len(prompt) + len(token_ids) == config.max_position_embeddings
    print(f"load {load_s:.2f} s, compile {compile_s:.2f} s, prefill {prefill_tok_s:.1f} tok/s, "
          f"decode {decode_tok_s:.1f} tok/s ({len(prompt)} + {len(token_ids)} tokens, {_describe(mesh)}"
          f"{', stopped at the longest sequence that the model takes' if full else ''})", file=sys.stderr)


def _prompt_ids(args: argparse.Namespace, tokenizer: Tokenizer | None) -> list[int]:
    if args.prompt_ids is not None:
        try:
            return [int(i) for i in args.prompt_ids.split(",")]
        except ValueError as error:
            raise ValueError(f"--prompt-ids takes integers with commas between them, as 1,2,3; got "
                             f"{args.prompt_ids!r}.") from error
    assert tokenizer is not None
    if args.prompt is not None:
        text = args.prompt
    else:
        name = "stdin" if args.prompt_file is None else str(args.prompt_file)
        try:
            data = sys.stdin.buffer.read() if args.prompt_file is None else args.prompt_file.read_bytes()
            text = data.decode("utf-8")
        except OSError as error:
            raise ValueError(f"The prompt file {name} cannot be read: {error.strerror}.") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"The prompt in {name} is not UTF-8: {error}.") from error
    if not text:
        raise ValueError("The prompt is empty: give --prompt, --prompt-file, --prompt-ids, or text on stdin.")
    return tokenizer.encode_chat([{"role": "user", "content": text}]) if args.chat else tokenizer.encode(text)


def _describe(mesh: jax.sharding.Mesh) -> str:
    axes = " x ".join(f"{name}={size}" for name, size in mesh.shape.items())
    return f"{mesh.devices.size} {mesh.devices.flat[0].platform} device{'s' * (mesh.devices.size > 1)}, {axes}"


def _info(args: argparse.Namespace) -> None:
    present = devices_present()
    print(f"maxlike {maxlike.__version__}, jax {jax.__version__}, flax {flax.__version__}")
    print(f"platform    {jax.default_backend()}")
    print(f"devices     {', '.join(f'{d} ({d.device_kind})' for d in present)}")
    folder = resolve(args.model)
    config, _ = parse_config(folder)
    mesh = mesh_of_size(config, args.tp)
    print(f"model       {folder}: {config.model_type}, {len(config.layers)} layers, width {config.hidden_size}, "
          f"{config.num_attention_heads} heads, {config.num_key_value_heads} KV heads of {config.head_dim}, "
          f"vocabulary {config.vocab_size}, up to {config.max_position_embeddings} tokens")
    print(f"mesh        {_describe(mesh)}")
    dtype = compute_dtype(config, args.dtype)
    kv_params = default_kv_params(config, mesh, dtype)
    print(f"weights     {dtype}")
    print(f"KV cache    {kv_params.dtype}, pages of "
          f"{kv_params.page_size} tokens, {kv_params.bytes_per_page(mesh)} bytes a page and device")
    implementation, why = choose_implementation(mesh.abstract_mesh.abstract_device, dtype)
    if args.attention is not None:
        implementation, why = implementation_named(args.attention), "asked for"
    print(f"attention   {type(implementation).__name__} (paged{f': {why}' if why else ''}), "
          "blockwise in plain JAX (without a cache)")
    print(f"families    {', '.join(name for family in FAMILIES for name in family.model_types)}")
