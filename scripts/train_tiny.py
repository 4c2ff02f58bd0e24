"""Trains the embedded model from scratch: `python scripts/train_tiny.py`.

A small Llama on the source of the running Python's standard library, trained as `maxlike train` trains. Whole files
teach it how files go on, and short functions, each a document of its own, that a function's head is followed by a body
and an end. A run that was stopped goes on when the same command is given again.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from eval_tiny import EMBEDDED, measure
from tiny_corpus import BEGIN, END, Corpus, encode_documents, functions_of, train_tokenizer, write_tokenizer

import maxlike
from maxlike.models.config import LayerConfig, TransformerConfig
from maxlike.models.registry import unparse_config
from maxlike.nn.rotary_embedding import RotaryEmbedding
from maxlike.train.config import DataConfig, LogConfig, ModelConfig, OptimizerConfig, StepConfig, TrainConfig
from maxlike.train.export import export
from maxlike.train.loop import train

STEPS = 1500  # 40 minutes on two busy cores; measuring what came out takes a few more


@dataclass(frozen=True)
class Recipe:
    """How the model is made and trained. `function_tokens` are those of the longest function that is a document."""

    vocab_size: int = 4096
    hidden_size: int = 192
    intermediate_size: int = 512
    layers: int = 5
    heads: int = 4
    kv_heads: int = 2
    max_position_embeddings: int = 2048
    batch_tokens: int = 4096
    window_lengths: tuple[int, ...] = (512,) * 8 + (2048,)  # far positions are known too, and it costs less time
    shuffle_buffer: int = 4096
    function_tokens: int = 150
    learning_rate: float = 1e-2
    warmup: float = 0.03

    def describe(self, tokenizer: tokenizers.Tokenizer) -> TransformerConfig:
        """The model, its vocabulary the tokenizer's."""
        head_dim = self.hidden_size // self.heads
        return TransformerConfig(
            "llama", tokenizer.get_vocab_size(), self.hidden_size, self.intermediate_size, self.heads, self.kv_heads,
            head_dim, (LayerConfig(RotaryEmbedding(head_dim)),) * self.layers, self.max_position_embeddings,
            tie_word_embeddings=True, bos_token_id=tokenizer.token_to_id(BEGIN),
            eos_token_ids=(tokenizer.token_to_id(END),), dtype="bfloat16")

    def configure(self, work: Path, steps: int, seed: int = 0) -> TrainConfig:
        """The run, on what `prepare` has written to `work`."""
        return TrainConfig(
            output=str(work / "run"), steps=steps, seed=seed, validate_every=max(1, steps // 8),
            model=ModelConfig(str(work / "model"), from_scratch=True),
            data=DataConfig([str(work / "files.jsonl"), str(work / "functions.jsonl")], self.batch_tokens,
                            validation_files=[str(work / "held_out.jsonl")], format="text", long_text="cut",
                            max_seq_len=max(self.window_lengths), window_lengths=self.window_lengths,
                            shuffle_buffer=self.shuffle_buffer),
            optimizer=OptimizerConfig("muon", self.learning_rate, schedule="linear", b2=0.95, weight_decay=0.1,
                                      warmup_steps=round(self.warmup * steps)),
            step=StepConfig(dtype="float32", remat="dots"),  # a CPU is no faster in bfloat16
            log=LogConfig(plot=False))


def prepare(corpus: Corpus, recipe: Recipe, work: Path) -> None:
    """Writes what a run reads: a tokenizer and a model's description, the documents, and some that are held out."""
    tokenizer = train_tokenizer((file.text for file in corpus.training), recipe.vocab_size)
    write_tokenizer(tokenizer, work / "model", recipe.max_position_embeddings)
    config = unparse_config(recipe.describe(tokenizer))
    (work / "model" / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    functions = sorted({function.text for file in corpus.training for function in functions_of(file.text)})
    lengths = map(len, encode_documents(tokenizer, functions))
    _write(work / "files.jsonl", (file.text for file in corpus.training))
    _write(work / "functions.jsonl", (text for text, length in zip(functions, lengths, strict=True)
                                      if 16 <= length <= recipe.function_tokens))
    _write(work / "held_out.jsonl", (file.text for file in corpus.held_out[::24]))


def _write(file: Path, texts: Iterable[str]) -> None:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def make(corpus: Corpus, recipe: Recipe, work: Path, folder: Path, steps: int, seed: int = 0) -> bool:
    """Trains in `work` and puts the model into `folder`; False if a signal came first, and it is to go on later."""
    prepare(corpus, recipe, work)
    if train(recipe.configure(work, steps, seed), version=maxlike.__version__).stopped_by is not None:
        return False
    shutil.rmtree(work / "exported", ignore_errors=True)
    export(str(work / "run"), work / "exported", dtype="bfloat16", tell=print)
    shutil.copytree(work / "exported", folder, dirs_exist_ok=True)
    return True


def main() -> None:
    """Trains, then measures what came out as `eval_tiny.py` does."""
    parser = argparse.ArgumentParser(description="Train the embedded model on the standard library's source.")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"default {STEPS}")
    parser.add_argument("--work", type=Path, default=Path("build/tiny"), metavar="FOLDER",
                        help="for the data and the run's checkpoints; default: build/tiny")
    parser.add_argument("--output", type=Path, default=EMBEDDED, metavar="FOLDER", help="default: maxlike/embedded")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    corpus = Corpus.of_standard_library()
    if make(corpus, Recipe(), args.work, args.output, args.steps, args.seed):
        for name, value in measure(args.output, corpus).items():
            print(f"{name}: {value}")


if __name__ == "__main__":
    main()
