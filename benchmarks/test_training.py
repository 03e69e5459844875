"""The demo's training with every gradient watched, against without, and against other trainers.

60 steps of the demo's GPT and batch, with the demo's three publications of all histograms. The
other trainers have the same model, batches, optimizer and clipping; their schedules differ.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvizllm import train
from pyvizllm.cli import Demo, Shape, demo_config
from pyvizllm.training.text import TextDataset

STEPS = 60
DEMO = demo_config(Demo(max_steps=STEPS))


@pytest.fixture(scope="module")
def text() -> TextDataset:
    return TextDataset(block_size=Shape().build().config.block_size, split="train")


def train_with_ours(folder: Path, text: TextDataset, *, telemetry: bool = True) -> None:
    config = dataclasses.replace(
        DEMO, output_dir=str(folder), telemetry=telemetry, save_steps=0, disable_tqdm=True
    )
    torch.manual_seed(0)
    train(Shape().build(), text, config=config)


def test_telemetry_on_against_off(compare, tmp_path, text):
    compare(
        f"demo training, {STEPS} steps",
        ("telemetry on", lambda: train_with_ours(tmp_path, text)),
        {"telemetry off": lambda: train_with_ours(tmp_path, text, telemetry=False)},
        rounds=9,
        target={"telemetry off": "within 3 % (0.97x)"},
    )


class ModelWithLoss(nn.Module):
    """What Hugging Face's Trainer takes: a model that returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.gpt = Shape().build()

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.gpt(input_ids)
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def train_with_transformers(folder: Path, text: TextDataset) -> None:
    from transformers import Trainer, TrainingArguments

    def collate(items: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        inputs, labels = zip(*items, strict=True)
        return {"input_ids": torch.stack(inputs), "labels": torch.stack(labels)}

    arguments = TrainingArguments(
        output_dir=str(folder / "transformers"),
        max_steps=STEPS,
        use_cpu=True,
        per_device_train_batch_size=DEMO.per_device_train_batch_size,
        learning_rate=DEMO.learning_rate,
        weight_decay=DEMO.weight_decay,
        adam_beta2=DEMO.adam_beta2,
        warmup_steps=DEMO.warmup_steps,
        max_grad_norm=DEMO.max_grad_norm,
        logging_steps=DEMO.logging_steps,
        report_to=["tensorboard"],
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    torch.manual_seed(0)
    Trainer(ModelWithLoss(), arguments, data_collator=collate, train_dataset=text).train()


def train_with_lightning(folder: Path, text: TextDataset) -> None:
    import lightning
    from lightning.pytorch.loggers import TensorBoardLogger

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = ModelWithLoss()

        def training_step(self, batch: list[Tensor], _: int) -> Tensor:
            loss = self.model(*batch)["loss"]
            self.log("train/loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(
                self.parameters(),
                lr=DEMO.learning_rate,
                weight_decay=DEMO.weight_decay,
                betas=(DEMO.adam_beta1, DEMO.adam_beta2),
                fused=True,
            )

    trainer = lightning.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        gradient_clip_val=DEMO.max_grad_norm,
        log_every_n_steps=DEMO.logging_steps,
        logger=TensorBoardLogger(folder / "lightning"),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    torch.manual_seed(0)
    loader = torch.utils.data.DataLoader(
        text, batch_size=DEMO.per_device_train_batch_size, shuffle=True
    )
    trainer.fit(Module(), loader)


@pytest.mark.filterwarnings("ignore")  # theirs: of workers, of the device, of what is deprecated
def test_everything_watched_against_trainers_that_show_the_loss(compare, tmp_path, text):
    pytest.importorskip("transformers")
    pytest.importorskip("lightning")
    compare(
        f"the same training, {STEPS} steps, by trainers that show the loss every "
        f"{DEMO.logging_steps}",
        ("pyvizllm.train, everything watched", lambda: train_with_ours(tmp_path, text)),
        {
            "transformers.Trainer": lambda: train_with_transformers(tmp_path, text),
            "lightning.Trainer": lambda: train_with_lightning(tmp_path, text),
        },
        rounds=9,
    )
