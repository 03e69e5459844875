"""The CUDA kernels, run on the CPU, in the place of the operators' CPU kernels."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, c_bool, c_char_p, c_double, c_int, c_int64, c_uint, c_void_p

import torch
from cuda_on_cpu.build import EXPORTS, KERNELS, build
from torch import Tensor

METRICS = 53
RECORD = 7  # row_record::kSize
OPERATORS = (
    *("cross_entropy_forward", "cross_entropy_backward", "cross_entropy_fused"),
    *("cross_entropy_fused_", "tensor_stats", "scale_", "adamw_", "sketch", "first_nonfinite_"),
)
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
# The device's number, the shared memory a block may have in bytes, and its largest cluster: by
# these the fused kernel chooses its way (csrc/cuda/cross_entropy_plan.h). The last says that it has
# clusters and takes none.
DEVICES = {
    "large": (0, 227 * 1024, 16),
    "clusters of small blocks": (1, 16 * 1024, 16),
    "no room": (2, 8 * 1024, 0),
    "no clusters": (3, 100 * 1024, 0),
    "refusing": (4, 16 * 1024, 1),
}
ORDERS = {"forward": 0, "shuffled": 0x5EED}  # the scheduler's seed


class Arguments(ctypes.Structure):
    """CrossEntropyArguments of csrc/kernels.h."""

    _fields_ = (
        ("logits", c_void_p),
        ("dtype", c_int),
        ("rows", c_int64),
        ("classes", c_int64),
        ("row_stride", c_int64),
        *((name, c_int64) for name in ("positions", "batch_stride", "class_stride")),  # CPU only
        ("target", c_void_p),
        ("target_is_int64", c_bool),
        ("ignore_index", c_int64),
        ("probabilities", c_void_p),
        ("probability_row_stride", c_int64),
        ("weight", c_void_p),
        *((name, c_double) for name in ("label_smoothing", "z_loss", "softcap", "logit_scale")),
        ("reduction", c_int),
        ("total_classes", c_int64),
    )


class Span(ctypes.Structure):
    """TensorSpan, and ScaledTensor, of csrc/kernels.h."""

    _fields_ = (("data", c_void_p), ("dtype", c_int), ("numel", c_int64))


class AdamWTensor(ctypes.Structure):
    """AdamWTensor of csrc/kernels.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("param", "grad", "exp_avg", "exp_avg_sq")),
        *((name, c_void_p) for name in ("max_exp_avg_sq", "master", "step")),
        *((name, c_int) for name in ("param_dtype", "grad_dtype", "state_dtype")),
        ("numel", c_int64),
    )


class AdamWOptions(ctypes.Structure):
    """AdamWOptions of csrc/kernels.h."""

    _fields_ = (
        *(("lr", c_double), ("lr_tensor", c_void_p), ("lr_dtype", c_int)),
        *((name, c_double) for name in ("beta1", "beta2", "eps", "weight_decay")),
        ("maximize", c_bool),
        *((name, c_void_p) for name in ("grad_scale", "found_inf", "clip_coefficient")),
    )


class AdamWStatistics(ctypes.Structure):
    """AdamWStatistics of csrc/kernels.h."""

    _fields_ = tuple(
        (f"{of}_{what}", c_void_p)
        for of in ("update", "param")
        for what in ("values", "counts", "histogram")
    )


def pointer(tensor: Tensor | None) -> int | None:
    return tensor.data_ptr() if tensor is not None and tensor.numel() else None


def spans_of(tensors: list[Tensor]) -> ctypes.Array:
    """TensorSpans, or ScaledTensors, of contiguous tensors."""
    return (Span * len(tensors))(*((t.data_ptr(), DTYPES[t.dtype], t.numel()) for t in tensors))


def unwritten(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A new tensor full of NaN, or of -1: what a kernel fails to write is seen."""
    value = torch.nan if dtype.is_floating_point else -1
    return torch.full(shape, value, dtype=dtype, device=like.device)


def accumulate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Kernels:
    """The operators of csrc/registration.cpp, over the emulated CUDA host functions."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(str(build("kernels", EXPORTS, *KERNELS)))
        self.library.arguments_size.restype = c_int64
        assert self.library.arguments_size() == ctypes.sizeof(Arguments)
        self.library.cross_entropy_workspace.restype = c_int64
        self.library.cross_entropy_workspace.argtypes = (POINTER(Arguments),)
        self.library.tensor_stats_workspace.restype = c_int64
        self.library.tensor_stats_workspace.argtypes = (POINTER(Span), c_int64)
        self.library.sketch_workspace.restype = c_int64
        self.library.sketch_workspace.argtypes = (POINTER(Span), c_int64)
        self.library.adamw_workspace.restype = c_int64
        self.library.adamw_workspace.argtypes = (POINTER(AdamWTensor), c_int64, c_bool)

    def schedule(self, order: str, workers: int = 2) -> None:
        self.library.set_schedule(c_uint(ORDERS[order]), c_uint(workers))

    def set_device(self, name: str) -> None:
        self.library.set_device(*map(c_int, DEVICES[name]))

    def fused_plan(self, *arguments: int) -> tuple[str, int, int, int, int]:
        """Path, blocks of a cluster, vectors of a block, its tiles, its shared memory."""
        plan = (c_int64 * 5)()
        self.library.fused_plan(*map(c_int64, arguments), plan)
        return (("warp", "on chip", "streaming")[plan[0]], *plan[1:])

    def _call(self, name: str, *arguments: object) -> None:
        function = getattr(self.library, name)
        function.restype = c_char_p
        converted = []
        for value in arguments:
            if isinstance(value, Tensor):
                value = c_void_p(value.data_ptr() if value.numel() else None)
            converted.append(c_int64(value) if isinstance(value, int) else value)
        message = function(*converted)
        if message is not None:
            raise RuntimeError(message.decode())

    def _arguments(
        self,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        label_smoothing: float,
        z_loss: float,
        softcap: float,
        logit_scale: float,
        total_classes: int,
        reduction: str,
    ) -> tuple[ctypes.Array, Tensor, tuple[int, ...]]:
        """The arguments by reference, a workspace, and the shape of the loss."""
        rows, classes = input.shape
        probabilities = target.dim() == 2
        arguments = Arguments(
            *(input.data_ptr(), DTYPES[input.dtype], rows, classes, input.stride(0)),
            *(0, 0, 0),  # no positions
            *(None if probabilities else target.data_ptr(), target.dtype == torch.int64),
            ignore_index,
            *(target.data_ptr() if probabilities else None, target.stride(0)),
            None if weight is None else weight.data_ptr(),
            *(label_smoothing, z_loss, softcap, logit_scale),
            *(REDUCTIONS[reduction], total_classes),
        )
        size = self.library.cross_entropy_workspace(ctypes.byref(arguments))
        workspace = torch.full((size,), 255, dtype=torch.uint8)
        return ctypes.byref(arguments), workspace, (rows,) if reduction == "none" else ()

    def cross_entropy_forward(
        self, input: Tensor, target: Tensor, *rest: object
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        *options, wanted = rest
        arguments, workspace, shape = self._arguments(input, target, *options)
        loss = unwritten(input, shape, accumulate(input.dtype))
        row_max = unwritten(input, (len(input),), loss.dtype)
        row_sum = unwritten(input, (len(input),), torch.float64)
        sums, records = self._wanted(input, wanted)
        self._call(
            "cross_entropy_forward",
            *(arguments, loss, row_max, row_sum, sums, records, workspace),
        )
        return loss, row_max, row_sum, sums, records

    def _wanted(self, input: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
        sums = unwritten(input, (METRICS * (wanted > 0),), torch.float64)
        return sums, unwritten(input, (RECORD, len(input) * (wanted > 1)), torch.float64)

    def cross_entropy_backward(
        self,
        grad_loss: Tensor,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        row_max: Tensor,
        row_sum: Tensor,
        *options: object,
    ) -> Tensor:
        arguments, workspace, _ = self._arguments(input, target, weight, *options)
        grad = unwritten(input, tuple(input.shape), input.dtype)
        stride = grad_loss.stride(0) if grad_loss.dim() else 0
        self._call(
            "cross_entropy_backward",
            *(arguments, row_max, row_sum, grad_loss, stride, grad, grad.stride(0), workspace),
        )
        return grad

    def cross_entropy_fused(
        self, input: Tensor, target: Tensor, *rest: object
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        grad = unwritten(input, tuple(input.shape), input.dtype)
        loss, sums, records = self._fused(grad, input, target, *rest)
        return loss, grad, sums, records

    def cross_entropy_fused_(
        self, input: Tensor, target: Tensor, *rest: object
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self._fused(input, input, target, *rest)

    def _fused(
        self, grad: Tensor, input: Tensor, target: Tensor, *rest: object
    ) -> tuple[Tensor, Tensor, Tensor]:
        *options, wanted = rest
        arguments, workspace, shape = self._arguments(input, target, *options)
        loss = unwritten(input, shape, accumulate(input.dtype))
        sums, records = self._wanted(input, wanted)
        self._call(
            "cross_entropy_fused",
            *(arguments, loss, grad, grad.stride(0), sums, records, workspace),
        )
        return loss, sums, records

    def tensor_stats(
        self, tensors: list[Tensor], histogram: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        tensors = [tensor.contiguous() for tensor in tensors]
        spans = spans_of(tensors)
        size = self.library.tensor_stats_workspace(spans, len(tensors))
        workspace = torch.full((size,), 255, dtype=torch.uint8)
        values = unwritten(tensors[0], (7, len(tensors)), torch.float64)
        counts = unwritten(tensors[0], (5, len(tensors)), torch.int64)
        total_norm = unwritten(tensors[0], (), torch.float64)
        bins = histogram if histogram is not None else c_void_p(None)
        self._call("tensor_stats", spans, len(tensors), bins, values, counts, total_norm, workspace)
        return values, counts, total_norm

    def scale_(self, tensors: list[Tensor], coefficient: Tensor) -> None:
        self._call("scale", spans_of(tensors), len(tensors), coefficient)

    def sketch(self, tensors: list[Tensor], seeds: list[int]) -> Tensor:
        tensors = [tensor.contiguous() for tensor in tensors]
        spans = spans_of(tensors)
        size = self.library.sketch_workspace(spans, len(tensors))
        workspace = torch.full((size,), 255, dtype=torch.uint8)
        sketches = unwritten(tensors[0], (len(tensors), 64), torch.float64)
        self._call("sketch", spans, len(tensors), torch.tensor(seeds), sketches, workspace)
        return sketches

    def first_nonfinite_(
        self, tensors: list[Tensor], counts: Tensor, row: int, found: Tensor
    ) -> None:
        tensors = [tensor.contiguous() for tensor in tensors]
        self._call("first_nonfinite", spans_of(tensors), len(tensors), counts, row, found)

    def adamw_(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        max_exp_avg_sqs: list[Tensor],
        masters: list[Tensor],
        steps: list[Tensor],
        lr_tensor: Tensor | None,
        *rest: object,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        *numbers, grad_scale, found_inf, clip, statistics, update_histogram, param_histogram = rest
        nothing = [None] * len(params)
        lists = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs or nothing)
        pointers = [[pointer(t) for t in x] for x in (*lists, masters or nothing, steps)]
        dtypes = [[DTYPES[t.dtype] for t in x] for x in (params, grads, exp_avgs)]
        sizes = [t.numel() for t in params]
        tensors = (AdamWTensor * len(params))(*zip(*pointers, *dtypes, sizes, strict=True))
        lr, *numbers = numbers
        lr_dtype = DTYPES[lr_tensor.dtype if lr_tensor is not None else torch.float32]
        scalars = (pointer(grad_scale), pointer(found_inf), pointer(clip))
        options = AdamWOptions(lr, pointer(lr_tensor), lr_dtype, *numbers, *scalars)
        columns = len(params) if statistics else 0
        outputs = [
            unwritten(params[0], shape, dtype)
            for _ in ("update", "param")
            for shape, dtype in (((7, columns), torch.float64), ((5, columns), torch.int64))
        ]
        collected = AdamWStatistics(
            *(pointer(t) for t in (*outputs[:2], update_histogram, *outputs[2:], param_histogram))
        )
        collects = statistics or update_histogram is not None or param_histogram is not None
        size = self.library.adamw_workspace(tensors, len(params), collects)
        workspace = torch.full((size,), 255, dtype=torch.uint8)
        by_reference = (ctypes.byref(options), ctypes.byref(collected))
        self._call("adamw", tensors, len(params), *by_reference, workspace)
        update_values, update_counts, param_values, param_counts = outputs
        return update_values, update_counts, param_values, param_counts

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Within it, pyvizllm's operators on CPU tensors run the CUDA kernels."""
        with torch.library._scoped_library("pyvizllm", "IMPL") as library:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
                for name in OPERATORS:
                    library.impl(name, getattr(self, name), "CPU", allow_override=True)
            yield
