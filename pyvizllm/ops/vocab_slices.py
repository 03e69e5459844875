"""Rows of logits whose classes are spread over the ranks of a process group.

Each rank reads its slice of a row once and makes a record of it, a few float64 numbers. One
all-gather brings the records to all ranks (40 bytes a row and rank, 64 with metrics), and each
combines them in the order of ranks, so that all have the same bits. Metrics also add up, over the
ranks, how many logits rank before the target's: 8 bytes a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pyvizllm.ops.metrics import RECORD_SIZE, CrossEntropyMetrics, TokenRecords

_ops = torch.ops.pyvizllm
IGNORED = -100  # what local targets have for ignore_index, which may be any number
_BLOCK = 512  # numbers of the first stage of a sum
_METRIC_ROWS = 2048  # torch sums that many in one thread
_CAP_ROUNDING = 2.0**-20  # more than a tanh in float32 is wrong by, relative to 1
_COPIED = 1 << 21  # logits that are copied at a time, for ranks of targets


class RowOptions(NamedTuple):
    """What a row's loss depends on; in the order of the operators' arguments."""

    label_smoothing: float
    z_loss: float
    softcap: float
    logit_scale: float


@dataclass(frozen=True)
class ClassSlices:
    """Contiguous slices of the classes, in the order of the group's ranks."""

    group: dist.ProcessGroup
    rank: int
    counts: tuple[int, ...]
    """How many classes each rank has."""

    @property
    def total(self) -> int:
        return sum(self.counts)

    @property
    def classes(self) -> int:
        """How many classes this rank has."""
        return self.counts[self.rank]

    def local_targets(self, target: Tensor, counted: Tensor) -> Tensor:
        """[rows] int64: within this rank's slice; -1 before it, `classes` behind it."""
        first = sum(self.counts[: self.rank])
        return (target - first).clamp(-1, self.classes).where(counted, IGNORED)

    def owners(self, target: Tensor) -> Tensor:
        """[rows] int64: the rank that has the target's class (any for what is no class)."""
        owner = torch.zeros_like(target)
        for rank in range(1, len(self.counts)):
            owner += target >= sum(self.counts[:rank])
        return owner


def class_slices(
    operation: str,
    logits: Tensor,  # [rows, classes of this rank]; the weight [classes of this rank, hidden] does
    rows: int,
    classes: int,
    group: dist.ProcessGroup | None,
    class_counts: Sequence[int] | None,
) -> ClassSlices:
    """The slices of all ranks; they ask one another where `class_counts` does not tell."""
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            f"{operation}: expected an initialized torch.distributed, got none; call "
            "torch.distributed.init_process_group first"
        )
    group = dist.group.WORLD if group is None else group
    rank = dist.get_rank(group)
    if group is None or rank < 0:
        raise ValueError(f"{operation}: expected a group with this process, got one without it")
    size = dist.get_world_size(group)
    if class_counts is not None:
        counts = tuple(class_counts)
        if len(counts) != size or counts[rank] != classes:
            raise ValueError(
                f"{operation}: expected class_counts of {size} ranks with {classes} classes on "
                f"rank {rank}, got {list(counts)}"
            )
        return ClassSlices(group, rank, counts)
    mine = torch.tensor([rows, classes], device=logits.device)
    shapes = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(shapes, mine, group)
    all_rows, all_classes = torch.stack(shapes, 1).tolist()  # sync point, which class_counts spares
    if len(set(all_rows)) > 1:
        raise ValueError(
            f"{operation}: expected the same tokens on all ranks, got {all_rows} tokens"
        )
    return ClassSlices(group, rank, tuple(all_classes))


class RowState(NamedTuple):
    """What the gradient of rows needs beside their logits."""

    local_target: Tensor  # [rows] int64
    max: Tensor  # [rows] float32, or float64 for float64 logits; of all ranks
    sum_exp: Tensor  # [rows] float64, of all ranks


class Rows(NamedTuple):
    """What all ranks know of some rows; the same bits on all but the local targets."""

    counted: Tensor  # [rows] bool: the target is not ignore_index
    local_target: Tensor  # [rows] int64
    max: Tensor  # [rows] float64
    sum_exp: Tensor  # [rows] float64, of e^(logit - max)
    loss: Tensor  # [rows] float64, 0 where the row does not count
    records: Tensor  # [7, rows] float64 of TokenRecords, or [7, 0]

    def state(self, dtype: torch.dtype) -> RowState:
        max = self.max.to(dtype)
        # What the maximum loses by rounding moves into the sum.
        lost = (self.max - max).where(self.max.isfinite(), 0)
        return RowState(self.local_target, max, self.sum_exp * lost.exp())


def reduce_rows(
    logits: Tensor,  # [rows, classes of this rank], class stride 1
    target: Tensor,  # [rows] int64, of all classes
    ignore_index: int,
    slices: ClassSlices,
    options: RowOptions,
    wanted: int,
) -> Rows:
    """Loss, records and what a gradient needs. All ranks have to call it: they exchange records.

    wanted: 0 the loss; 1 also records, with ranks of targets that are right as far as five; 2 also
    records with all ranks right.
    """
    counted = target != ignore_index
    local_target = slices.local_targets(target, counted)
    own = _own_record(logits, local_target, slices, options, wanted > 0)
    everyone = own.new_empty((len(slices.counts), *own.shape))
    if own.numel() > 0:
        dist.all_gather(list(everyone.unbind(0)), own, slices.group)
    row = _combine(everyone, slices, slices.owners(target), counted)
    loss = _loss(row, slices, options).where(counted, 0)
    records = loss.new_empty((RECORD_SIZE, 0))
    if wanted > 0:
        rank = _rank_of_target(row, logits, local_target, slices, options, wanted > 1)
        records = row.record(rank.where(row.sum_exp == row.sum_exp, torch.nan))
    return Rows(counted, local_target, row.max, row.sum_exp, loss, records)


def _own_record(
    logits: Tensor,
    local_target: Tensor,
    slices: ClassSlices,
    options: RowOptions,
    metrics: bool,
) -> Tensor:
    """[5, rows] float64 of row_record in kernels.h; with metrics [8, rows]: its seven numbers and
    the target's logit as it came, before scale and cap."""
    rows, classes = logits.shape
    raw_target = logits.new_zeros((1, rows), dtype=torch.float64)
    if classes > 0:
        *_, record = _ops.cross_entropy_forward(
            logits, local_target, None, IGNORED, *options, slices.total, "none", 2
        )
        index = local_target.clamp(0, classes - 1)
        raw_target.copy_(logits.gather(1, index[:, None]).T)
    else:  # maxima and sums of nothing
        record = logits.new_zeros((RECORD_SIZE, rows), dtype=torch.float64)
        record[::2] = -torch.inf
        record[2] = 0
    return torch.cat((record, raw_target)) if metrics else record[:5].contiguous()


class _CombinedRow(NamedTuple):
    """Of rows of all classes, each [rows] float64 unless it says otherwise."""

    everyone: Tensor  # [ranks, 5 or 8, rows]: what it is combined of
    owner: Tensor  # [rows] int64: the rank that has the target
    counted: Tensor  # [rows] bool
    max: Tensor
    sum_exp: Tensor  # of e^d, d = logit - max
    sum_exp_shifted: Tensor  # of d e^d
    sum_shifted: Tensor  # of d
    target_logit: Tensor

    def of_owner(self, index: int) -> Tensor:
        """A number of the record of the rank that has the target."""
        return self.everyone[:, index].gather(0, self.owner[None])[0]

    def is_owner(self) -> Tensor:
        """[ranks, rows] bool"""
        return torch.arange(len(self.everyone), device=self.owner.device)[:, None] == self.owner

    def record(self, rank: Tensor) -> Tensor:
        """[7, rows] of TokenRecords; rank: of the target."""
        others = torch.where(self.is_owner(), self.everyone[:, 6], self.everyone[:, 0]).amax(0)
        record = torch.stack(
            (
                self.max,
                self.sum_exp,
                self.sum_exp_shifted,
                self.sum_shifted,
                self.target_logit,
                rank,
                others,
            )
        )
        return record.where(self.counted, torch.nan)


def _combine(everyone: Tensor, slices: ClassSlices, owner: Tensor, counted: Tensor) -> _CombinedRow:
    max, sum_exp, sum_exp_shifted, sum_shifted, target_logit = everyone.unbind(1)[:5]
    row_max = max.amax(0)
    # Where all logits are -Inf, distances are from 0: (-Inf) - (-Inf) would be NaN.
    reference = row_max.where(row_max > -torch.inf, 0)
    delta = max.where(max > -torch.inf, 0) - reference
    factor = (max - reference).exp()
    parts = zip(sum_shifted, delta, slices.counts, strict=True)
    shifted = torch.stack([part + d * classes for part, d, classes in parts])
    return _CombinedRow(
        everyone,
        owner,
        counted,
        row_max,
        (factor * sum_exp).sum(0),
        (factor * (sum_exp_shifted + delta * sum_exp)).sum(0),
        shifted.sum(0),
        target_logit.gather(0, owner[None])[0],
    )


def _loss(row: _CombinedRow, slices: ClassSlices, options: RowOptions) -> Tensor:
    log_sum = row.sum_exp.log()
    loss = log_sum - (row.target_logit - row.max)
    smoothing = options.label_smoothing
    if smoothing != 0:  # towards the uniform distribution over the classes of all ranks
        mean = log_sum - row.sum_shifted / slices.total
        loss = mean if smoothing == 1 else (1 - smoothing) * loss + smoothing * mean
    if options.z_loss != 0:
        loss = loss + options.z_loss * (row.max + log_sum) ** 2
    return loss


def _rank_of_target(
    row: _CombinedRow,
    logits: Tensor,
    local_target: Tensor,
    slices: ClassSlices,
    options: RowOptions,
    exact: bool,
) -> Tensor:
    """[rows] float64: how many logits are before the target's; if not `exact`, as far as five.

    Each rank counts its logits that are before it, in the rows where that may matter (few): where
    the target is among its own rank's first five, and this rank's largest logit is no smaller. The
    kernels order logits as they are before the cap, which may make them equal, or nearly so.
    """
    slack = options.softcap * _CAP_ROUNDING
    larger = row.everyone[slices.rank, 0] >= row.target_logit - slack
    own_rank = row.of_owner(5)
    wanted = larger & (row.owner != slices.rank) & row.counted & ((own_rank < 5) | exact)
    # Only where that is no sync point are rows left out.
    chosen = wanted.nonzero()[:, 0] if logits.device.type == "cpu" else None
    raw_target = row.of_owner(7).to(logits.dtype)
    counts = _count_before(logits, raw_target, local_target, chosen, options)
    others = counts.where(wanted, 0) if chosen is None else own_rank.new_zeros(len(own_rank))
    if chosen is not None:
        others[chosen] = counts
    if others.numel() > 0:
        dist.all_reduce(others, group=slices.group)
    return own_rank + others


def _count_before(
    logits: Tensor,
    target_logit: Tensor,  # [rows], of another rank, before scale and cap
    local_target: Tensor,
    rows: Tensor | None,  # the rows that are wanted; None: all
    options: RowOptions,
) -> Tensor:
    """[wanted rows] float64: logits larger than the target's, or equal and of a class before it.

    The kernel counts them, of a copy with the target's logit at both ends: of the first none that
    is equal counts, of the last all do, and with them the first.
    """
    classes = logits.shape[1]
    count = len(logits) if rows is None else len(rows)
    step = max(1, _COPIED // (classes + 2))
    copy = logits.new_empty((min(step, count), classes + 2))
    counts = logits.new_empty(count, dtype=torch.float64)
    row_options = options._replace(label_smoothing=0.0, z_loss=0.0)
    for begin in range(0, count, step):
        chosen = slice(begin, begin + step) if rows is None else rows[begin : begin + step]
        x = copy[: min(step, count - begin)]
        x[:, 1:-1] = logits[chosen]
        x[:, 0] = x[:, -1] = target_logit[chosen]
        behind = local_target[chosen] == classes
        target = behind.long() * (classes + 1)
        *_, record = _ops.cross_entropy_forward(
            x, target, None, IGNORED, *row_options, 0, "none", 2
        )
        counts[begin : begin + step] = record[5] - behind.double()
    return counts


def metrics_of(
    records: Tensor,  # [7, tokens]
    target: Tensor,  # [tokens]
    ignore_index: int,
    slices: ClassSlices,
    per_token: bool,
    shape: torch.Size,  # of the targets
) -> CrossEntropyMetrics:
    """The same bits for any number of threads."""
    sums = records.new_zeros(CrossEntropyMetrics.SIZE)
    rows = _METRIC_ROWS if records.device.type == "cpu" else max(1, len(target))
    for values, of_rows in zip(records.split(rows, 1), target.split(rows), strict=True):
        sums += TokenRecords(values).sums(of_rows, of_rows != ignore_index, slices.total)
    tokens = TokenRecords(records).per_token(target, shape) if per_token else None
    return CrossEntropyMetrics(sums, tokens)


def sum_in_order(values: Tensor) -> Tensor:
    """The sum over the last dimension, in an order that does not depend on the threads."""
    length = values.shape[-1]
    blocks = (length + _BLOCK - 1) // _BLOCK
    padded = torch.nn.functional.pad(values, (0, blocks * _BLOCK - length))
    return padded.unflatten(-1, (blocks, _BLOCK)).sum(-1).sum(-1)
