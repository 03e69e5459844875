"""cross_entropy composed of torch's operations, every one of which can be differentiated again.

It holds several copies of the logits and is no faster than torch. The kernels are for the first
derivative of the logits; this is for all else: second derivatives, probabilities or class weights
that require grad, tangents, the transforms of torch.func, torch.jit.trace, and devices that have no
kernels.
"""

from __future__ import annotations

from types import NoneType

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pyvizllm.ops.metrics import TokenRecords


def is_needed(input: Tensor, target: Tensor, weight: Tensor | None) -> bool:
    """Whether what is asked for is more than the kernels can differentiate."""
    others = (target,) if weight is None else (target, weight)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in others):
        return True
    if input.device.type not in ("cpu", "cuda", "meta"):
        return True
    if torch._C._get_tracing_state() is not None:  # torch.jit.trace, which keeps no Python
        return True
    # An operator's autograd formula is not asked inside a transform, and has none for tangents.
    # Not `is not None`: to torch.compile, which wraps what it finds, that is never None.
    if not isinstance(torch._C._functorch.peek_interpreter_stack(), NoneType):
        return True
    return (
        not torch.compiler.is_compiling()
        and forward_ad._current_level >= 0
        and any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in (input, *others))
    )


def composed_loss(
    input: Tensor,  # [rows, classes], or [batch, classes, positions]
    target: Tensor,  # [rows], or probabilities [rows, classes]
    weight: Tensor | None,  # [classes]
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    total_classes: int,
    reduction: str,
) -> Tensor:
    """The loss, [] or [rows], float32, or float64 where one of the tensors is."""
    if total_classes != 0:
        raise RuntimeError(
            "cross_entropy: expected all classes of the logits in one tensor for what composes it "
            "(a second derivative), got a slice of them"
        )
    if input.dim() == 3:
        input = input.transpose(1, 2).flatten(0, 1)
    logits = capped_logits(_wide(input, target, weight), softcap, logit_scale)
    uniform = label_smoothing / max(logits.shape[1], 1)
    weights = logits.new_ones(()) if weight is None else weight.to(logits.dtype)
    log_p = logits.log_softmax(1)
    if target.dim() == 2:
        q = (target.to(logits.dtype) * (1 - label_smoothing) + uniform) * weights
        loss = _expected(q, -log_p)
        of_target = counts = torch.ones_like(loss)
    else:
        counts = target != ignore_index
        index = target.long().where(counts, 0)
        of_target = counts.to(logits.dtype)
        if weight is not None:
            of_target = weights[index] * of_target
        column = index.unsqueeze(1)
        share = (1 - label_smoothing) * of_target.unsqueeze(1)
        loss = _expected(share, -log_p.gather(1, column))
        if label_smoothing > 0:
            loss = loss + _expected((weights * uniform).expand_as(log_p), -log_p)
    if z_loss != 0:
        loss = loss + z_loss * of_target * logits.logsumexp(1) ** 2
    loss = loss.where(counts != 0, 0)
    if reduction == "none":
        return loss
    return loss.sum() / of_target.sum() if reduction == "mean" else loss.sum()


def composed_gradient(
    grad_loss: Tensor,  # [] or [rows], of the loss
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    *options: object,
) -> Tensor:
    """The gradient of `input`, of its shape, as a differentiable function of it."""
    # A view, to which the gradient goes and no further: hooks of `input` are for the whole of it.
    input = input.view_as(input)
    loss = composed_loss(input, target, weight, *options)  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(loss, input, grad_loss, create_graph=True)
    return gradient


def composed_records(
    input: Tensor,  # [rows, classes]
    target: Tensor,  # [rows], or probabilities [rows, classes]
    ignore_index: int,
    softcap: float,
    logit_scale: float,
) -> tuple[TokenRecords, Tensor]:
    """What the kernels note of each token, and whether it counts [rows]."""
    with torch.no_grad():
        logits = capped_logits(input.detach().double(), softcap, logit_scale)
        top = logits.amax(1, keepdim=True)
        # As in the kernels: of a row that is all -Inf the sum is 0, not NaN.
        distance = logits - top.where(top != -torch.inf, 0)
        exp = distance.exp()
        sum_exp, shifted = exp.sum(1), distance.sum(1)
        if target.dim() == 2:
            index = target.argmax(1)
            counts = torch.ones_like(index, dtype=torch.bool)
            shifted = -_expected(target.detach().double(), -distance)
        else:
            counts = target != ignore_index
            index = target.long().where(counts, 0)
        column = index.unsqueeze(1)
        of_target = logits.gather(1, column)
        classes = torch.arange(logits.shape[1], device=logits.device)
        before = (logits > of_target) | ((logits == of_target) & (classes < column))
        records = (
            top.squeeze(1),
            sum_exp,
            (exp * distance).where(exp > 0, 0).sum(1),
            shifted,
            of_target.squeeze(1),
            before.sum(1).where(top.squeeze(1) < torch.inf, torch.nan),  # not where it is NaN
            logits.masked_fill(classes == column, -torch.inf)
            .amax(1)
            .where(sum_exp >= 0, torch.nan),
        )
        return TokenRecords(torch.stack([row.where(counts, torch.nan) for row in records])), counts


def capped_logits(input: Tensor, softcap: float, logit_scale: float) -> Tensor:
    logits = input if logit_scale == 1 else input * logit_scale
    return logits if softcap == 0 else softcap * torch.tanh(logits / softcap)


def _wide(input: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    """Logits of float64 if anything is, else of float32."""
    tensors = (input, target) if weight is None else (input, target, weight)
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return input.to(torch.float64 if wide else torch.float32)


def _expected(weights: Tensor, values: Tensor) -> Tensor:
    """Sums of weights * values along the classes, where 0 * Inf is 0."""
    return (weights * values.where((weights != 0) | (values != torch.inf), 0)).sum(1)
