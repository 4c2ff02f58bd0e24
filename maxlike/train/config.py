"""Everything that a training run is told, as one frozen dataclass of sections."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from maxlike.nn.lora import LoraConfig
from maxlike.train.data import DataConfig
from maxlike.train.optimizer import OptimizerConfig
from maxlike.train.step import StepConfig


@dataclass(frozen=True)
class ModelConfig:
    """What is trained.

    Args:
        path: a Hugging Face folder, or a hub id such as `Qwen/Qwen3-0.6B`.
        from_scratch: take its `config.json` and tokenizer alone, and begin with random weights.
        scan_layers: run groups of like layers as one scan. Without it a step takes more memory, most of all on CPU,
            where rematerialisation saves nothing then, and longer to compile.
    """

    path: str
    from_scratch: bool = False
    scan_layers: bool = True


@dataclass(frozen=True)
class LossConfig:
    """What is minimised besides the likelihood of the data.

    Args:
        z_loss: times the square of the softmax's log-denominator is added (PaLM).
        chunk: tokens of each shard whose logits there are at a time; by default as many as take 128 MB.
    """

    z_loss: float = 0.0
    chunk: int | None = None


@dataclass(frozen=True)
class PreferenceConfig:
    """What is minimised where the data are pairs of a chosen and a rejected answer (DPO, or IPO). The reference is the
    model that the run began with.

    Args:
        beta: how dear it is to go away from the reference.
        label_smoothing: the chance that a pair is labelled the wrong way round.
        kind: sigmoid is DPO's, ipo is IPO's.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    kind: Literal["sigmoid", "ipo"] = "sigmoid"


@dataclass(frozen=True)
class MeshConfig:
    """How the devices are shared out: their number is the product of the three.

    Args:
        data: copies of everything, each with its part of a batch.
        fsdp: parts into which weights and optimizer are cut, and batches too; by default what the others leave.
        model: tensor-parallel size.
    """

    data: int = 1
    fsdp: int | None = None
    model: int = 1


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved, beside its end and a signal to stop.

    Args:
        every_steps: after so many steps.
        every_minutes: after so many minutes.
        keep: so many of the newest stay.
        keep_best: a new lowest validation loss is saved at once, and stays.
        resume: auto goes on with the newest checkpoint of the output folder where there is one, never refuses such a
            folder; anything else is the checkpoint, or the folder of a run, to go on with.
    """

    every_steps: int | None = None
    every_minutes: float | None = 15.0
    keep: int = 3
    keep_best: bool = True
    resume: str = "auto"

    def __post_init__(self) -> None:
        for name in ("every_steps", "every_minutes"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be above 0, or none; got {value}.")
        if self.keep < 1:
            raise ValueError(f"keep must be 1 or more: at least the newest stays; got {self.keep}.")


@dataclass(frozen=True)
class LogConfig:
    """What the run tells.

    Args:
        every_steps: lines of `metrics.jsonl` are so many steps apart.
        tensorboard: write TensorBoard's files too; by default where tensorboardX is installed.
        plot: draw `loss.png` at the end, where matplotlib is installed.
        quiet: no progress on stderr.
    """

    every_steps: int = 1
    tensorboard: bool | None = None
    plot: bool = True
    quiet: bool = False

    def __post_init__(self) -> None:
        if self.every_steps < 1:
            raise ValueError(f"every_steps must be 1 or more; got {self.every_steps}.")


@dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Args:
        output: the run's folder: checkpoints, metrics, the configuration as it was used.
        steps: optimizer steps; by default as many as `data.epochs` rounds through the data make.
        validate_every: steps between two measurements of the validation loss; it is measured at the end in any case.
        seed: of weights that are drawn, and of the data's order where `data.seed` is 0.

    Raises:
        ValueError: a number is out of range.
    """

    output: str
    model: ModelConfig
    data: DataConfig
    steps: int | None = None
    validate_every: int | None = None
    seed: int = 0
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    step: StepConfig = field(default_factory=StepConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    lora: LoraConfig | None = None
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        for name in ("steps", "validate_every"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be above 0; got {value}.")
        if self.validate_every is not None and not (self.data.validation_files or self.data.validation_fraction):
            raise ValueError("validate_every measures on what is held out, and nothing is: give data.validation_files "
                             "or a data.validation_fraction, or leave it out.")
        if self.model.from_scratch and self.lora is not None:
            raise ValueError("lora trains adapters on a model that knows something, and model.from_scratch begins with "
                             "random weights: leave one of them out.")
