"""Small runs of training: a model that compiles in seconds, data, and the command line in a process of its own."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from tests.models.checkpoints import config_of, tensors_of, write

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<s>", "</s>"


def write_model(folder: Path, **config: Any) -> Path:
    """A random Llama over bytes, of two layers, with its tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE({piece: i for i, piece in enumerate([BEGIN, END, *alphabet])}, []))
    tokenizer.add_special_tokens([BEGIN, END])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    described = config_of("llama", **dict(
        vocab_size=len(alphabet) + 2, num_hidden_layers=2, hidden_size=32, head_dim=8, intermediate_size=64,
        bos_token_id=0, eos_token_id=1, attention_bias=False, mlp_bias=False, tie_word_embeddings=True) | config)
    tensors = {name: 0.3 * value if value.ndim > 1 else np.ones_like(value)
               for name, value in tensors_of(described).items()}
    write(folder, described, tensors)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"bos_token": BEGIN, "eos_token": END, "model_max_length": described["max_position_embeddings"]}))
    return folder


def write_texts(file: Path, n: int = 64, seed: int = 0) -> Path:
    """Short texts, no two alike."""
    draw = random.Random(seed)
    words = "one", "two", "three", "four"
    texts = [" ".join(draw.choice(words) for _ in range(draw.randint(2, 9))) for _ in range(n)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return file


def losses(folder: Path, kind: str = "train") -> dict[int, float]:
    """Step -> loss, of what a run has written so far."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    steps = [line["step"] for line in found if line["kind"] == kind]
    assert len(set(steps)) == len(steps), "a step is there twice"
    return {line["step"]: line["loss"] for line in found if line["kind"] == kind}


def start(argv: Sequence[Any], devices: int = 1) -> subprocess.Popen[str]:
    """`maxlike ARGV` as a process of its own with so many CPU devices."""
    environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
                   "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-m", "maxlike", *map(str, argv)], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finished(process: subprocess.Popen[str], code: int = 0) -> str:
    """What a process told, once it has ended with `code`."""
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, (process.returncode, out, err)
    return err
