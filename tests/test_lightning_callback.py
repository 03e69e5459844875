"""A Trainer of Lightning's with a watch."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch
from torch import nn

import pyvizllm

pl = pytest.importorskip("lightning.pytorch")

from pyvizllm.integrations.lightning import WatchCallback, shown  # noqa: E402
from pyvizllm.telemetry import load_flight, read_history  # noqa: E402
from pyvizllm.telemetry.descriptions import STAGE_TAG  # noqa: E402

# Lightning's advice on loaders, and what it calls in torch that is deprecated.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(does not have many workers|have no `val_dataloader`|number of training batches)",
    "ignore:.*LeafSpec",
)


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


class Module(pl.LightningModule):
    """Notes what it should be that a watch shows: of each batch, and of each validation."""

    def __init__(self, width=4, optimizer=torch.optim.SGD):
        super().__init__()
        self.save_hyperparameters(ignore="optimizer")
        self.net, self.optimizer = nn.Linear(width, 1), optimizer
        self.losses, self.norms, self.by_value, self.evaluations = [], [], [], []

    def training_step(self, batch, index):
        loss = (self.net(batch) - batch.sum(1, keepdim=True)).square().mean()
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.losses.append(loss.item())
        return loss

    def on_before_optimizer_step(self, optimizer):
        gradients = torch.cat([p.grad.flatten() for p in self.parameters()])
        self.log("norm", gradients.norm())
        self.norms.append(gradients.norm().item())
        self.by_value.append(gradients.clamp(-0.5, 0.5).norm().item())

    def on_train_batch_end(self, *_):
        self.log("batches", float(len(self.losses)))

    def on_train_epoch_end(self):
        self.log("epochs", float(self.current_epoch + 1))

    def validation_step(self, batch, index):
        loss = self.net(batch).square().mean()
        self.log("val_loss", loss, on_step=True, on_epoch=True)
        self.log("magnitude", loss.sqrt())
        if not self.trainer.sanity_checking:
            self.evaluations.append((len(self.norms), loss.item()))

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=0.01)


def loader():
    torch.manual_seed(0)
    return torch.utils.data.DataLoader(torch.randn(16, 4), batch_size=2)


def trainer(folder, callback, **options):
    options = {"max_epochs": 1, "enable_checkpointing": False, "limit_val_batches": 1, **options}
    return pl.Trainer(
        default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callback], **options,
    )  # fmt: skip


def fit(folder, module=None, **options):
    """The module, and the scalars of each step."""
    module = module or Module()
    callback = WatchCallback(folder / "run", every=1, histograms=())
    trainer(folder, callback, **options).fit(module, loader(), loader())
    assert "closed" in repr(callback.watch)
    return module, scalars_of(folder)


def scalars_of(folder):
    """Of each step; step 0 has the settings alone."""
    entries = read_history(folder / "run")
    return {entry["step"]: entry["scalars"] for entry in entries if entry["step"]}


def stage_of(folder):
    return {text for e in read_history(folder / "run") for t, text in e["texts"].items()
            if t == STAGE_TAG}  # fmt: skip


def of(history, name):
    return {step: scalars[name] for step, scalars in history.items() if name in scalars}


def test_every_step_and_validation_is_shown(tmp_path):
    module, history = fit(tmp_path, max_epochs=2, val_check_interval=4)
    assert list(history) == list(range(1, 17))
    assert of(history, "train/loss") == pytest.approx(dict(enumerate(module.losses, 1)))
    assert of(history, "train/grad_norm") == pytest.approx(dict(enumerate(module.norms, 1)))
    assert of(history, "train/norm") == pytest.approx(of(history, "train/grad_norm"))
    assert of(history, "train/batches") == {step: float(step) for step in range(1, 17)}
    assert of(history, "train/epochs") == {8: 1.0, 16: 2.0}
    means = {8: sum(module.losses[:8]) / 8, 16: sum(module.losses[8:]) / 8}
    assert of(history, "train/loss_epoch") == pytest.approx(means)
    assert [step for step, _ in module.evaluations] == [4, 8, 12, 16]
    assert of(history, "val/loss") == pytest.approx(dict(module.evaluations))
    roots = {step: loss**0.5 for step, loss in module.evaluations}
    assert of(history, "val/magnitude") == pytest.approx(roots)
    tags = {tag for scalars in history.values() for tag in scalars}
    assert {tag for tag in tags if tag.startswith("val/")} == {"val/loss", "val/magnitude"}
    assert stage_of(tmp_path) == {"as the optimizer got them, after any clipping"}


def test_a_step_shows_the_mean_of_the_batches_it_accumulates(tmp_path):
    module, history = fit(tmp_path, accumulate_grad_batches=3, val_check_interval=4)
    means = {1: (0, 3), 2: (3, 6), 3: (6, 8)}  # the epoch's last step has two
    means = {step: sum(module.losses[a:b]) / (b - a) for step, (a, b) in means.items()}
    assert of(history, "train/loss") == pytest.approx(means)
    assert of(history, "train/batches") == pytest.approx({1: 2.0, 2: 5.0, 3: 7.5})
    # In the middle of a step: of the parameters as the step before has left them.
    assert of(history, "val/loss") == pytest.approx(dict(module.evaluations))
    assert [step for step, _ in module.evaluations] == [1, 3]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_are_those_before_clipping(tmp_path, precision):
    module, history = fit(tmp_path, gradient_clip_val=0.5, precision=precision)
    assert min(module.norms) > 0.5
    assert of(history, "train/grad_norm") == pytest.approx(dict(enumerate(module.norms, 1)))
    assert of(history, "train/clipped") == dict.fromkeys(range(1, 9), 1.0)
    assert stage_of(tmp_path) == {"before clipping"}


class Clips(Module):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, **_):
        torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val / 2)


@pytest.mark.parametrize(
    ("module", "algorithm", "norms"),
    [
        (lambda: Module(optimizer=pyvizllm.AdamW), "norm", [0.5, 0.5]),
        (Clips, "norm", [0.25, 0.25]),
        (Module, "value", None),
    ],
    ids=["measured by the optimizer", "by the module", "by value"],
)
def test_other_gradients_are_those_after_clipping(tmp_path, module, algorithm, norms):
    module, history = fit(
        tmp_path, module(), gradient_clip_val=0.5, gradient_clip_algorithm=algorithm, max_steps=2
    )
    assert min(module.norms) > 0.5
    norms = norms or module.by_value
    assert of(history, "train/grad_norm") == pytest.approx(dict(enumerate(norms, 1)), rel=1e-4)
    assert not of(history, "train/clipped")
    assert stage_of(tmp_path) == {"as the optimizer got them, after any clipping"}


class Several(Module):
    """Two optimizers, of which the second steps in every second batch."""

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(4, 1)
        self.automatic_optimization = False

    def training_step(self, batch, index):
        first, second = self.optimizers()
        for optimizer, net in ((first, self.net), (second, self.other)):
            if optimizer is first or index % 2 == 1:
                loss = net(batch).square().mean()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
                self.log("loss" if optimizer is first else "other_loss", loss)
        self.losses.append(float(self.trainer.logged_metrics["loss"]))

    def on_before_optimizer_step(self, optimizer):
        pass

    def configure_optimizers(self):
        return [torch.optim.SGD(net.parameters(), lr=0.01) for net in (self.net, self.other)]


def test_several_optimizers_step_by_hand(tmp_path):
    module, history = fit(tmp_path, Several(), max_epochs=2, limit_val_batches=0)
    assert list(history) == list(range(1, 17))
    assert of(history, "train/loss") == pytest.approx(dict(enumerate(module.losses, 1)))
    assert list(of(history, "train/other_loss")) == list(range(2, 17, 2))
    assert list(of(history, "grad_norm/other.weight")) == list(range(2, 17, 2))


@pytest.mark.parametrize("module", [Module, Several])
def test_a_training_goes_on_from_a_checkpoint(tmp_path, module):
    callback = WatchCallback(tmp_path / "run", every=1)
    first = trainer(tmp_path, callback)
    first.fit(module(), loader(), loader())
    first.save_checkpoint(tmp_path / "checkpoint")
    again = WatchCallback(tmp_path / "run", every=1)
    path, data = str(tmp_path / "checkpoint"), loader()
    trainer(tmp_path, again, max_epochs=2).fit(module(), data, data, ckpt_path=path)
    assert callback.watch.step == 8
    assert again.watch.step == 16
    assert list(scalars_of(tmp_path)) == list(range(1, 17))


@pytest.mark.parametrize("module", [Module, Several])
def test_a_second_fit_goes_on(tmp_path, module):
    callback, trained = WatchCallback(tmp_path / "run", every=1), module()
    training = trainer(tmp_path, callback)
    training.fit(trained, loader(), loader())
    training.fit_loop.max_epochs = 2
    training.fit(trained, loader(), loader())
    assert list(scalars_of(tmp_path)) == list(range(1, 17))


class Fails(Module):
    def training_step(self, batch, index):
        if index == 5:
            raise RuntimeError("no loss")
        return super().training_step(batch, index)


def test_an_exception_closes_and_dumps(tmp_path):
    with pytest.raises(RuntimeError, match="no loss"):
        fit(tmp_path, Fails())
    assert list(of(scalars_of(tmp_path), "train/loss")) == [1, 2, 3, 4, 5]
    (dump,) = (tmp_path / "run" / "flight").iterdir()
    assert load_flight(dump).reason == "exception: RuntimeError"


def test_what_is_no_training_is_not_shown(tmp_path):
    callback, module = WatchCallback(tmp_path / "run", every=1), Module()
    evaluated = trainer(tmp_path, callback)
    evaluated.validate(module, loader(), verbose=False)
    assert callback.watch is None
    evaluated.fit(module, loader())
    history = scalars_of(tmp_path)
    evaluated.validate(module, loader(), verbose=False)
    assert scalars_of(tmp_path) == history


def test_settings_are_the_modules(tmp_path):
    fit(tmp_path, max_steps=1)
    texts = {t: text for e in read_history(tmp_path / "run") for t, text in e["texts"].items()}
    assert texts["config"] == '    {\n      "width": 4\n    }'


def test_what_is_shown_of_the_logs():
    names = ("train_loss", "train_loss_step", "time_step", "acc", "test/acc", "val_loss_epoch")
    values = {name: torch.tensor(float(i)) for i, name in enumerate(names)}
    tags = ("train/loss", "train/loss", "time_step", "acc", "test/acc", "val/loss_epoch")
    assert list(shown(values, names)) == list(dict.fromkeys(tags))
    del values["train_loss"], values["train_loss_step"]
    evaluated = shown(values, (*names, "val_loss"), evaluated=True)
    assert list(evaluated) == ["val/time_step", "val/acc", "test/acc", "val/loss"]
    loaders = {"val_loss_epoch/dataloader_idx_1": torch.ones(()), "val_loss_step": torch.ones(())}
    known = ("val_loss/dataloader_idx_1", "val_loss_epoch/dataloader_idx_1")
    assert list(shown(loaders, known, evaluated=True)) == ["val/loss/dataloader_idx_1"]


def test_options_are_those_of_watch(tmp_path):
    wrong = trainer(tmp_path, WatchCallback(tmp_path / "run", every=0))
    with pytest.raises(ValueError, match="watch: expected every"):
        wrong.fit(Module(), loader())


OF_EITHER_PACKAGE = """
import sys
{before}
from pyvizllm.integrations.lightning import WatchCallback
print(*[b.__module__.partition(".")[0] for b in WatchCallback.__mro__[1:2]])
"""
HIDDEN = "sys.modules.update({name: None for name in ('lightning', 'pytorch_lightning')})"


@pytest.mark.parametrize(
    ("before", "said"),
    [
        ("", "lightning"),
        ("import pytorch_lightning", "pytorch_lightning"),
        ("sys.modules['lightning'] = None", "pytorch_lightning"),
        (HIDDEN, "expected the package lightning or pytorch_lightning, got neither"),
    ],
    ids=["lightning", "the one in use", "the one there is", "neither"],
)
def test_either_package_will_do(before, said):
    program = OF_EITHER_PACKAGE.replace("{before}", before)
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=120
    )
    assert said in ran.stderr if before == HIDDEN else [said] == ran.stdout.split()
