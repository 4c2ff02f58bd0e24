"""Decode and prefill speed of a model shape, next to `transformers` and llama.cpp, where they are installed (the latter
as `llama-cpp-python` and `gguf`): `python scripts/bench_decode.py [--json]`.

Weights are random. Each engine runs in a process of its own, so that neither's memory or threads are in the
other's way, and they take turns round by round, so that a change in the machine's pace meets both: a ratio is the
median over rounds, of two figures measured one right after the other. Each round begins with the memory's
bandwidth, of which a decode step's share is given: it has to read every weight and the cache once.

`transformers` runs in eager mode (no `torch.compile`), with its KV cache. llama.cpp has a cache in float16, and weights
in bfloat16 and again in float16 beside our bfloat16, in float32 beside our float32. Threads are as many as cores.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import inspect
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from bench_llama_cpp import LlamaCpp
from bench_llama_cpp import is_installed as llama_cpp_is_installed
from bench_timing import WARM_UP_STEPS, Timing, timed

_LLAMA_3: dict[str, Any] = dict(
    model_type="llama", vocab_size=128256, num_attention_heads=32, num_key_value_heads=8, rms_norm_eps=1e-5,
    max_position_embeddings=131072, rope_theta=500000.0)
_LLAMA_3_ROPE = dict(rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0,
                     original_max_position_embeddings=8192)
PRESETS: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": _LLAMA_3 | dict(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, head_dim=64, tie_word_embeddings=True,
        rope_scaling=_LLAMA_3_ROPE | dict(factor=32.0)),
    "llama-3.1-8b": _LLAMA_3 | dict(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, head_dim=128, tie_word_embeddings=False,
        rope_scaling=_LLAMA_3_ROPE | dict(factor=8.0)),
    "tiny": dict(
        model_type="llama", vocab_size=512, num_attention_heads=8, num_key_value_heads=4, head_dim=16,
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, max_position_embeddings=2048,
        tie_word_embeddings=True),
}
"""Shapes by name, as fields of a Hugging Face `config.json`."""

BANDWIDTH_BYTES = 1 << 30
BANDWIDTH_READS = 3  # a round


class Maxlike:
    """This package's engine, as a worker process runs it."""

    def __init__(self, task: Mapping[str, Any]):
        if task["tp"] > 1:  # on CPU, so many devices are made; elsewhere it changes nothing
            flag = f"--xla_force_host_platform_device_count={task['tp']}"
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
        import jax

        from maxlike.engine.config import EngineConfig
        from maxlike.engine.engine import Engine
        from maxlike.models.build import build_model
        from maxlike.models.registry import family_of

        if task["tp"] > len(jax.devices()):
            raise ValueError(f"--tp {task['tp']} was asked for; there are {len(jax.devices())} devices "
                             f"({jax.default_backend()}).")
        self.task, self.n_requests = task, 0
        config = family_of(task["config"]).parse(task["config"])
        model = build_model(config, devices=jax.devices()[:task["tp"]], dtype=task["dtype"],
                            use_subgraphs=task["use_subgraphs"])
        self.kv, self.device = model.kv_params, jax.devices()[0]

        n_prompt, n_sequences = task["prompt_tokens"], max(task["batch"])
        budget = max(n_prompt, 2 * n_sequences)
        # The first sequences already decode while the last are being prefilled with what that leaves of the budget.
        waiting = -(-n_sequences * task["context"] // (budget - n_sequences))
        self.new_tokens = waiting + WARM_UP_STEPS + task["steps"] + 3
        longest = max(n_prompt + 1, task["context"] + self.new_tokens)
        self.engine = Engine(model, config, EngineConfig(
            max_num_seqs=n_sequences, max_num_batched_tokens=budget, max_model_len=longest,
            num_pages=n_sequences * self.kv.pages_for(longest), enable_prefix_caching=False))
        start = time.perf_counter()
        runner = self.engine.runner
        for n in {n_prompt, *task["batch"]}:
            runner.compile("forward", runner.token_bucket(n))
        for n in {1, *task["batch"]}:
            runner.compile("greedy", runner.row_bucket(n))
        self.compile_s = time.perf_counter() - start
        self.weights, self.streamed = _bytes({".".join(names): param.get_value() for names, param in _named(model)},
                                             tied=config.tie_word_embeddings)
        self.host_memory: np.ndarray | None = None

    def about(self) -> dict[str, Any]:
        """What there is to know before anything is timed."""
        import jax

        return {"version": jax.__version__, "platform": self.device.platform, "device": self.device.device_kind,
                "compile_s": self.compile_s, "weight_bytes": self.weights, "streamed_bytes": self.streamed,
                "kv_bytes_per_token": self.kv.n_layers * self.kv.n_kv_heads * 2 * self.kv.head_dim
                * np.dtype(self.kv.dtype).itemsize}

    def add(self, n: int, prompt_tokens: int, max_tokens: int) -> None:
        """`n` requests of random tokens."""
        from maxlike.engine.sampling_params import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        rng = np.random.default_rng(self.n_requests)
        for _ in range(n):
            self.n_requests += 1
            prompt = rng.integers(self.task["config"]["vocab_size"], size=prompt_tokens).tolist()
            self.engine.add(str(self.n_requests), prompt, params)

    def prefill(self) -> Timing:
        """One prompt into an empty cache, in one step, and its first token."""
        self.add(1, self.task["prompt_tokens"], 1)

        def run() -> None:
            while self.engine.has_work():
                self.engine.step()

        return timed(run)

    def decode(self, batch: int) -> Timing:
        """`steps` steps of `batch` sequences, each behind `context` tokens."""
        engine, first = self.engine, self.n_requests
        self.add(batch, self.task["context"], self.new_tokens)

        def run(n_steps: int) -> None:
            for _ in range(n_steps):
                engine.step()
            engine._pending.tokens.block_until_ready()  # type: ignore[union-attr]

        while engine.scheduler.decoding.sum() < batch:
            engine.step()
        run(WARM_UP_STEPS)
        timing = timed(lambda: run(self.task["steps"]))
        assert engine.scheduler.decoding.sum() == batch, "a sequence has ended"
        for i in range(first, self.n_requests):
            engine.cancel(str(i + 1))
        while engine.has_work():
            engine.step()
        return timing

    def bandwidth(self) -> float:
        """Bytes a second, over all devices: read by all cores on CPU, elsewhere copied on the devices."""
        import jax
        import jax.numpy as jnp

        if self.device.platform != "cpu":
            memory = [jax.device_put(jnp.zeros(BANDWIDTH_BYTES, jnp.uint8), d)
                      for d in jax.devices()[:self.task["tp"]]]
            copy = jax.jit(lambda x: x + 1)

            def run() -> None:
                jax.block_until_ready([copy(x) for x in memory])

            run()
            moved = 2 * BANDWIDTH_BYTES * len(memory)
            return statistics.median(moved / timed(run)[0] for _ in range(BANDWIDTH_READS))
        if self.host_memory is None:
            self.host_memory = np.ones(BANDWIDTH_BYTES // 8, np.uint64)
        parts = np.array_split(self.host_memory, self.task["threads"])
        with ThreadPoolExecutor(len(parts)) as pool:
            return statistics.median(BANDWIDTH_BYTES / timed(lambda: list(pool.map(np.bitwise_or.reduce, parts)))[0]
                                     for _ in range(BANDWIDTH_READS))


class Transformers:
    """Hugging Face transformers on torch's CPU backend, as a worker process runs it."""

    def __init__(self, task: Mapping[str, Any]):
        os.environ["HF_HUB_OFFLINE"] = "1"
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

        torch.set_num_threads(task["threads"])
        torch.manual_seed(0)
        self.task, self.torch, self.make_cache = task, torch, DynamicCache
        config = AutoConfig.for_model(**task["config"])
        # On CPU, sdpa is what transformers itself chooses; written out so that it is known.
        self.model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, task["dtype"]),
                                                      attn_implementation="sdpa").eval()
        self.weights, self.streamed = _bytes(dict(self.model.named_parameters()),
                                             tied=task["config"].get("tie_word_embeddings", False))
        self.config = self.model.config
        self.caches = {s: self._filled_cache(s) for s in task["batch"]}

    def about(self) -> dict[str, Any]:
        """What there is to know before anything is timed."""
        import transformers

        heads, width = self.config.num_key_value_heads, self.config.head_dim
        return {"version": f"{transformers.__version__}, torch {self.torch.__version__}", "platform": "cpu",
                "weight_bytes": self.weights, "streamed_bytes": self.streamed,
                "kv_bytes_per_token": self.config.num_hidden_layers * heads * 2 * width
                * self.model.dtype.itemsize}

    def _filled_cache(self, batch: int) -> Any:
        cache = self.make_cache(config=self.config)
        if self.task["context"]:
            prompt = self.torch.randint(self.config.vocab_size, (batch, self.task["context"]))
            self._step(prompt, cache)
        return cache

    def _step(self, tokens: Any, cache: Any) -> Any:
        with self.torch.inference_mode():
            # The argument has another name from transformers 5.24 on.
            name = "cache" if "cache" in inspect.signature(self.model.forward).parameters else "past_key_values"
            logits = self.model(tokens, **{name: cache}, use_cache=True, logits_to_keep=1).logits
            return logits[:, -1].argmax(-1, keepdim=True)

    def prefill(self) -> Timing:
        """One prompt into an empty cache, in one step."""
        generator = self.torch.Generator().manual_seed(0)
        prompt = self.torch.randint(self.config.vocab_size, (1, self.task["prompt_tokens"]), generator=generator)
        return timed(lambda: self._step(prompt, self.make_cache(config=self.config)))

    def decode(self, batch: int) -> Timing:
        """`steps` steps of `batch` sequences, from a cache of `context` tokens."""
        cache, tokens = self.caches[batch], self.torch.arange(batch)[:, None]

        def run(n_steps: int) -> None:
            nonlocal tokens
            for _ in range(n_steps):
                tokens = self._step(tokens, cache)

        run(WARM_UP_STEPS)
        timing = timed(lambda: run(self.task["steps"]))
        cache.crop(-WARM_UP_STEPS - self.task["steps"])
        return timing


ENGINES: dict[str, Callable[[Mapping[str, Any]], Any]] = {"maxlike": Maxlike, "transformers": Transformers} | {
    f"llama.cpp {weights}": functools.partial(LlamaCpp, weight_type=weights) for weights in ("BF16", "F16", "F32")}
PEERS: dict[str, dict[str, tuple[str, ...]]] = {
    "transformers": {"bfloat16": ("transformers",), "float32": ("transformers",)},
    "llama.cpp": {"bfloat16": ("llama.cpp BF16", "llama.cpp F16"), "float32": ("llama.cpp F32",)},
}
"""What `--compare` may name, and the engines that it means beside a dtype of ours."""


def _named(model: Any) -> list[tuple[list[str], Any]]:
    from maxlike.nn.transformer.segments import named_parameters

    return [(names, param) for names, _, param in named_parameters(model)]


def _bytes(parameters: Mapping[str, Any], *, tied: bool) -> tuple[int, int]:
    """Bytes of all parameters, and of those that a decode step reads whole: of an untied embedding only some rows."""
    size = {name: int(np.prod(value.shape)) * value.dtype.itemsize for name, value in parameters.items()}
    embedding = sum(n for name, n in size.items() if name.startswith(("embedding.", "model.embed_tokens.")))
    total = sum(size.values())
    return total, total - (0 if tied else embedding)


def work(engine: str) -> None:
    """A worker: reads a task and then commands from stdin, a JSON value a line, and answers each with one."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not to mix with the answers
    try:
        worker = ENGINES[engine](json.loads(sys.stdin.readline()))
    except ValueError as error:
        print(json.dumps({"error": str(error)}), file=answers, flush=True)
        return
    print(json.dumps(worker.about()), file=answers, flush=True)
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        print(json.dumps(getattr(worker, command)(*arguments)), file=answers, flush=True)


class Worker:
    """A worker process, as the parent sees it."""

    def __init__(self, engine: str, task: Mapping[str, Any]):
        self.engine = engine
        self.process = subprocess.Popen([sys.executable, __file__, "--worker", engine], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True)
        try:
            self.about = self._ask(task)
            if "error" in self.about:
                raise ValueError(self.about["error"])
        except (ChildProcessError, ValueError):
            self.close()
            raise

    def _ask(self, request: Any) -> Any:
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None and stdout is not None
        print(json.dumps(request), file=stdin, flush=True)
        answer = stdout.readline()
        if not answer:
            raise ChildProcessError(f"{self.engine} ended with code {self.process.wait()}; stderr says why.")
        return json.loads(answer)

    def __call__(self, command: str, *arguments: Any) -> Any:
        """The worker's answer to a command: the name of one of its methods, and arguments."""
        return self._ask([command, *arguments])

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.communicate()


def measure(task: Mapping[str, Any], peers: Sequence[str], rounds: int, *, asked_for: bool) -> dict[str, Any]:
    """All figures of one dtype.

    Args:
        task: what workers are told; see `main`.
        peers: of `PEERS`.
        rounds: how many are timed.
        asked_for: whether the peers were; others are left out where maxlike runs on an accelerator
            and not beside them, or where they refuse the task.

    Raises:
        ValueError: maxlike refuses the task, or a peer does that was asked for or cannot be had beside maxlike.
        ChildProcessError: an engine failed.
    """
    def note(what: str) -> None:
        print(f"{task['dtype']}: {what}", file=sys.stderr, flush=True)

    cases = {"prefill": ("prefill",), **{f"decode {s}": ("decode", s) for s in task["batch"]}}
    workers: dict[str, Worker] = {}
    try:
        note("maxlike is getting ready")
        workers["maxlike"] = Worker("maxlike", task)
        platform = workers["maxlike"].about["platform"]
        if peers and asked_for and platform != "cpu":
            raise ValueError(f"--compare {','.join(peers)} measures the CPU, but maxlike runs on {platform} here. Set "
                             "JAX_PLATFORMS=cpu to have both there.")
        for engine in (engine for peer in peers if platform == "cpu" for engine in PEERS[peer][task["dtype"]]):
            note(f"{engine} is getting ready")
            try:
                workers[engine] = Worker(engine, task)
            except ValueError as error:
                if asked_for:
                    raise
                note(f"{engine} is left out: {error}")
        bandwidths: list[float] = []
        timings: dict[str, dict[str, list[Timing]]] = {case: {engine: [] for engine in workers} for case in cases}
        for r in range(-1, rounds):  # the first is a warm-up
            bandwidth = workers["maxlike"]("bandwidth")
            if r >= 0:
                bandwidths.append(bandwidth)
            note(f"{f'round {r + 1} of {rounds}' if r >= 0 else 'warm-up'}: {bandwidth / 1e9:.1f} GB/s")
            for case, command in cases.items():
                # Whoever goes first in one round goes last in the next.
                for engine in sorted(workers, reverse=bool(r % 2)):
                    timing = workers[engine](*command)
                    note(f"  {case}, {engine}: {timing[0]:.3f} s, {timing[1]:.3f} s of processor time")
                    if r >= 0:
                        timings[case][engine].append(timing)
    finally:
        for worker in workers.values():
            worker.close()

    bandwidth = statistics.median(bandwidths)
    results = []
    for case, (phase, *batches) in cases.items():
        batch = batches[0] if batches else 1
        tokens = task["prompt_tokens"] if phase == "prefill" else batch * task["steps"]
        result: dict[str, Any] = {"phase": phase, "batch": batch}
        for engine, pairs in timings[case].items():
            seconds = [wall for wall, _ in pairs]
            result[engine] = {"tok_s": tokens / statistics.median(seconds),
                              "tok_s_rounds": [tokens / s for s in seconds],
                              "cpu_s_per_token": statistics.median(cpu for _, cpu in pairs) / tokens}
            if phase == "decode":
                about = workers[engine].about
                context = task["context"] + WARM_UP_STEPS + task["steps"] / 2
                step_bytes = about["streamed_bytes"] + batch * context * about["kv_bytes_per_token"]
                result[engine] |= {
                    "step_ms": statistics.median(seconds) / task["steps"] * 1e3, "step_bytes": round(step_bytes),
                    "bandwidth_share": step_bytes * task["steps"] / statistics.median(seconds) / bandwidth}
            if engine != "maxlike":
                both = zip(timings[case]["maxlike"], pairs, strict=True)
                ratios = [theirs / ours for (ours, _), (theirs, _) in both]
                result[engine] |= {"ratio": statistics.median(ratios), "ratio_rounds": ratios}
        results.append(result)
    return {"dtype": task["dtype"], "bandwidth_gb_s": bandwidth / 1e9,
            "bandwidth_gb_s_rounds": [b / 1e9 for b in bandwidths],
            "engines": {engine: worker.about for engine, worker in workers.items()}, "results": results}


def print_table(report: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """One dtype's figures, for a reader."""
    about = run["engines"]["maxlike"]
    print(f"{report['shape']}, {run['dtype']}: {about['weight_bytes'] / 1e9:.2f} GB of weights, "
          f"{run['bandwidth_gb_s']:.1f} GB/s of bandwidth, {report['threads']} cores, {report['tp']} of "
          f"{about['device']} ({about['platform']})")
    for name, engine in run["engines"].items():
        print(f"{name:<16}{engine['version']}")
    print(f"{'':<40}{'tok/s':>10}{'of bandwidth':>14}{'maxlike to it':>16}")
    for result in run["results"]:
        line = (f"prefill, {report['prompt_tokens']} tokens" if result["phase"] == "prefill"
                else f"decode, batch {result['batch']}")
        for name in run["engines"]:
            figures = result[name]
            share = f"{figures['bandwidth_share']:.0%}" if "bandwidth_share" in figures else ""
            ratio = f"{figures['ratio']:.3f}" if "ratio" in figures else ""
            print(f"{line:<24}{name:<16}{figures['tok_s']:>10.2f}{share:>14}{ratio:>16}".rstrip())
            line = ""
    print(flush=True)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"bench_decode: {message} (see --help)\n")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1; got {text!r}")
    return int(text)


def _counts(text: str) -> list[int]:
    return [_count(part) for part in text.split(",")]


def _dtypes(text: str) -> list[str]:
    if unknown := [part for part in text.split(",") if part not in ("bfloat16", "float32")]:
        raise argparse.ArgumentTypeError(f"expected bfloat16, float32, or both with a comma; got {unknown[0]!r}")
    return text.split(",")


def _peers(text: str) -> list[str]:
    if text == "none":
        return []
    if unknown := [part for part in text.split(",") if part not in PEERS]:
        raise argparse.ArgumentTypeError(f"expected {', '.join(PEERS)}, both with a comma, or none; got {unknown[0]!r}")
    return text.split(",")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(description="Decode and prefill speed of a model shape, with random weights.")
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--shape", choices=PRESETS, default="llama-3.2-1b", help="default: llama-3.2-1b")
    shape.add_argument("--config", type=Path, metavar="FILE", help="a shape of your own: a Hugging Face config.json")
    parser.add_argument("--dtype", type=_dtypes, default=["bfloat16", "float32"], metavar="DTYPES",
                        help="bfloat16, float32, or both with a comma between them, the default")
    parser.add_argument("--batch", type=_counts, default=[1, 8], metavar="N,N", help="sequences decoded; default 1,8")
    parser.add_argument("--prompt-tokens", type=_count, default=512, metavar="N", help="of the prefill; default 512")
    parser.add_argument("--context", type=int, default=128, metavar="N",
                        help="tokens in the cache where decoding starts; default 128")
    parser.add_argument("--steps", type=_count, default=16, metavar="N", help="timed, of a round's decode; default 16")
    parser.add_argument("--rounds", type=_count, default=5, metavar="N", help="default 5")
    parser.add_argument("--tp", type=_count, default=1, metavar="N", help="tensor-parallel size; on CPU, so many "
                        "virtual devices are made; default 1")
    parser.add_argument("--use-subgraphs", action=argparse.BooleanOptionalAction, default=None,
                        help="scan layers or call each; default: as the model builder chooses")
    parser.add_argument("--compare", type=_peers, metavar="PEERS", help="transformers, llama.cpp, both with a "
                        "comma, or none; default: those installed that take the shape, if maxlike runs on the CPU")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--worker", choices=ENGINES, help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints; returns the exit code: 0, 1 when an engine failed, 2 for bad input."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.worker:
        work(args.worker)
        return 0
    if args.context < 0:
        parser.error(f"--context must be 0 or above; got {args.context}")
    if args.config is None:
        shape, config = args.shape, PRESETS[args.shape]
    else:
        try:
            shape, config = str(args.config), json.loads(args.config.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            parser.error(f"--config {args.config} cannot be read: {error}")
    missing = {}
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        missing["transformers"] = "needs torch and transformers, which are not both installed here"
    if not llama_cpp_is_installed():
        missing["llama.cpp"] = "needs llama-cpp-python and gguf, which are not both installed here"
    if args.compare is None:
        peers = [peer for peer in PEERS if peer not in missing]
    else:
        peers = args.compare
        for peer in missing.keys() & set(peers):
            parser.error(f"--compare {peer} {missing[peer]}")

    task = {"config": config, "batch": args.batch, "prompt_tokens": args.prompt_tokens, "context": args.context,
            "steps": args.steps, "tp": args.tp, "use_subgraphs": args.use_subgraphs,
            "threads": len(os.sched_getaffinity(0))}
    report = {"shape": shape, **{name: value for name, value in task.items() if name != "config"}, "runs": []}
    try:
        for dtype in args.dtype:
            report["runs"].append(measure(task | {"dtype": dtype}, peers, args.rounds,
                                          asked_for=args.compare is not None))
            if not args.json:
                print_table(report, report["runs"][-1])
    except ValueError as error:
        parser.error(str(error))
    except ChildProcessError as error:
        print(f"bench_decode: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
