"""Learned pruning, fitted to a user's data: checkpoint and questions with answers → checkpoint with pruning."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from edgeprune.calib.atp_trainer import ANNEALED, AtpTrainer
from edgeprune.calib.dyrate_trainer import DyRateTrainer
from edgeprune.calib.fitted_checkpoint import CURVES_FILE, PLOT_FILE, write_fitted
from edgeprune.calib.processes import choose_processes
from edgeprune.calib.samples import BadSample, choose_samples, read_samples
from edgeprune.calib.token_target import TokenTarget
from edgeprune.calib.trainer import Trainer
from edgeprune.calib.training import (
    Curves,
    Split,
    TrainingOptions,
    TrainingProgress,
    measure,
    train,
    trained_with,
)
from edgeprune.calib.training_data import TrainingData
from edgeprune.calib.training_plot import plot_png
from edgeprune.calib.training_state import StateStore
from edgeprune.checkpoint import load_checkpoint, read_config, read_methods
from edgeprune.checkpoint_weights import weight_files
from edgeprune.errors import CheckpointError, DataError, PruningError
from edgeprune.export.input_settings import InputSettings
from edgeprune.models.families import FAMILIES
from edgeprune.models.vision_language import VisionLanguageModel
from edgeprune.prune.atp import Atp
from edgeprune.prune.atp_soft import AtpTraining
from edgeprune.prune.choice import choose_methods
from edgeprune.prune.dyrate import DyRate
from edgeprune.prune.dyrate_soft import DyRateTraining
from edgeprune.prune.method import PruningMethod
from edgeprune.whole_folder import check_replaceable, whole_folder

HEADS, ALL = "heads", "all"
FLOAT32, BFLOAT16 = "float32", "bfloat16"
_KIND = "checkpoint that fit has written"
_DECODER = ("language_model.", "lm_head.")

MethodTraining = AtpTraining | DyRateTraining
TRAININGS: Mapping[str, MethodTraining] = {Atp.name: ANNEALED, DyRate.name: DyRateTraining()}
"""The methods that can be fitted, with how."""


class FitProgress(TrainingProgress, Protocol):
    """Hears what a fit does."""

    def bad(self, sample: BadSample) -> None:
        """A sample cannot be used."""


class SilentProgress:
    """Reports nothing."""

    def bad(self, sample: BadSample) -> None:
        """Nothing."""

    def step(self, done: int, steps: int, curves: Curves) -> None:
        """Nothing."""

    def say(self, line: str) -> None:
        """Nothing."""


@dataclass(frozen=True)
class FitOptions:
    """What a fit is asked for, besides the method.

    Attributes:
        target: N_target: visual tokens of a prompt, averaged over the decoder's layers.
        steps: Optimizer steps.
        batch_size: Examples of a step, those of all processes together.
        samples: How many to draw from the data; None takes all.
        seed: Of the draw, the order and the training.
        trainable: "heads", or "all": the language model, too, but not the vision tower and the projector.
        decoder_learning_rate: The highest, with "all"; the default is the paper's.
        precision: "float32", or "bfloat16": a frozen model has such weights, one that learns computes so (AMP).
        device: As torch names it; None takes a GPU if there is one.
        save_every: Steps between two states on disk.
    """

    target: TokenTarget
    steps: int = 500
    batch_size: int = 32
    samples: int | None = None
    seed: int = 0
    trainable: str = HEADS
    decoder_learning_rate: float = 2e-5
    precision: str = FLOAT32
    device: str | None = None
    save_every: int = 100

    def __post_init__(self) -> None:
        for name, allowed in (("trainable", (HEADS, ALL)), ("precision", (FLOAT32, BFLOAT16))):
            if getattr(self, name) not in allowed:
                raise PruningError(f"{name} is '{getattr(self, name)}', allowed: {', '.join(allowed)}")
        for name in ("steps", "batch_size", "save_every"):
            if getattr(self, name) < 1:
                raise PruningError(f"{name.replace('_', '-')} is {getattr(self, name)}, allowed: 1 or more")
        if not 0 < self.decoder_learning_rate < 1:
            raise PruningError(
                f"the decoder's learning rate is {self.decoder_learning_rate}, allowed: more than 0, less than 1"
            )


@dataclass(frozen=True)
class FitResult:
    """What a fit has come to.

    Attributes:
        path: The new checkpoint.
        method: What is in its pruning.json.
        target: Visual tokens aimed at.
        tokens: Visual tokens of what was held out, pruned as in inference, averaged over layers.
        right: Share of its answers that would be given as a whole.
        unpruned_tokens: Visual tokens before pruning.
        examples: How many were learned from.
        held_out: How many were measured on.
        skipped: Samples that could not be used.
        curves: Of all steps.
    """

    path: Path
    method: PruningMethod
    target: float
    tokens: float
    right: float
    unpruned_tokens: float
    examples: int
    held_out: int
    skipped: int
    curves: Curves


def choose_method(
    checkpoint: Path, name: str, preset: str | None = None, settings: Sequence[str] = ()
) -> PruningMethod:
    """The method to fit: the checkpoint's own parameters if it has the method, then what the user says.

    ATP without parameters of its own gets min-max norms: the paper's logits lie far outside of what a threshold in
    0 … 1 can reach.

    Raises:
        PruningError: As :func:`edgeprune.prune.choice.choose_methods`.
    """
    if name not in TRAININGS:
        training_from_settings(name, ())
    own = any(method.name == name for method in read_methods(checkpoint))
    norms = ("self_norm=minmax", "cross_norm=minmax") if name == Atp.name and not own else ()
    chosen = choose_methods(checkpoint, [name], [] if preset is None else [preset], (*norms, *settings))
    assert chosen is not None  # a method was named
    return chosen[0]


def training_from_settings(method: str, settings: Sequence[str]) -> MethodTraining:
    """How a method is trained, from ``NAME=VALUE``, the value as JSON.

    Raises:
        PruningError: The method cannot be trained, or a name or value is wrong.
    """
    if method not in TRAININGS:
        raise PruningError(
            f"{method} has nothing to learn: methods that can be fitted are {', '.join(TRAININGS)}"
        )
    training = TRAININGS[method]
    known = [field.name for field in dataclasses.fields(training) if field.name != "target_tokens"]
    values: dict[str, Any] = {}
    for text in settings:
        name, _, value = text.partition("=")
        if name not in known:
            raise PruningError(f"--train takes NAME=VALUE, names: {', '.join(known)}; got '{text}'")
        try:
            values[name] = float(value)
        except ValueError as error:
            raise PruningError(f"--train {name} takes a number, got '{value}'") from error
    changed: MethodTraining = dataclasses.replace(training, **values)
    return changed


def fit(
    checkpoint: str | Path,
    data: str | Path,
    output: str | Path,
    method: PruningMethod,
    options: FitOptions,
    *,
    training: MethodTraining | None = None,
    clip: str | Path | None = None,
    restart: bool = False,
    progress: FitProgress | None = None,
) -> FitResult:
    """Train a method's learned weights on questions with answers and write a checkpoint with them.

    The state of the training lies in ``<output>.training`` until the checkpoint is whole; the same call goes on there.
    Under ``accelerate launch`` every process makes the same call.

    Args:
        checkpoint: Folder of a Hugging Face checkpoint of a supported family; nothing in it is changed.
        data: JSONL file of pictures, questions and answers, see :func:`edgeprune.calib.samples.read_samples`.
        output: Folder of the new checkpoint; one that an earlier fit has written is replaced.
        method: ATP or DyRate, with its parameters.
        options: Target and extent.
        training: How the method is trained; by default as in :data:`TRAININGS`.
        clip: Folder of the CLIP checkpoint of the vision tower, for checkpoints saved by LLaVA's own code without it.
        restart: Whether to forget an unfinished training.
        progress: Hears every step.

    Raises:
        CheckpointError: The checkpoint is unusable, or the output cannot be written.
        DataError: The data cannot be read or holds nothing to learn from.
        PruningError: The method, its training or the target does not fit the model.
    """
    source, target_folder, report = Path(checkpoint), Path(output), progress or SilentProgress()
    training = training_from_settings(method.name, ()) if training is None else training
    config = read_config(source, clip)
    if target_folder.resolve() == source.resolve():
        raise CheckpointError(f"{target_folder} is the checkpoint itself: choose another output folder")
    check_replaceable(target_folder, CURVES_FILE, _KIND, CheckpointError)
    if Path(data).is_dir():
        raise DataError(f"{data} is a folder of pictures, which have no answers: give a JSONL file")
    samples, bad = choose_samples(read_samples(data), options.samples, options.seed)
    processes = choose_processes(options.device)
    settings = InputSettings.from_checkpoint(source, config, clip)
    frozen_type = (
        torch.bfloat16 if (options.precision, options.trainable) == (BFLOAT16, HEADS) else torch.float32
    )
    unpruned = load_checkpoint(source, methods=(), clip=clip, dtype=frozen_type)
    method.check(unpruned.plan.geometry)
    unpruned.model.to(processes.device)
    examples = TrainingData(unpruned, settings)
    for sample in bad:
        report.bad(sample)
    unusable = list(bad)

    def unfit(sample: BadSample) -> None:
        unusable.append(sample)
        report.bad(sample)

    report.say(f"opens the pictures of {len(samples)} samples")
    examples.add(samples, unfit)
    target = options.target.tokens(examples.mean_visual)
    # What the heads are drawn from is the same in every process, and the caller's random numbers stay as they are.
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(options.seed)
        trainer = _trainer(unpruned.model, method, training, target, examples.mean_visual)
    trainer.heads.to(processes.device)
    decoder = trained_with(unpruned.model, _DECODER) if options.trainable == ALL else {}
    store = StateStore(
        target_folder.with_name(f"{target_folder.name}.training"),
        _asked(source, examples, method, training, target, options),
        writes=processes.rank == 0,
    )
    if restart:
        store.forget()
        processes.wait()
    store.check()
    split = Split.of(len(examples.examples), options.seed)
    loop = TrainingOptions(
        options.steps,
        options.batch_size,
        options.seed,
        options.decoder_learning_rate,
        options.save_every,
        mixed_precision=options.precision == BFLOAT16 and options.trainable == ALL,
    )
    curves = train(trainer, decoder, examples, split, loop, processes, store, report)
    tokens, right = measure(trainer, examples, split, loop, processes)
    result = FitResult(
        target_folder,
        method,
        target,
        tokens,
        right,
        examples.mean_visual,
        len(split.train),
        len(split.held_out),
        len(unusable),
        curves,
    )
    if processes.rank == 0:
        _write(result, source, trainer, unpruned.model if decoder else None, str(config["model_type"]))
        store.forget()
    processes.wait()
    return result


def _trainer(
    model: VisionLanguageModel,
    method: PruningMethod,
    training: MethodTraining,
    target: float,
    unpruned: float,
) -> Trainer:
    if isinstance(method, Atp) and isinstance(training, AtpTraining):
        return AtpTrainer(model, method, dataclasses.replace(training, target_tokens=target), unpruned)
    if isinstance(method, DyRate) and isinstance(training, DyRateTraining):
        return DyRateTrainer(model, method, training, target, unpruned)
    raise PruningError(f"{method.name} is not trained with {type(training).__name__}: leave 'training' out")


def _write(
    result: FitResult, source: Path, trainer: Trainer, trained: VisionLanguageModel | None, model_type: str
) -> None:
    weights = {name: tensor.cpu().contiguous() for name, tensor in trainer.weights().items()}
    decoder: dict[str, Tensor] = {}
    if trained is not None:
        decoder = {
            name: tensor.cpu() for name, tensor in trained.state_dict().items() if name.startswith(_DECODER)
        }
    numbers = {
        "method": result.method.name,
        "target_tokens": result.target,
        "unpruned_tokens": result.unpruned_tokens,
        "examples": result.examples,
        "held_out": {"examples": result.held_out, "tokens": result.tokens, "right": result.right},
        "curves": vars(result.curves),
    }
    with whole_folder(result.path, CURVES_FILE, _KIND, CheckpointError) as folder:
        write_fitted(folder, source, result.method, weights, decoder, FAMILIES[model_type])
        (folder / PLOT_FILE).write_bytes(plot_png(result.curves, result.target, result.method.name))
        (folder / CURVES_FILE).write_text(json.dumps(numbers) + "\n", encoding="utf-8")


def _asked(
    source: Path,
    examples: TrainingData,
    method: PruningMethod,
    training: MethodTraining,
    target: float,
    options: FitOptions,
) -> dict[str, object]:
    """What has to be the same for an unfinished training to go on; names that a message can use."""
    names = ("steps", "batch_size", "seed", "trainable", "decoder_learning_rate", "precision")
    return {
        "checkpoint": _identity(source),
        "data": _digest(examples),
        "method": {"name": method.name, **method.parameters()},
        "training": dataclasses.asdict(training),
        "target": target,
        **{name: getattr(options, name) for name in names},
    }


def _identity(folder: Path) -> str:
    """What tells a checkpoint from another without reading its weights."""
    files = [(path.name, path.stat().st_size) for path in weight_files(folder)]
    config = (folder / "config.json").read_bytes()
    return hashlib.sha256(repr(files).encode() + config).hexdigest()


def _digest(data: TrainingData) -> str:
    digest = hashlib.sha256()
    for example in data.examples:
        digest.update(repr(tuple(map(str, example.pictures))).encode())
        digest.update(example.prompt.tobytes() + b"|" + example.answer.tobytes() + b"\n")
    return digest.hexdigest()
