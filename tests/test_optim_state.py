"""AdamW as an optimizer of torch: state, copies, schedulers, scalers, errors, and the operator."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from test_optim import assert_equal, copies, gradients_of, make_parameters, run, set_gradients
from torch.nn import Parameter

from pyvizllm import AdamW
from pyvizllm.ops import BINS
from pyvizllm.ops.adamw import AdamWLists, adamw_

SIZES = ((3,), (0,), (31, 67), (5000,))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(59)


FORMS: dict[str, dict[str, Any]] = {
    "foreach": {"foreach": True},
    "loop": {"foreach": False},
    "fused": {"fused": True},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_state_goes_to_torch_and_back(form, amsgrad, generator):
    """Continued by the other one, each is where it would have been, but for rounding."""
    parameters = make_parameters(generator, sizes=SIZES)
    theirs = copies(parameters)
    options = {"lr": 0.01, "amsgrad": amsgrad}
    ours, torchs = AdamW(parameters, **options), torch.optim.AdamW(theirs, **options, **FORMS[form])
    run([ours, torchs], generator, 5)
    assert ours.state_dict().keys() == torchs.state_dict().keys()
    for mine, other in zip(ours.state.values(), torchs.state.values(), strict=True):
        assert list(mine) == list(other)
    assert ours.param_groups[0].keys() == torchs.param_groups[0].keys()

    swapped, back = copies(parameters), copies(theirs)
    to_torch = torch.optim.AdamW(swapped, **options, **FORMS[form])
    to_ours = AdamW(back, **options)
    to_torch.load_state_dict(copy.deepcopy(ours.state_dict()))
    to_ours.load_state_dict(copy.deepcopy(torchs.state_dict()))
    for p, q in zip(theirs, back, strict=True):
        for name, value in torchs.state[p].items():
            assert torch.equal(value, to_ours.state[q][name])
    run([ours, torchs, to_torch, to_ours], generator, 5)
    for lists in zip(parameters, theirs, swapped, back, strict=True):
        for other in lists[1:]:
            torch.testing.assert_close(lists[0], other, rtol=1e-5, atol=1e-6)
    for optimizer in (ours, torchs, to_torch, to_ours):
        assert all(state["step"] == 10 for state in optimizer.state.values())


@pytest.mark.parametrize("through", ["state_dict", "file", "pickle", "deepcopy"])
def test_continues_exactly_from_a_copy(through, generator):
    parameters = make_parameters(generator, torch.bfloat16, sizes=SIZES)
    options = {"moments_dtype": torch.float32, "master_weights": True, "max_grad_norm": 0.1}
    optimizer = AdamW(parameters, lr=1e-4, **options)
    run([optimizer], generator, 3)
    others = copies(parameters)
    if through in ("state_dict", "file"):
        state = optimizer.state_dict()
        if through == "file":
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file)
        second = AdamW(others, lr=1.0, **options)
        second.load_state_dict(copy.deepcopy(state))
    else:
        second = (
            copy.deepcopy(optimizer)
            if through == "deepcopy"
            else pickle.loads(pickle.dumps(optimizer))
        )
        others = second.param_groups[0]["params"]
        assert second.max_grad_norm == 0.1
        second.collect()
    for p, q in zip(parameters, others, strict=True):
        assert optimizer.state[p]["exp_avg"].dtype == torch.float32
        for name, value in optimizer.state[p].items():
            assert torch.equal(value, second.state[q][name])
            assert value.dtype == second.state[q][name].dtype
    run([optimizer, second], generator, 3)
    assert_equal(parameters, others)


def test_precision_of_the_loaded_state_is_the_optimizers_own(generator):
    """torch would cast float32 moments to bfloat16, and lose the small ones' digits."""
    parameters = make_parameters(generator, torch.bfloat16, sizes=((100,),))
    precise = AdamW(parameters, moments_dtype=torch.float32, master_weights=True)
    run([precise], generator, 2)
    plain = AdamW(copies(parameters))
    plain.load_state_dict(precise.state_dict())
    (state,) = plain.state.values()
    assert state["exp_avg"].dtype == torch.bfloat16
    assert "master" not in state
    run([plain], generator, 1)
    again = AdamW(copies(parameters), moments_dtype=torch.float32, master_weights=True)
    theirs = torch.optim.AdamW(copies(parameters))
    run([theirs], generator, 2)
    again.load_state_dict(theirs.state_dict())
    (state,) = again.state.values()
    assert state["exp_avg"].dtype == torch.float32
    assert torch.equal(state["exp_avg"], next(iter(theirs.state.values()))["exp_avg"].float())
    run([again], generator, 1)
    assert state["exp_avg"].dtype == state["master"].dtype == torch.float32


def test_master_weights_take_steps_too_small_for_bfloat16(generator):
    """100 steps of 1e-5 on a weight of 1, where bfloat16 has nothing between 1 and 1 - 0.0039."""
    start = torch.ones(1000, dtype=torch.bfloat16)
    with_master, without = Parameter(start.clone()), Parameter(start.clone())
    exact = Parameter(start.double())
    options = {"lr": 1e-4, "weight_decay": 0.0}
    optimizers = [
        AdamW([with_master], **options, master_weights=True, moments_dtype=torch.float32),
        AdamW([without], **options, moments_dtype=torch.float32),
        torch.optim.AdamW([exact], **options),
    ]
    for _ in range(100):
        grad = (torch.rand(1000, generator=generator) + 0.5).bfloat16()
        set_gradients([with_master], [grad])
        set_gradients([without], [grad])
        set_gradients([exact], [grad])
        for optimizer in optimizers:
            optimizer.step()
    master = optimizers[0].state[with_master]["master"]
    torch.testing.assert_close(master.double(), exact.detach(), rtol=1e-6, atol=0)
    assert torch.equal(with_master, master.bfloat16())
    assert torch.equal(without, start)


def test_moments_of_float32_gradients_and_bfloat16_parameters(generator):
    """Against the same in float64, from the same gradients, to float32's rounding."""
    for amsgrad in (False, True):
        parameter = Parameter(torch.randn(1027, generator=generator).bfloat16())
        exact = Parameter(parameter.detach().double())
        options = {"lr": 0.01, "amsgrad": amsgrad}
        optimizer = AdamW([parameter], **options, moments_dtype=torch.float32, master_weights=True)
        reference = torch.optim.AdamW([exact], **options)
        run([optimizer, reference], generator, 20)
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if amsgrad else 2]:
            torch.testing.assert_close(
                optimizer.state[parameter][name].double(),
                reference.state[exact][name],
                rtol=1e-5,
                atol=1e-8,
            )


def test_learning_rate_schedulers_and_groups(generator):
    parameters = make_parameters(generator, sizes=SIZES)
    theirs = copies(parameters)
    optimizers = [AdamW(parameters[:2], lr=0.1), torch.optim.AdamW(theirs[:2], lr=0.1)]
    for optimizer, tensors in zip(optimizers, (parameters, theirs), strict=True):
        optimizer.add_param_group({"params": tensors[2:], "weight_decay": 0.5})
    assert isinstance(optimizers[0], torch.optim.AdamW)
    schedulers = [torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.3) for o in optimizers]
    for _ in range(6):
        run(optimizers, generator, 1)
        for scheduler in schedulers:
            scheduler.step()
    assert optimizers[0].param_groups[1]["lr"] == pytest.approx(0.1 * 0.3**3)
    for p, q in zip(parameters, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_grad_scaler(generator):
    """On the CPU: scales, skips the step with an Inf, and halves the scale."""
    parameters = make_parameters(generator, sizes=SIZES)
    plain = copies(parameters)
    optimizer, reference = AdamW(parameters), AdamW(plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    scaler.scale(torch.ones(()))
    for step in range(4):
        grads = gradients_of(parameters, generator)
        set_gradients(parameters, [g * scaler.get_scale() for g in grads])
        if step == 2:
            parameters[3].grad[7] = torch.inf
        else:
            set_gradients(plain, grads)
            reference.step()
        scaler.step(optimizer)
        scaler.update()
        assert_equal(parameters, plain)
    assert scaler.get_scale() == 512.0
    assert optimizer.state[parameters[0]]["step"] == 3


def test_closure_hooks_and_gradient_mode(generator):
    parameter = Parameter(torch.ones(3))
    optimizer = AdamW([parameter], lr=0.1)
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(1))

    def closure():
        optimizer.zero_grad()
        loss = (parameter**2).sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    second = optimizer.step(closure)
    assert first.item() == 3.0 > second.item()
    assert seen == [1, 1]
    assert parameter.requires_grad
    assert parameter.is_leaf


def test_compiled(generator):
    parameters = make_parameters(generator, sizes=((5,), (40,)))
    plain = copies(parameters)
    optimizer, reference = AdamW(parameters), AdamW(plain)
    compiled = torch.compile(optimizer.step, backend="eager")
    for _ in range(3):
        grads = gradients_of(parameters, generator)
        set_gradients(parameters, grads)
        set_gradients(plain, grads)
        compiled()
        reference.step()
    assert_equal(parameters, plain)


def test_what_the_kernels_cannot_do_is_left_to_torch(generator):
    """Complex parameters beside others, and a differentiable step."""
    parameters = [*make_parameters(generator, sizes=((5,),)), Parameter(torch.ones(3) * (1 + 2j))]
    theirs = copies(parameters)
    optimizers = [AdamW(parameters, lr=0.1), torch.optim.AdamW(theirs, lr=0.1)]
    for _ in range(3):
        for tensors in (parameters, theirs):
            tensors[0].grad = torch.full((5,), 0.5)
            tensors[1].grad = torch.full((3,), 1 - 1j)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(parameters[0], theirs[0])
    assert torch.equal(parameters[1], theirs[1])

    lr = torch.tensor(0.1, requires_grad=True)
    weight = torch.ones(3, requires_grad=True).clone()
    weight.grad = torch.ones(3)
    AdamW([weight], lr=lr, differentiable=True).step()
    weight.sum().backward()
    assert lr.grad == pytest.approx(-3.03, rel=1e-3)  # the step of 1, and the decay of 0.01


def lists_of(parameter: torch.Tensor) -> AdamWLists:
    zeros = torch.zeros_like
    return AdamWLists(
        [parameter],
        [torch.ones_like(parameter)],
        [zeros(parameter)],
        [zeros(parameter)],
        steps=[torch.zeros(())],
    )


def test_operator_keeps_torchs_contract(generator):
    numbers = (0.9, 0.99, 1e-8, 0.1, False)
    operator = torch.ops.pyvizllm.adamw_.default
    for statistics in (False, True):
        tensors = [torch.randn(n, generator=generator) for n in (10, 30)]

        def like(tensors: list[torch.Tensor] = tensors) -> list[torch.Tensor]:
            return [torch.rand_like(t) for t in tensors]

        steps = [torch.zeros(()) for _ in tensors]
        histogram = torch.zeros(2, BINS, dtype=torch.int64) if statistics else None
        arguments = (tensors, like(), like(), like(), like(), [], steps, torch.tensor(0.1), 0.0)
        scalars = (torch.tensor(2.0), torch.tensor(0.0), torch.tensor(0.5, dtype=torch.float64))
        torch.library.opcheck(
            operator, (*arguments, *numbers, *scalars, statistics, histogram, None)
        )


OPTIONS = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "maximize": False}


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        ({"grads": []}, "adamw_: expected 1 grads, one a parameter, got 0"),
        ({"steps": [torch.zeros(2)]}, "expected a step of one Float at position 0, got 2 of Float"),
        ({"steps": [torch.zeros((), dtype=torch.int64)]}, "a step of one Float .* got 1 of Long"),
        ({"exp_avgs": [torch.zeros(3)]}, "expected exp_avg of 2 elements at position 0, got 3"),
        (
            {"grads": [torch.zeros(2).bfloat16()]},
            "expected grad of the parameter's dtype Float at position 0, got BFloat16",
        ),
        ({"exp_avg_sqs": [torch.zeros(2).double()]}, "of one dtype at position 0"),
        ({"masters": [torch.zeros(2)]}, "expected masters of Float, of BFloat16 or Half"),
        (
            {name: [torch.zeros(2).half()] for name in ("params", "exp_avgs", "exp_avg_sqs")},
            "expected exp_avg of Float .* a grad of Float and a parameter of Half at position 0",
        ),
        ({"params": []}, "expected at least one parameter, got an empty list"),
    ],
)
def test_operators_errors_are_sentences(broken, sentence):
    lists = lists_of(torch.ones(2))
    for name, value in broken.items():
        setattr(lists, name, value)
    before = [t.clone() for t in lists.params]
    with pytest.raises(RuntimeError, match=sentence):
        torch.ops.pyvizllm.adamw_(
            *vars(lists).values(),
            None,
            0.1,
            0.9,
            0.9,
            1e-8,
            0.0,
            False,
            *[None] * 3,
            False,
            None,
            None,
        )
    assert all(torch.equal(a, b) for a, b in zip(before, lists.params, strict=True))


@pytest.mark.parametrize(
    ("scalars", "sentence"),
    [
        ({"found_inf": torch.zeros(2)}, "expected found_inf to be one element of Float, got 2"),
        ({"clip_coefficient": torch.ones(())}, "clip_coefficient to be one element of Double"),
        ({"update_histogram": torch.zeros(1, 9)}, r"int64 tensor of shape \[1, 4096\]"),
    ],
)
def test_operators_scalars_are_checked(scalars, sentence):
    with pytest.raises(RuntimeError, match=f"adamw_: .*{sentence}"):
        adamw_(lists_of(torch.ones(2)), OPTIONS, **scalars)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"betas": (1.0, 0.9)}, "Invalid beta parameter at index 0: 1.0"),
        ({"max_grad_norm": -1.0}, "AdamW: expected max_grad_norm >= 0 or None, got -1.0"),
        ({"max_grad_norm": float("nan")}, "AdamW: expected max_grad_norm >= 0 or None, got nan"),
        (
            {"moments_dtype": torch.float64},
            "AdamW: expected moments_dtype torch.float32 or None, got torch.float64",
        ),
    ],
)
def test_errors_are_sentences(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        AdamW([Parameter(torch.ones(2))], **arguments)


def test_sparse_gradients_raise_as_in_torch():
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        AdamW(embedding.parameters()).step()


def test_an_empty_first_group_and_an_empty_state_load_as_in_torch(generator):
    parameters = make_parameters(generator, sizes=((5,),))
    optimizer = AdamW([{"params": []}, {"params": parameters}], skip_nonfinite=True)
    assert optimizer.skipped_steps == 0
    run([optimizer], generator, 1)
    saved = optimizer.state_dict()
    saved["state"][0] = {}
    optimizer.load_state_dict(saved)
    torch.optim.AdamW([{"params": []}, {"params": parameters}]).load_state_dict(saved)
    run([optimizer], generator, 1)
    assert optimizer.state[parameters[0]]["step"] == 1


def test_a_backward_over_parameters_from_before_the_step_raises(generator):
    """As after torch's step: the saved parameter is no longer what the forward used."""
    (parameter,) = make_parameters(generator, sizes=((5,),))
    optimizer = AdamW([parameter])
    loss = (parameter * parameter).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_load_hooks_of_the_user_come_last(generator):
    (parameter,) = parameters = make_parameters(generator, sizes=((5,),))
    optimizer = AdamW(parameters)
    run([optimizer], generator, 1)
    saved = optimizer.state_dict()
    other = AdamW(copies(parameters))
    other.register_load_state_dict_post_hook(
        lambda loaded: [state["exp_avg"].zero_() for state in loaded.state.values()]
    )
    other.load_state_dict(saved)
    (state,) = other.state.values()
    assert not state["exp_avg"].any()
    assert state["exp_avg_sq"].all()
    assert parameter.shape == (5,)


def test_a_state_of_another_shape_is_refused(generator):
    optimizer = AdamW(make_parameters(generator, sizes=((4, 8),)))
    run([optimizer], generator, 1)
    turned = AdamW(make_parameters(generator, sizes=((8, 4),)))
    with pytest.raises(ValueError, match=r"expected exp_avg of shape \[8, 4\], got \[4, 8\]"):
        turned.load_state_dict(optimizer.state_dict())


def test_an_assigned_parameter_is_its_own_master(generator):
    """Also after a round trip through torch's AdamW, which keeps "master" and steps without it."""
    options = {"master_weights": True, "moments_dtype": torch.float32, "lr": 1e-6}
    (parameter,) = parameters = make_parameters(generator, torch.bfloat16, sizes=((1000,),))
    optimizer = AdamW(parameters, **options)
    run([optimizer], generator, 2)
    theirs = torch.optim.AdamW(parameters, lr=0.1)
    theirs.load_state_dict(optimizer.state_dict())
    run([theirs], generator, 20)
    trained = parameter.detach().clone()
    again = AdamW(parameters, **options)
    again.load_state_dict(
        theirs.state_dict() | {"param_groups": again.state_dict()["param_groups"]}
    )
    run([again], generator, 1)
    torch.testing.assert_close(parameter.detach(), trained, rtol=2**-7, atol=1e-5)
    with torch.no_grad():
        parameter.fill_(5)
    run([again], generator, 1)
    torch.testing.assert_close(
        again.state[parameter]["master"], torch.full((1000,), 5.0), rtol=1e-5, atol=0
    )


def test_infinite_parameters_stay_so_as_in_torch(generator):
    """A mask's -inf: with and without weight decay."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for weight_decay in (0.0, 0.1):
            start = torch.tensor([-math.inf, 1.0, math.inf] * 20, dtype=dtype)
            ours, theirs = Parameter(start.clone()), Parameter(start.clone())
            for p, kind in ((ours, AdamW), (theirs, torch.optim.AdamW)):
                p.grad = torch.arange(60.0).to(dtype) - 30
                kind([p], weight_decay=weight_decay).step()
            torch.testing.assert_close(ours.detach(), theirs.detach())
