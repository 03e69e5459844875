"""Every rule, in a real small training in which its fault happens: what it says, and how soon."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_tasks import (
    Batch,
    class_loss,
    digit_batches,
    digits,
    evaluation,
    mlp,
    plain_loss,
    text_batches,
    tiny_gpt,
)
from steps_of import Fit, fit
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from pyvizllm.ops import CrossEntropyMetrics, cross_entropy
from pyvizllm.telemetry.records import STATISTICS

WIDTHS = (64, 64, 64, 10)


def spoilt(
    batches: Iterable[Batch], spoil: Callable[[Batch], Batch], steps: range = range(10**9)
) -> Iterator[Batch]:
    """The batches, those of some steps (from 1) spoilt."""
    for step, batch in enumerate(batches, 1):
        yield spoil(batch) if step in steps else batch


def shuffled_labels(batch: Batch) -> Batch:
    return batch[0], batch[1][torch.randperm(len(batch[1]))], batch[2]


def said(result: Fit, rule: str, severity: str, by: int) -> str:
    """The message of a rule, which must have come in time and as severe as it should be."""
    assert rule in result.rules("info"), result.rules("info")
    finding = result.of(rule)
    assert finding.severity == severity
    assert finding.step <= by
    assert finding.advice.endswith(".")
    return finding.message


def adamw(model: nn.Module, rate: float = 1e-3) -> AdamW:
    return AdamW(model.parameters(), lr=rate)


# -- Gradients over depth -----------------------------------------------------------------------


def test_sigmoids_in_ten_layers_make_gradients_vanish() -> None:
    model = mlp(64, *[64] * 9, 10, activation=nn.Sigmoid)
    result = fit(model, digit_batches(32), class_loss, SGD(model.parameters(), lr=0.1))
    message = said(result, "vanishing_gradients", "serious", by=32)
    assert "from 27 back to 0, 10 layers" in message
    # PyTorch's initialisation gives a Jacobian of about sqrt(1/3) / 4 = 1/7 a layer.
    evidence = result.of("vanishing_gradients").evidence
    assert 6 < evidence["decades"] < 9  # type: ignore[operator]
    first, last = model[0].weight, model[27].weight
    model.zero_grad()
    class_loss(model, next(digit_batches(1)))[0].backward()
    assert isinstance(first.grad, Tensor)
    assert isinstance(last.grad, Tensor)
    rms = [float(grad.pow(2).mean().sqrt()) for grad in (first.grad, last.grad)]
    assert evidence["first_layer_rms"] == pytest.approx(rms[0], rel=0.5)
    assert evidence["last_layer_rms"] == pytest.approx(rms[1], rel=0.5)


def test_chaotic_tanh_layers_make_gradients_explode() -> None:
    model = mlp(64, *[64] * 19, 10, activation=nn.Tanh)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("weight"):
                parameter.mul_(8)  # Poole et al. (2016): chaotic from a deviation of 1 upwards
    result = fit(model, digit_batches(32), class_loss, SGD(model.parameters(), lr=1e-6))
    assert "explode with depth" in said(result, "exploding_gradients", "warning", by=32)
    assert "vanishing_gradients" not in result.rules()


def test_gradients_that_grow_without_a_falling_loss() -> None:
    model = mlp(*WIDTHS)
    optimizer = SGD(model.parameters(), lr=1e-5)

    def scale_up(step: int) -> None:  # as a wrong weight decay, with the wrong sign, would
        if step > 64:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.04)

    result = fit(model, digit_batches(160), class_loss, optimizer, before_step=scale_up)
    message = said(result, "growing_gradients", "serious", by=160)
    (numbers,) = re.findall(r"from (\S+) in the first 64 steps to (\S+), (\S+) times", message)
    before, after, times = map(float, numbers)
    assert times == pytest.approx(after / before, rel=0.01)
    assert [f"{float(number):.3g}" for number in numbers] == list(numbers)


# -- Parameters ---------------------------------------------------------------------------------


def test_a_layer_of_relus_that_never_switch_on() -> None:
    model = mlp(*WIDTHS)
    with torch.no_grad():
        model[3].bias.fill_(-100.0)
    result = fit(model, digit_batches(64), class_loss, adamw(model))
    message = said(result, "dead_parameters", "serious", by=64)
    # Only the last bias still learns: what is behind the dead layer has no gradient, and the last
    # weights multiply zeros.
    assert "0.weight, 0.bias, 3.weight and 2 more has been exactly zero for 64 steps" in message
    assert "(5 of 6 parameters)" in message


def test_most_units_of_a_layer_off() -> None:
    model = mlp(*WIDTHS)
    with torch.no_grad():
        model[3].bias[:60] = -100.0
    result = fit(model, digit_batches(64), class_loss, adamw(model))
    message = said(result, "dead_units", "warning", by=64)
    assert "94 % of the units of 3.bias" in message
    assert message.endswith("in every one of the last 64 steps")
    assert "dead_parameters" not in result.rules()


def test_units_beside_a_nan_are_not_called_dead() -> None:
    model = mlp(64, *[64] * 5, 10)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10)
    result = fit(model, digit_batches(80), class_loss, SGD(model.parameters(), lr=0.01))
    table = result.diagnosis.history.table("grad", 50)[:, :, 1]  # of the first bias
    zeros, nans = (table[:, STATISTICS.index(name)] for name in ("zeros", "nans"))
    assert (nans > 0).all()
    assert zeros.min() > 0.9 * 64
    assert "non_finite" in result.rules()
    assert "dead_units" not in result.rules()


def test_a_module_that_forward_does_not_call() -> None:
    model = mlp(*WIDTHS)
    model[0].register_module("extra", nn.Linear(3, 3))
    result = fit(model, digit_batches(64), class_loss, adamw(model))
    message = said(result, "unused_parameters", "warning", by=64)
    assert message.startswith("0.extra.weight, 0.extra.bias require a gradient and have had none")
    assert result.rules() == ["unused_parameters"]


def test_a_layer_that_the_optimizer_does_not_have() -> None:
    model = mlp(*WIDTHS)
    trained = [p for name, p in model.named_parameters() if not name.startswith("0.")]
    result = fit(model, digit_batches(64), class_loss, AdamW(trained, lr=1e-3))
    message = said(result, "frozen_parameters", "warning", by=64)
    assert message.startswith(
        "0.weight, 0.bias have a gradient and have not changed between step 1"
    )
    assert result.rules() == ["frozen_parameters"]


# -- Learning rate ------------------------------------------------------------------------------


@pytest.mark.parametrize(("optimizer", "rate"), [(AdamW, 0.3), (AdamW, 3.0), (SGD, 10.0)])
def test_a_rate_that_replaces_the_weights(
    optimizer: type[torch.optim.Optimizer], rate: float
) -> None:
    model = mlp(*WIDTHS)
    batches = digit_batches(64)
    result = fit(model, batches, class_loss, optimizer(model.parameters(), lr=rate))  # type: ignore[call-arg]
    assert "it replaced what was there" in said(result, "learning_rate_too_high", "serious", by=32)


def test_a_rate_under_which_the_loss_does_not_fall() -> None:
    # Batches of one with a momentum of 0.9: each step is small enough, all together are not.
    model = mlp(*WIDTHS, seed=3)
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    result = fit(model, digit_batches(256, batch_size=1), class_loss, optimizer)
    message = said(result, "learning_rate_too_high", "info", by=256)
    assert "and the loss has not fallen" in message
    assert 0.01 < result.of("learning_rate_too_high").evidence["update_ratio"] < 0.9  # type: ignore[operator]


@pytest.mark.parametrize("task", ["gpt", "digits"])
def test_a_rate_that_changes_nothing(task: str) -> None:
    model: nn.Module
    if task == "gpt":
        model, batches = tiny_gpt(n_layer=2), text_batches(128, 4)
        optimizer: torch.optim.Optimizer = AdamW(model.parameters(), lr=1e-8)
    else:
        model, batches = mlp(*WIDTHS), digit_batches(128)
        optimizer = SGD(model.parameters(), lr=1e-5)
    result = fit(model, batches, class_loss, optimizer)
    said(result, "learning_rate_too_low", "serious", by=128)
    assert result.rules() == ["learning_rate_too_low"]  # and not that the labels are wrong


def test_a_rate_that_changes_nothing_and_decays_is_said_once() -> None:
    model = mlp(*WIDTHS)
    optimizer = adamw(model, 1e-7)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 150)
    result = fit(model, digit_batches(150), class_loss, optimizer, scheduler=cosine, chunk=10)
    assert result.rules() == ["learning_rate_too_low"]
    finding = result.of("learning_rate_too_low")
    assert (finding.severity, finding.step) == ("serious", 100)
    assert finding.advice.startswith("Raise the learning rate, by about 1,000 times;")
    # Adam's first step is the rate itself: by that of uniform weights, 1e-7 * 8 * sqrt(3).
    assert finding.evidence["update_ratio"] == pytest.approx(1.4e-6, rel=0.5)
    assert "0.1 % is usual" in finding.message
    assert "% at most" in finding.message


def test_sigmoids_that_vanish_need_no_higher_rate() -> None:
    model = mlp(64, *[64] * 9, 10, activation=nn.Sigmoid)
    result = fit(model, digit_batches(128), class_loss, SGD(model.parameters(), lr=0.01))
    ratios = result.diagnosis._ratios.latest
    assert ratios is not None
    assert np.median(ratios) < 1e-6
    assert result.rules() == ["vanishing_gradients"]


@pytest.mark.parametrize("given", [True, False])
def test_a_rate_of_zero(given: bool) -> None:
    def no_loss(model: nn.Module, batch: Batch) -> Tensor:
        loss = F.cross_entropy(model(batch[0]), batch[1])
        return loss - loss.detach() + torch.nan if not given else loss

    model = mlp(*WIDTHS)
    result = fit(model, digit_batches(128), no_loss, SGD(model.parameters(), lr=0.0))
    finding = result.of("learning_rate_too_low")
    assert finding.advice.startswith("Raise the learning rate from 0; look for")
    assert ("the loss has not fallen since" in finding.message) == given


# -- Losses -------------------------------------------------------------------------------------


def test_wrong_labels_for_six_steps_are_a_spike() -> None:
    model = mlp(*WIDTHS)
    wrong = spoilt(digit_batches(200), lambda b: (b[0], (b[1] + 1) % 10, b[2]), range(150, 156))
    result = fit(model, wrong, class_loss, adamw(model, 3e-3))
    assert "the loss leapt to" in said(result, "loss_spike", "warning", by=150)
    assert result.of("loss_spike").step == 150
    assert result.of("loss_spike").evidence["loss"] == pytest.approx(max(result.losses[149:155]))
    assert result.rules() == ["loss_spike"]  # it came back


def test_noise_instead_of_text_is_a_spike() -> None:
    def noise(batch: Batch) -> Batch:
        return torch.randint(256, batch[0].shape), torch.randint(256, batch[1].shape), batch[2]

    model = tiny_gpt(n_layer=2)
    batches = spoilt(text_batches(160, 4), noise, range(120, 126))
    result = fit(model, batches, class_loss, adamw(model, 3e-3))
    assert "the loss leapt to" in said(result, "loss_spike", "warning", by=120)
    assert result.of("loss_spike").step == 120


def test_a_rate_that_jumps_makes_it_diverge() -> None:
    model = mlp(*WIDTHS)
    optimizer = SGD(model.parameters(), lr=0.1)

    def jump(step: int) -> None:
        optimizer.param_groups[0]["lr"] = 30.0 if step >= 150 else 0.1

    result = fit(model, digit_batches(224), class_loss, optimizer, before_step=jump)
    message = said(result, "divergence", "serious", by=224)
    assert f"{np.median(result.losses[:32]):.4g} at the start" in message
    assert result.of("loss_spike").step == 151


def test_a_loss_at_the_noise_of_its_labels_is_a_plateau() -> None:
    generator = torch.Generator().manual_seed(0)

    def noisy(batch: Batch) -> Batch:  # six of ten labels are random: no model gets below that
        random = torch.randint(10, batch[1].shape, generator=generator)
        keep = torch.rand(len(batch[1]), generator=generator) < 0.4
        return batch[0], torch.where(keep, batch[1], random), batch[2]

    model = mlp(64, 10)
    batches = spoilt(digit_batches(700), noisy)
    result = fit(model, batches, class_loss, adamw(model, 1e-2))
    assert "the loss has stayed at" in said(result, "plateau", "info", by=700)
    assert "as it should be: change the learning rate, or" in result.of("plateau").advice
    assert result.rules() == []


def test_sixty_four_examples_are_learnt_by_heart() -> None:
    images, labels = digits()
    model = mlp(64, 128, 128, 10)
    unseen = evaluation(model, images[1400:], labels[1400:])
    batches = digit_batches(400, examples=64)
    result = fit(model, batches, class_loss, adamw(model, 3e-3), evaluate=unseen)
    message = said(result, "overfitting", "warning", by=400)
    assert message.startswith("eval/loss has risen from")
    best = result.of("overfitting").evidence["best_step"]
    assert best in (50, 100)
    assert result.rules() == ["overfitting"]


# -- NaN and 16 bits ----------------------------------------------------------------------------


class Root(nn.Module):
    """The square root of a square: 0 / 0 in the gradient of a blank image."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before = nn.Linear(64, 64)
        self.first, self.head = nn.Linear(64, 32, bias=False), mlp(32, 32, 10)

    def forward(self, x: Tensor) -> Tensor:
        blank = (x.sum(-1, keepdim=True) > 0).float()
        out: Tensor = self.head(self.first(self.before(x) * blank).pow(2).sqrt())
        return out


def test_a_nan_is_traced_to_the_parameter_the_batch_and_the_samples() -> None:
    batches = list(digit_batches(128, batch_size=16))
    images, labels, ids = batches[71]  # of step 18, the last of its four micro-batches
    batches[71] = torch.cat((images[:-1], torch.zeros(1, 64))), labels, ids
    model = Root()
    result = fit(model, batches, class_loss, adamw(model), accumulate=4)
    message = said(result, "non_finite", "serious", by=18)
    assert message.startswith(
        "the gradient of first.weight was the first that was not finite "
        "(flat index 0 = [0, 0]), of 3 that were not; it came with micro-batch 3, whose loss was "
    )
    assert f"samples {', '.join(map(str, ids[:8]))}, ..." in message
    evidence = result.of("non_finite").evidence
    assert (evidence["parameter"], evidence["flat_index"]) == ("first.weight", 0)
    assert result.of("non_finite").step == 18
    assert result.of("non_finite").advice.startswith("Go back to a checkpoint")  # a finite loss
    assert result.rules().count("non_finite") == 1  # once, though all that follows is NaN


def test_a_nan_in_the_data_is_a_loss_of_nan() -> None:
    def hole(batch: Batch) -> Batch:
        images = batch[0].clone()
        images[5, 20] = float("nan")
        return images, batch[1], batch[2]

    model = mlp(64, 32, 10)
    batches = spoilt(digit_batches(64, 8), hole, range(31, 32))
    result = fit(model, batches, class_loss, adamw(model), accumulate=4)
    message = said(result, "non_finite", "serious", by=8)
    assert message.startswith(
        "the loss was already nan, and the gradient of 3.bias was the first that was not finite "
        "(flat index 0), of 4 that were not; the loss of micro-batch 2 was nan; samples "
    )
    finding = result.of("non_finite")
    assert finding.step == 8
    assert finding.advice.startswith("Look at the inputs and targets of that batch first")
    assert finding.evidence["parameter"] == "3.bias"


@pytest.mark.parametrize("since", [1, 3])
def test_an_update_that_divides_by_zero(since: int) -> None:
    model = mlp(64, 32, 10)
    images, labels = digits()
    blank = images * (torch.arange(64) > 0)  # pixel 0 is always 0, and so is its weights' gradient
    batches = itertools.repeat((blank[:32], labels[:32]), 8)
    optimizer = AdamW(model.parameters(), lr=1e-3)

    def before_step(step: int) -> None:
        optimizer.param_groups[0]["eps"] = 0.0 if step >= since else 1e-8  # 0 / (sqrt(0) + 0)

    result = fit(model, batches, class_loss, optimizer, before_step=before_step)
    message = said(result, "non_finite", "serious", by=since)
    finding = result.of("non_finite")
    assert finding.step == since
    assert "inputs and targets" not in finding.advice
    if since == 1:  # nobody has seen the weights before
        assert message.startswith("0.weight is not finite, though all gradients are (")
        assert finding.advice.startswith("See how it was initialised or loaded")
    else:
        assert message.startswith("the update made 0.weight not finite, from finite gradients")
        assert "initialised" not in finding.advice


def test_a_small_loss_underflows_in_float16() -> None:
    def small(model: nn.Module, batch: Batch) -> tuple[Tensor, CrossEntropyMetrics]:
        loss, metrics = class_loss(model, batch)
        return 1e-4 * loss, metrics

    model = mlp(64, 64, 64, 64, 10)
    result = fit(model, digit_batches(32), small, adamw(model), autocast=torch.float16)
    message = said(result, "float16_underflow", "serious", by=32)
    assert "0.weight" in message
    gradient = model[0].weight.grad
    assert gradient is None  # cleared; the figures are those of the recording
    zeros = result.diagnosis.history.statistic("grad", "zeros")[:, 0] / (64 * 64)
    assert result.of("float16_underflow").evidence["zeros"] >= np.median(zeros)  # type: ignore[operator]

    for autocast, rate in ((torch.bfloat16, 1e-4), (None, 1e-4)):
        model = mlp(64, 64, 64, 64, 10)
        other = fit(model, digit_batches(32), small, adamw(model, rate), autocast=autocast)
        assert "float16_underflow" not in other.rules("info")


def test_updates_of_bfloat16_weights_that_round_to_nothing() -> None:
    model = tiny_gpt(n_layer=2).bfloat16()
    result = fit(model, text_batches(64, 4), class_loss, adamw(model, 1e-5))
    said(result, "lost_updates", "warning", by=64)
    # Of weights of deviation 0.02, those above 1e-5 * 512 = 0.005 stay: four of five.
    assert 0.7 < result.of("lost_updates").evidence["share"] < 0.95  # type: ignore[operator]

    model = tiny_gpt(n_layer=2).bfloat16()
    result = fit(model, text_batches(64, 4), class_loss, adamw(model, 1e-3))
    assert "lost_updates" not in result.rules("info")


def test_a_scaler_that_skips_every_step() -> None:
    model = mlp(*WIDTHS)
    with torch.no_grad():
        model[6].weight.mul_(1e7)  # logits beyond float16's 65504
    scaler = torch.amp.GradScaler("cpu")
    batches = digit_batches(64)
    result = fit(model, batches, class_loss, adamw(model), autocast=torch.float16, scaler=scaler)
    assert "24 of the last 24" in said(result, "skipped_steps", "serious", by=64)
    assert "non_finite" not in result.rules()  # it did no harm


# -- Clipping -----------------------------------------------------------------------------------


def test_a_limit_far_below_the_usual_norm() -> None:
    model = mlp(*WIDTHS)
    result = fit(model, digit_batches(224), class_loss, adamw(model), max_norm=0.01)
    message = said(result, "constant_clipping", "warning", by=224)
    assert message.startswith("100 % of the last 200 steps were clipped")
    norms = result.diagnosis.history.total_norm("grad", 200)
    ratio = result.of("constant_clipping").evidence["norm_over_limit"]
    assert ratio == pytest.approx(norms.mean() / 0.01)


def test_gradients_that_somebody_else_clipped_first() -> None:
    model = mlp(*WIDTHS)
    result = fit(model, digit_batches(224), class_loss, adamw(model), clip_before=0.01)
    message = said(result, "constant_clipping", "info", by=224)
    assert message.startswith("the gradients' norm was 0.01 in 100 % of the last 200 steps")


# -- Labels and predictions ---------------------------------------------------------------------


@pytest.mark.parametrize("classes", [None, 10])
def test_labels_shuffled_apart_from_their_inputs(classes: int | None) -> None:
    torch.manual_seed(0)
    model = mlp(*WIDTHS)
    batches = spoilt(digit_batches(448), shuffled_labels)
    result = fit(model, batches, class_loss, adamw(model), classes=classes)
    message = said(result, "loss_at_chance", "serious", by=448)
    how = "as given" if classes else "a dimension of the parameters, by the entropy"
    assert "log(10) = 2.303" in message
    assert how in message
    assert result.rules() == ["loss_at_chance"]


@pytest.mark.parametrize("classes", [None, 10])
def test_labels_shuffled_apart_where_only_the_loss_is_known(classes: int | None) -> None:
    torch.manual_seed(0)
    model = mlp(*WIDTHS)
    batches = spoilt(digit_batches(448), shuffled_labels)
    result = fit(model, batches, plain_loss, adamw(model, 2e-3), classes=classes)
    message = said(result, "loss_at_chance", "serious" if classes else "warning", by=448)
    how = "as given" if classes else "the rows of 6.weight, if the loss is a cross-entropy"
    assert message.endswith(f"log(10) = 2.303 (number of classes: {how})")
    assert result.rules() == ["loss_at_chance"]


@pytest.mark.parametrize("task", ["gpt", "digits"])
def test_softmax_before_a_loss_that_applies_it(task: str) -> None:
    def twice(model: nn.Module, batch: Batch) -> tuple[Tensor, CrossEntropyMetrics]:
        return class_loss(lambda inputs: model(inputs).softmax(-1), batch)  # type: ignore[arg-type]

    model: nn.Module = mlp(*WIDTHS)
    batches, classes, floor = digit_batches(192), 10, "1.461"
    if task == "gpt":
        model, batches, classes, floor = tiny_gpt(n_layer=1), text_batches(192, 4), 256, "4.552"
    result = fit(model, batches, twice, adamw(model, 3e-3))
    message = said(result, "probabilities_as_logits", "warning", by=160)
    assert f"as it is of {classes} probabilities" in message
    assert f"no loss below {floor} can be reached" in message
    assert result.rules() == ["probabilities_as_logits"]


def test_a_loss_with_the_wrong_sign() -> None:
    def negative(model: nn.Module, batch: Batch) -> Tensor:
        return -plain_loss(model, batch)

    model = mlp(*WIDTHS)
    result = fit(model, digit_batches(128), negative, adamw(model))
    message = said(result, "wrong_sign", "serious", by=128)
    assert message.startswith("the loss falls faster and faster below 0: -2.3")
    assert result.rules() == ["wrong_sign"]


def test_inputs_that_are_all_zero_give_one_prediction_for_all() -> None:
    def blank(batch: Batch) -> Batch:  # and 70 % of the labels are a 3
        return batch[0] * 0, batch[1].clamp(max=3), batch[2]

    model = mlp(*WIDTHS)
    result = fit(model, spoilt(digit_batches(384), blank), class_loss, adamw(model))
    message = said(result, "constant_predictions", "info", by=384)
    accuracy = result.of("constant_predictions").evidence["accuracy"]
    assert accuracy == pytest.approx(0.7, abs=0.05)
    assert "the model predicts the same for every input" in message


def test_predictions_that_are_sure_and_wrong() -> None:
    model = mlp(*WIDTHS)
    torch.manual_seed(0)
    batches = spoilt(digit_batches(64), shuffled_labels)
    result = fit(model, batches, class_loss, adamw(model, 1.0))
    assert "have collapsed" in said(result, "entropy_collapse", "serious", by=32)


def test_targets_that_are_nearly_all_ignored() -> None:
    torch.manual_seed(0)

    def mask(batch: Batch) -> Batch:
        counted = torch.rand(batch[1].shape) < 0.02
        return batch[0], torch.where(counted, batch[1], -100), batch[2]

    def loss_of(model: nn.Module, batch: Batch) -> tuple[Tensor, CrossEntropyMetrics]:
        loss, metrics = cross_entropy(
            model(batch[0]), batch[1], reduction="sum", return_metrics=True
        )
        return loss / metrics.tokens.clamp(min=1), metrics

    model = mlp(64, 32, 10)
    result = fit(model, spoilt(digit_batches(64), mask), loss_of, adamw(model))
    assert "had no target that counts" in said(result, "ignored_targets", "warning", by=64)
    assert result.of("ignored_targets").evidence["counted"] == pytest.approx(0.02, abs=0.02)


def test_a_gpt_whose_targets_have_nothing_to_do_with_its_text() -> None:
    torch.manual_seed(0)

    def noise(batch: Batch) -> Batch:
        return batch[0], torch.randint(256, batch[1].shape), batch[2]

    model = tiny_gpt()
    result = fit(model, spoilt(text_batches(256, 4), noise), class_loss, adamw(model))
    assert "log(256) = 5.545" in said(result, "loss_at_chance", "serious", by=256)
    assert result.rules() == ["loss_at_chance"]


# -- Data ---------------------------------------------------------------------------------------


def test_twenty_batches_again_and_again() -> None:
    model = tiny_gpt(n_layer=1)
    batches = itertools.islice(itertools.cycle(list(text_batches(20, 4))), 256)
    result = fit(model, batches, class_loss, adamw(model))
    assert "every 20 steps" in said(result, "repeated_losses", "warning", by=256)


def test_epochs_without_shuffling() -> None:
    model = mlp(64, 64, 10)
    batches = digit_batches(256, 32, shuffle=False)
    result = fit(model, batches, plain_loss, adamw(model))
    assert "every 43 steps" in said(result, "repeated_losses", "warning", by=256)  # 1400 // 32


def test_workers_that_all_read_the_same() -> None:
    model = mlp(64, 64, 10)
    thrice = (batch for batch in digit_batches(40) for _ in range(3))
    result = fit(model, thrice, class_loss, adamw(model))
    assert "had been used just before" in said(result, "repeated_samples", "warning", by=96)
    assert result.of("repeated_samples").evidence["share"] == pytest.approx(2 / 3, abs=0.05)


def test_the_findings_do_not_depend_much_on_how_steps_are_handed_over() -> None:
    for chunk in (1, 7, 64):
        model = mlp(64, *[64] * 9, 10, activation=nn.Sigmoid)
        optimizer = SGD(model.parameters(), lr=0.1)
        result = fit(model, digit_batches(64), class_loss, optimizer, chunk=chunk)
        assert result.rules() == ["vanishing_gradients"]
        first = min(10, chunk) if chunk < 10 else chunk
        assert result.of("vanishing_gradients").step <= max(14, first)


def test_mean_squares_have_no_classes() -> None:
    model = mlp(64, 64, 10)

    def squares(model: nn.Module, batch: Batch) -> Tensor:
        return F.mse_loss(model(batch[0]), F.one_hot(batch[1], 10).float())

    result = fit(model, spoilt(digit_batches(448), shuffled_labels), squares, adamw(model))
    assert "loss_at_chance" not in result.rules("info")
    assert "constant_predictions" not in result.rules("info")
