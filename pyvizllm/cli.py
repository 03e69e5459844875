"""The command line: `pyvizllm demo | train | view | doctor | report | info`."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, TypeAlias

import torch
import tyro
from torch.utils.data import Subset

from pyvizllm.doctor import examine
from pyvizllm.info import describe, version
from pyvizllm.models.gpt import GPT, Preset
from pyvizllm.report import write_report
from pyvizllm.telemetry.diagnosis import descriptions
from pyvizllm.telemetry.terminal import printable
from pyvizllm.training.config import TrainConfig, build_config
from pyvizllm.training.text import VOCAB_SIZE, TextDataset, decode, encode
from pyvizllm.training.trainer import TrainResult, train
from pyvizllm.view import view

SERIOUS_FAULT = 1
USER_ERROR = 2
INTERRUPTED = 130
SAMPLE_BYTES = 400


@dataclass(frozen=True)
class Shape:
    """The GPT; what is left out is the preset's."""

    preset: Preset = "tiny"
    """tiny: 0.8 million parameters. gpt2: 86 million."""
    block_size: int | None = None
    """Bytes of text that a prediction may look back on."""
    n_layer: int | None = None
    """Transformer blocks."""
    n_head: int | None = None
    """Attention heads; they share n_embd evenly."""
    n_embd: int | None = None
    """Width."""
    dropout: float | None = None
    """Share of activations dropped in training."""

    def build(self) -> GPT:
        """The model, over bytes; its weights come from torch's global generator."""
        changes = {name: value for name, value in vars(self).items() if value is not None}
        return GPT.preset(changes.pop("preset"), vocab_size=VOCAB_SIZE, **changes)


@dataclass(frozen=True)
class Demo:
    """Train a small GPT on real text with every gradient watched: minutes on two CPU cores."""

    data: Path | None = None
    """Text file or folder of text. None: the source files of Python's own standard library."""
    output_dir: str = "runs"
    """Folder that holds the runs."""
    max_steps: int = 1200
    """Optimizer steps, of 1024 bytes each."""
    seed: int = 42
    """Seed of the weights, the data order and the sample."""
    telemetry: bool = True
    """Watch every gradient; without, to see what watching costs."""


@dataclass(frozen=True)
class Train:
    """Train a GPT on your text, with every option of pyvizllm.train."""

    data: Path
    """Text file or folder of text; its last tenth is for evaluation only."""
    eval_windows: int = 256
    """Windows to evaluate on, spread evenly over that last tenth."""
    shape: tyro.conf.OmitArgPrefixes[Shape] = field(default_factory=Shape)
    config: tyro.conf.OmitArgPrefixes[TrainConfig] = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class View:
    """Show a run in the browser: TensorBoard, on this machine only."""

    run_dir: tyro.conf.Positional[Path]
    """Folder of a run, or a folder of runs to compare."""
    port: int | None = None
    """None: 6006, or a free one if that is taken."""


@dataclass(frozen=True)
class Doctor:
    """Say what is wrong with a run, and what to do; the exit code is 1 if something serious is."""

    run_dir: tyro.conf.Positional[Path] = Path()
    """Folder of a run, its history.jsonl, or a folder with one run in it."""
    rules: tyro.conf.FlagCreatePairsOff[bool] = False
    """List the rules, by the names that `watch(ignore=...)` takes, and what each looks for."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object, for machines."""


@dataclass(frozen=True)
class Report:
    """Write a run on one page of HTML, to keep and to send."""

    run_dir: tyro.conf.Positional[Path]
    """Folder of a run, its history.jsonl, or a folder with one run in it."""
    output: Path | None = None
    """The file to write. None: report.html in the run's folder."""


@dataclass(frozen=True)
class Info:
    """Print versions, instruction sets and which kernels are present."""


Command: TypeAlias = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[View, tyro.conf.subcommand("view")]
    | Annotated[Doctor, tyro.conf.subcommand("doctor")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Info, tyro.conf.subcommand("info")]
)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command in `args` (the process's own if None); return its exit code.

    0: done. 1: the doctor has found a serious fault. 2: it cannot be done as asked; one sentence on
    stderr says why. 130: Ctrl-C.
    """
    if list(sys.argv[1:] if args is None else args) == ["--version"]:
        print(f"pyvizllm {version()}")
        return 0
    command = tyro.cli(
        Command,
        prog="pyvizllm",
        description="See what every parameter of a PyTorch model does at every training step. "
        "--version prints the version.",
        args=args,
    )
    try:
        return _run(command)
    except (ValueError, OSError) as error:
        print(f"pyvizllm: {printable(str(error))}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("pyvizllm: interrupted", file=sys.stderr)
        return INTERRUPTED


def _run(command: Demo | Train | View | Doctor | Report | Info) -> int:
    if isinstance(command, Demo):
        _train_gpt(command.data, Shape(), 256, demo_config(command))
    elif isinstance(command, Train):
        _train_gpt(command.data, command.shape, command.eval_windows, command.config)
    elif isinstance(command, View):
        view(command.run_dir, command.port)
    elif isinstance(command, Report):
        print(printable(str(write_report(command.run_dir, command.output))))
    elif isinstance(command, Doctor) and command.rules:
        print("\n".join(f"{name:24}{line}" for name, line in descriptions().items()))
    elif isinstance(command, Doctor):
        examination = examine(command.run_dir)
        print(examination.as_json() if command.json else examination.as_text())
        return SERIOUS_FAULT if examination.serious else 0
    else:
        print(describe())
    return 0


def demo_config(command: Demo) -> TrainConfig:
    """How the demo trains."""
    # Measured on two cores: eval loss 1.8 nats a byte, from 5.5, after about two minutes.
    return TrainConfig(
        output_dir=command.output_dir,
        max_steps=command.max_steps,
        seed=command.seed,
        telemetry=command.telemetry,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=32,
        learning_rate=4e-3,
        warmup_steps=60,
        weight_decay=0.1,
        adam_beta2=0.95,
        logging_steps=20,
        eval_steps=200,
    )


def _train_gpt(data: Path | None, shape: Shape, eval_windows: int, config: TrainConfig) -> None:
    """Everything that can be refused is refused before the run's folder is made."""
    config = build_config(config, {})
    torch.manual_seed(config.seed)
    model = shape.build()
    text = TextDataset(data, block_size=model.config.block_size, split="train")
    unseen = TextDataset(data, block_size=model.config.block_size, split="eval")
    evaluation = _spread(unseen, eval_windows)
    print(
        f"A GPT of {sum(p.numel() for p in model.parameters()):,} parameters learns from "
        f"{text.tokens.numel():,} bytes of {'Python source' if data is None else data}.",
        flush=True,  # before the progress bar, which is on stderr
    )
    result = train(model, text, evaluation, config=config)
    _report(result, model, "def " if data is None else "\n", config.seed)


def _spread(dataset: TextDataset, count: int) -> Subset[tuple[torch.Tensor, torch.Tensor]]:
    """`count` windows of the data set, evenly spaced (all of them, if there are no more)."""
    if count < 1:
        raise ValueError(f"train: expected eval_windows at least 1, got {count}")
    count = min(count, len(dataset))
    return Subset(dataset, [index * len(dataset) // count for index in range(count)])


def _report(result: TrainResult, model: GPT, prompt: str, seed: int) -> None:
    losses = [(row["step"], row["train/loss"]) for row in result.history if "train/loss" in row]
    for step, loss in losses[:: max(1, len(losses) - 1)]:  # the first and the last
        print(f"train loss {loss:.3f} nats a byte at step {step:.0f}")
    print(f"eval loss  {result.metrics['eval/loss']:.3f} nats a byte on text it has not seen")
    print("What it writes now:\n")
    print(textwrap.indent(_sample(model, prompt, seed), "  | ", lambda line: True))
    print(f"\nThe run is in {result.run_dir}. To see it in the browser:")
    print(f"    {_program()} view {shlex.quote(str(result.run_dir))}")


def _program() -> str:
    """How this shell calls pyvizllm: by name, or by its path where it is not on the PATH."""
    if shutil.which("pyvizllm") is not None or Path(sys.argv[0]).name != "pyvizllm":
        return "pyvizllm"
    return shlex.quote(os.path.relpath(sys.argv[0]))


def _sample(model: GPT, prompt: str, seed: int) -> str:
    device = model.token_embedding.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    tokens = encode(prompt)[None].to(device)
    return decode(model.generate(tokens, SAMPLE_BYTES, temperature=0.7, generator=generator)[0])
