"""The command line as a user has it: prompts in, text or JSON out, and mistakes told in one line.

Most commands run in this process (a start costs seconds); what only a process of its own shows has tests at the end.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

import maxlike.cli
from maxlike.engine.engine import Engine
from maxlike.kernels.paged_attention import Xla
from tests.compilation_cache import compiling_once
from tests.models.checkpoints import config_of, tensors_of, write

KEYS = ["prompt_token_ids", "token_ids", "text", "load_s", "compile_s", "prefill_tok_s", "decode_tok_s"]
PROMPT = "def fibonacci(n): größe"
IDS = "5,6,7,8,9"  # of the same bucket as the prompt: one program serves both
TEMPLATE = ("{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        assert (self.code, self.err) == (0, ""), self.err
        assert self.out.endswith("}\n") and self.out.count("\n") == 1
        return json.loads(self.out)

    def assert_refused(self, *says: str) -> None:
        """One line on stderr that says all of this, nothing on stdout, exit code 2."""
        assert self.code == 2 and self.out == "", (self.code, self.out)
        assert self.err.startswith("maxlike: ") and self.err.endswith("\n") and self.err.count("\n") == 1, self.err
        assert "Traceback" not in self.err
        for words in says:
            assert words in self.err


Run = Callable[..., Result]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """`maxlike ARGV` in this process, its output taken where the operating system would."""
    def run(*argv: Any) -> Result:
        capfd.readouterr()
        try:
            code = maxlike.cli.main([str(arg) for arg in argv])
        except SystemExit as stopped:  # argparse
            code = stopped.code
        return Result(code, *capfd.readouterr())

    return run


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module", autouse=True)
def cached(cache: Path) -> Iterator[None]:
    """Each command compiles its own steps, and most here are the same."""
    with compiling_once(cache):
        yield


def train_tokenizer() -> tokenizers.Tokenizer:
    """Byte-level BPE with a bos token in front, as Llama 3 has it."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|user|>", "<|assistant|>"]
    tokenizer.train_from_iterator([PROMPT] * 9, trainers.BpeTrainer(
        vocab_size=280, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> tokenizers.Tokenizer:
    return train_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: tokenizers.Tokenizer) -> Path:
    """A Llama of one layer with a tokenizer; nothing ends its texts but the 64 tokens that it takes."""
    folder = tmp_path_factory.mktemp("model")
    write(folder, config_of("llama", num_hidden_layers=1, vocab_size=tokenizer.get_vocab_size() + 3,
                            max_position_embeddings=64, bos_token_id=None, eos_token_id=None))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}))
    return folder


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """The same model, to change its files."""
    return shutil.copytree(folder, tmp_path / "copy")


def generate(folder: Path, *more: Any) -> tuple[Any, ...]:
    return "generate", "--model", folder, "--tp", 1, "--max-new-tokens", 20, *more


# -- prompts in, text out


def test_json(run: Run, folder: Path, tokenizer: tokenizers.Tokenizer) -> None:
    found = run(*generate(folder, "--prompt", PROMPT, "--json")).json
    assert list(found) == KEYS
    assert found["prompt_token_ids"] == tokenizer.encode(PROMPT).ids and found["prompt_token_ids"][0] == 0
    assert len(found["token_ids"]) == 20 and {*map(type, found["token_ids"])} == {int}
    assert found["text"] == tokenizer.decode(found["token_ids"])
    assert all(isinstance(found[key], float) and found[key] > 0 for key in KEYS[3:])


def test_text_and_a_line_of_figures(run: Run, folder: Path) -> None:
    shown = run(*generate(folder, "--prompt", PROMPT))
    assert shown.code == 0
    assert shown.out == run(*generate(folder, "--prompt", PROMPT, "--json")).json["text"] + "\n"
    number = r"\d+\.\d+"
    assert re.fullmatch(rf"load {number} s, compile {number} s, prefill {number} tok/s, decode {number} tok/s \(.*\)\n",
                        shown.err)


def test_text_streams(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token's text is there before the next is asked for."""
    out, lengths = io.StringIO(), []
    real = Engine.step

    def watched(engine: Engine) -> Any:
        lengths.append(len(out.getvalue()))
        return real(engine)

    monkeypatch.setattr(Engine, "step", watched)
    monkeypatch.setattr(sys, "stdout", out)
    assert maxlike.cli.main([str(arg) for arg in generate(folder, "--prompt", PROMPT)]) == 0
    assert len(lengths) == 21 and len(set(lengths)) > 8  # the first step is not looked at before the second is sent


def test_prompts_from_everywhere(run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(*generate(folder, "--prompt", PROMPT, "--json")).json
    (tmp_path / "prompt.txt").write_bytes(PROMPT.encode())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode()), encoding="ascii"))
    for source in (["--prompt-file", tmp_path / "prompt.txt"], [],
                   ["--prompt-ids", ",".join(map(str, expected["prompt_token_ids"]))]):
        found = run(*generate(folder, *source, "--json")).json
        assert [found[key] for key in KEYS[:3]] == [expected[key] for key in KEYS[:3]], source


def test_chat(run: Run, folder: Path, copy: Path, tokenizer: tokenizers.Tokenizer) -> None:
    found = run(*generate(folder, "--prompt", "größe(n)", "--chat", "--json")).json
    expected = tokenizer.encode("<s><|user|>größe(n)</s><|assistant|>", add_special_tokens=False).ids
    assert found["prompt_token_ids"] == expected and expected[:2] == [0, 2]
    (copy / "tokenizer_config.json").write_text("{}")
    run(*generate(copy, "--prompt", "n", "--chat")).assert_refused("chat template", str(copy))


def test_dtype(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engines: list[Engine] = []
    real = maxlike.cli.load_engine
    monkeypatch.setattr(maxlike.cli, "load_engine", lambda *args, **options: engines.append(real(*args, **options))
                        or engines[-1])
    for dtype in ("bfloat16", "float32"):
        assert run(*generate(folder, "--prompt-ids", "5", "--dtype", dtype)).code == 0
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(engines[-1].model)} == {dtype}


def test_greedy_tokens_are_those_of_transformers(run: Run, folder: Path, copy: Path) -> None:
    """And both stop at the first of the tokens that `generation_config.json` lists."""
    for name in ("torch", "transformers"):
        pytest.importorskip(name)
    import torch

    from tests.models import oracle

    def theirs(folder: Path, prompt: list[int]) -> list[int]:
        tokens = torch.tensor([prompt])
        with torch.no_grad():
            out = oracle.load(folder).generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=20,
                                               do_sample=False, pad_token_id=0)
        return out[0, len(prompt):].tolist()

    ours = run(*generate(folder, "--prompt", PROMPT, "--json")).json
    free = ours["token_ids"]
    assert free == theirs(folder, ours["prompt_token_ids"])
    last = next(i for i in range(3, 20) if free[i] not in free[:i])
    unused = next(i for i in range(200) if i not in free)
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [unused, free[last]]}))
    ours = run(*generate(copy, "--prompt", PROMPT, "--json")).json
    assert ours["token_ids"] == free[:last + 1] == theirs(copy, ours["prompt_token_ids"])


def test_stops_at_any_of_the_tokens_that_end_a_text(run: Run, folder: Path, copy: Path) -> None:
    ids = ("--prompt-ids", IDS, "--json")
    free = run(*generate(folder, *ids)).json["token_ids"]
    ends = next(i for i in range(2, 20) if free[i] not in free[:i])
    unused = next(i for i in range(200) if i not in free)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"eos_token_id": free[ends]}))
    assert run(*generate(copy, *ids)).json["token_ids"] == free[:ends + 1]
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [unused, free[1]]}))  # this one counts
    assert run(*generate(copy, *ids)).json["token_ids"] == free[:free.index(free[1]) + 1]
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [unused]}))
    assert run(*generate(copy, *ids)).json["token_ids"] == free


def test_as_many_tokens_as_asked_for_and_as_fit(run: Run, folder: Path) -> None:
    found = run(*generate(folder, "--prompt-ids", IDS, "--max-new-tokens", 1, "--json")).json
    assert len(found["token_ids"]) == 1 and found["decode_tok_s"] == 0
    longest = ",".join(["5"] * 60)
    shown = run(*generate(folder, "--prompt-ids", longest))
    assert shown.code == 0 and "60 + 4 tokens" in shown.err and "longest sequence" in shown.err
    run(*generate(folder, "--prompt-ids", longest + ",5,5,5,5")).assert_refused("64 tokens", "63 or fewer")


def test_draws_are_reproducible(run: Run, folder: Path) -> None:
    def tokens(*flags: Any) -> list[int]:
        return run(*generate(folder, "--prompt-ids", IDS, "--json", *flags)).json["token_ids"]

    greedy, one, two = tokens(), tokens("--temperature", 1, "--seed", 1), tokens("--temperature", 1, "--seed", 2)
    assert len({tuple(greedy), tuple(one), tuple(two)}) == 3
    assert tokens("--temperature", "1.0", "--seed", 1, "--top-k", 0, "--top-p", 1) == one
    assert tokens("--seed", 1) == greedy
    assert tokens("--temperature", 1, "--top-k", 1) == tokens("--temperature", 1, "--top-p", 1e-6) == greedy
    assert tokens("--temperature", 1, "--seed", 1, "--top-k", 2) != one
    assert tokens("--temperature", 1, "--seed", 1, "--top-p", 0.3) != one


@pytest.mark.parametrize("tp", [pytest.param(["--tp", 2], marks=pytest.mark.slow),
                                pytest.param(["--tp", 8], marks=pytest.mark.slow), []], ids=str)
def test_devices_change_nothing(tp: list[Any], run: Run, folder: Path) -> None:
    """Without --tp it is all eight, over which the vocabulary is padded."""
    ids = ("--prompt-ids", IDS, "--max-new-tokens", 20, "--json")
    for flags in ([], ["--temperature", 1, "--seed", 3]):
        expected = run("generate", "--model", folder, "--tp", 1, *ids, *flags).json["token_ids"]
        assert run("generate", "--model", folder, *tp, *ids, *flags).json["token_ids"] == expected
    shown = run("generate", "--model", folder, *tp, *ids[:4])
    assert f"{8 if not tp else tp[1]} cpu devices" in shown.err


def test_without_a_tokenizer_there_are_ids(run: Run, folder: Path, copy: Path) -> None:
    expected = run(*generate(folder, "--prompt-ids", IDS, "--json")).json
    (copy / "tokenizer.json").unlink()
    found = run(*generate(copy, "--prompt-ids", IDS.replace(",", " , "), "--json")).json
    assert found["text"] is None and found["token_ids"] == expected["token_ids"]
    shown = run(*generate(copy, "--prompt-ids", IDS))
    assert [int(token) for token in shown.out.split()] == expected["token_ids"]
    run(*generate(copy, "--prompt", PROMPT)).assert_refused("tokenizer.json", str(copy))


def test_ids_without_a_token_have_no_text(run: Run, folder: Path, copy: Path, tokenizer: tokenizers.Tokenizer) -> None:
    """Models often have more logits than their tokenizer has tokens."""
    config = json.loads((copy / "config.json").read_text())
    tensors = tensors_of(config)
    beyond = config["vocab_size"] - 1
    tensors["lm_head.weight"][:] = 0  # every logit is 0: each draw is any id
    write(copy, config, tensors)
    found = run(*generate(copy, "--prompt-ids", IDS, "--temperature", 1, "--max-new-tokens", 59, "--json")).json
    known = [token for token in found["token_ids"] if token < tokenizer.get_vocab_size()]
    assert len(known) < len(found["token_ids"]) == 59, f"no draw hit one of the last ids, up to {beyond}"
    assert found["text"] == tokenizer.decode(known)


def test_kv_cache_dtype(run: Run, folder: Path, copy: Path) -> None:
    plain = run(*generate(folder, "--prompt-ids", IDS, "--json")).json["token_ids"]
    for dtype in ("float32", "float8_e4m3fn"):
        shown = run(*generate(folder, "--prompt-ids", IDS, "--json", "--kv-cache-dtype", dtype))
        assert shown.code == 0 and len(shown.json["token_ids"]) == 20
        assert (shown.json["token_ids"] == plain) == (dtype == "float32"), "float8 changed nothing"
    refused = run(*generate(folder, "--prompt-ids", IDS, "--kv-cache-dtype", "int8"))
    assert refused.code == 2 and "calibrate" in refused.err and refused.err.count("\n") == 1
    refused = run(*generate(folder, "--prompt-ids", IDS, "--kv-cache-dtype", "int4"))
    assert refused.code == 2 and "float8_e4m3fn" in refused.err
    config = json.loads((copy / "config.json").read_text())
    scales = {f"model.layers.0.self_attn.{x}_scale": np.float32([0.02]) for x in "kv"}
    write(copy, config, tensors_of(config) | scales)
    shown = run(*generate(copy, "--prompt-ids", IDS, "--json", "--kv-cache-dtype", "int8"))
    assert shown.code == 0 and len(shown.json["token_ids"]) == 20


def test_info_says_why_a_device_gets_no_kernel(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choose = lambda device, dtype: (Xla(), f"of the {device.platform}")  # noqa: E731
    monkeypatch.setattr(maxlike.cli, "choose_implementation", choose)
    assert "attention   Xla (paged: of the cpu), blockwise" in run("info", "--model", folder, "--tp", 1).out


def test_attention_by_name(run: Run, folder: Path) -> None:
    asked = run("info", "--model", folder, "--tp", 1, "--attention", "mosaic_tpu")
    assert "attention   MosaicTpu (paged: asked for), blockwise" in asked.out
    # The kernel for TPU is really taken: it refuses the platform.
    refused = run(*generate(folder, "--prompt-ids", IDS, "--attention", "mosaic_tpu"))
    assert refused.code == 2 and "runs on TPUs" in refused.err and refused.err.count("\n") == 1
    assert run(*generate(folder, "--prompt-ids", IDS, "--attention", "xla")).code == 0
    assert run("info", "--attention", "fast").code == 2


def test_info(run: Run, folder: Path) -> None:
    shown = run("info", "--model", folder, "--dtype", "bfloat16")
    assert (shown.code, shown.err) == (0, "")
    for words in ("platform    cpu", "1 layers", "8 heads", "2 KV heads of 16", "kv=2 x rep=4", "8 cpu devices",
                  "weights     bfloat16", "llama, mistral, qwen2, qwen3, gemma3_text, gemma3", maxlike.__version__,
                  jax.__version__):
        assert words in shown.out
    assert "attention   Xla (paged), blockwise" in shown.out
    assert "model=2" in run("info", "--model", folder, "--tp", 2).out
    refused = run("info", "--model", folder, "--tp", 3)
    assert refused.code == 2 and "Legal sizes: 1, 2, 4, 8" in refused.err and refused.err.count("\n") == 1


# -- mistakes


@pytest.mark.parametrize("flags, says", [
    (["--temperature", "-0.5"], ["temperature", "-0.5"]),
    (["--temperature", "nan"], ["temperature", "nan"]),
    (["--temperature", "hot"], ["--temperature", "hot", "--help"]),
    (["--top-k", "-2"], ["top_k", "-2"]),
    (["--top-p", "0"], ["top_p", "0.0"]),
    (["--top-p", "1.5"], ["top_p", "1.5"]),
    (["--seed", "x"], ["--seed", "x"]),
    (["--max-new-tokens", "0"], ["--max-new-tokens", "0"]),
    (["--tp", "3"], ["size 3", "8 heads", "Legal sizes: 1, 2, 4, 8"]),
    (["--tp", "0"], ["size 0", "Legal sizes: 1, 2, 4, 8"]),
    (["--tp", "9"], ["size 9", "Legal sizes: 1, 2, 4, 8"]),
    (["--dtype", "float16"], ["--dtype", "float16", "bfloat16"]),
    (["--prompt-ids", "1,281"], ["not allowed with", "--prompt"]),
    (["--chat", "--colour"], ["--colour", "--help"]),
])
def test_flags_that_make_no_sense(flags: list[str], says: list[str], run: Run, folder: Path) -> None:
    run(*generate(folder, "--prompt", PROMPT, *flags)).assert_refused(*says)


def test_prompts_that_are_none(run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maxlike.cli.load_engine", None)  # they are refused before the weights are read
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    for ids in (str(vocabulary), "-1", f"5,{vocabulary}"):
        run(*generate(folder, f"--prompt-ids={ids}")).assert_refused(
            f"Token id {ids.split(',')[-1]} is beyond", f"0 to {vocabulary - 1}")
    for ids in ("", "1,,2", "1.5", "one"):
        run(*generate(folder, f"--prompt-ids={ids}")).assert_refused("--prompt-ids", repr(ids))
    run(*generate(folder, "--prompt-ids", "5", "--chat")).assert_refused("--chat", "--prompt-ids")
    run(*generate(folder, "--prompt", "")).assert_refused("prompt is empty")
    run(*generate(folder, "--prompt", PROMPT * 20)).assert_refused("tokens", "63 or fewer")
    run(*generate(folder, "--prompt-file", tmp_path / "none")).assert_refused(str(tmp_path / "none"))
    run(*generate(folder, "--prompt-file", tmp_path)).assert_refused(str(tmp_path))
    (tmp_path / "latin").write_bytes("größe".encode("latin-1"))
    run(*generate(folder, "--prompt-file", tmp_path / "latin")).assert_refused(str(tmp_path / "latin"), "UTF-8")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    run(*generate(folder)).assert_refused("prompt is empty", "stdin")


def test_commands_that_are_none(run: Run) -> None:
    run().assert_refused("COMMAND", "--help")
    run("sing").assert_refused("sing")


def test_folders_that_are_no_model(run: Run, folder: Path, copy: Path, tmp_path: Path) -> None:
    prompt = ("--prompt", PROMPT)
    run(*generate(tmp_path / "nowhere", *prompt)).assert_refused(str(tmp_path / "nowhere"))
    run(*generate(tmp_path, *prompt)).assert_refused("config.json", str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    run(*generate(tmp_path, *prompt)).assert_refused(
        '"mamba"', "llama, mistral, qwen2, qwen3, gemma3_text, gemma3", str(tmp_path / "config.json"))
    (copy / "model.safetensors").unlink()
    run(*generate(copy, *prompt)).assert_refused("model.safetensors", str(copy))


def test_tensors_that_are_wrong_all_in_one_line(run: Run, copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    tensors = tensors_of(config)
    del tensors["model.layers.0.self_attn.q_proj.bias"]
    tensors["model.layers.7.mlp.up_proj.bias"] = np.zeros(72, np.float32)
    tensors["model.norm.weight"] = np.zeros(65, np.float32)
    write(copy, config, tensors)
    run(*generate(copy, "--prompt", PROMPT)).assert_refused(
        "3 problems", str(copy), "'model.layers.0.self_attn.q_proj.bias' is missing",
        "'model.layers.7.mlp.up_proj.bias' is unexpected", "'model.norm.weight' has shape [65]; the config means [64]")
    write(copy, config)
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    run(*generate(copy, "--prompt", PROMPT)).assert_refused(str(file), "cut short", "1 problem ")


def test_being_interrupted(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(engine: Engine) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "step", interrupted)
    stopped = run(*generate(folder, "--prompt", PROMPT))
    assert stopped.code == 130 and "Traceback" not in stopped.err


# -- processes


def start(cache: Path, *argv: Any, **options: Any) -> subprocess.Popen[str]:
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache),
                                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment.pop("PYTHONUNBUFFERED", None)  # it would hide what is forgotten in buffers
    return subprocess.Popen([sys.executable, "-m", "maxlike", *map(str, argv)], cwd=ROOT, env=environment, text=True,
                            encoding="utf-8", stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def test_a_process_of_its_own(run: Run, folder: Path, cache: Path) -> None:
    """Text and JSON of two processes at once, the prompt on the stdin of one; beside it stdout has nothing."""
    shown = start(cache, *generate(folder), stdin=subprocess.PIPE)
    found = start(cache, *generate(folder, "--prompt", PROMPT, "--json"), stdin=subprocess.DEVNULL)
    out, err = shown.communicate(PROMPT, timeout=300)
    result = Result(found.wait(timeout=300), *found.communicate())
    assert shown.returncode == 0 and err.count("\n") == 1 and err.startswith("load ")
    assert result.json["text"] + "\n" == out
    assert result.json["token_ids"] == run(*generate(folder, "--prompt", PROMPT, "--json")).json["token_ids"]


def test_a_process_that_is_refused_and_one_that_nobody_reads(folder: Path, cache: Path) -> None:
    refused = start(cache, *generate(folder, "--prompt", PROMPT, "--tp", 3))
    unread = start(cache, *generate(folder, "--prompt", PROMPT, "--json"))
    unread.stdout.close()
    Result(refused.wait(timeout=300), *refused.communicate()).assert_refused("size 3", "Legal sizes: 1, 2, 4, 8")
    err = unread.stderr.read()
    assert unread.wait(timeout=300) == 0 and "Traceback" not in err and "BrokenPipe" not in err, err
    unread.stderr.close()
