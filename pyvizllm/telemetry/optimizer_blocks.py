"""The parameters of the optimizers that step, in blocks to be measured."""

from __future__ import annotations

import logging
import operator
from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from pyvizllm.telemetry.block import Block
from pyvizllm.telemetry.names import WatchedNames
from pyvizllm.telemetry.recorder import Recorder
from pyvizllm.telemetry.records import Kind
from pyvizllm.telemetry.shards import is_flat_part

_WITHOUT_VALUES = torch.device("meta")
_logger = logging.getLogger("pyvizllm")


class OptimizerBlocks(Mapping[Optimizer, list[Block]]):
    """The blocks of each optimizer that has watched parameters, one for each device.

    Optimizers that nobody uses any more are not kept alive.

    Arguments:
        recorder: is told of blocks that are no longer used.
        names: the watched parameters and their names.
        histograms: the kinds that are counted.
    """

    def __init__(self, recorder: Recorder, names: WatchedNames, histograms: Sequence[Kind]) -> None:
        self._recorder, self._names, self._histograms = recorder, names, histograms
        self._parameters: MutableMapping[Optimizer, list[Tensor]] = WeakKeyDictionary()
        self._blocks: MutableMapping[Optimizer, list[Block]] = WeakKeyDictionary()
        self._told_left_out = self._told_flat = False

    def __getitem__(self, optimizer: Optimizer) -> list[Block]:
        return self._blocks[optimizer]

    def __iter__(self) -> Iterator[Optimizer]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)

    def update(self, optimizer: Optimizer) -> bool:
        """Lay out an optimizer's parameters, again if they have changed; False if none is ours.

        Parameters that are new to us may be new in the model.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        known = self._parameters.get(optimizer, [])
        if len(known) == len(parameters) and all(map(operator.is_, known, parameters)):
            return optimizer in self._blocks
        self._parameters[optimizer] = parameters
        for block in self._blocks.pop(optimizer, []):
            self._recorder.retire(block)
        if not all(parameter in self._names for parameter in parameters):
            self._names.refresh()
        if not any(parameter in self._names for parameter in parameters):
            return False
        self._blocks[optimizer] = []
        for device, some in self._by_device(parameters).items():
            names = [self._names.get(parameter) for parameter in some]
            if any(names):
                self._blocks[optimizer].append(Block(some, names, device, self._histograms))
        return True

    def lay_out_model(self) -> None:
        """Measure the gradients of the whole model, until it is known whose parameters they are."""
        for device, parameters in self._by_device(self._names).items():
            names = [self._names[parameter] for parameter in parameters]
            kinds = [kind for kind in self._histograms if kind == "grad"]
            self._recorder.activate(Block(parameters, names, device, kinds))

    def _by_device(self, parameters: Collection[Tensor]) -> dict[torch.device, list[Tensor]]:
        by_device: dict[torch.device, list[Tensor]] = {}
        for parameter in parameters:
            by_device.setdefault(parameter.device, []).append(parameter)
        left_out = by_device.pop(_WITHOUT_VALUES, [])
        if left_out and not self._told_left_out:
            self._told_left_out = True
            _logger.warning(
                "watch: parameters on the meta device, which have no values, are left out: %d of "
                "them, %s the first",
                *(len(left_out), self._names.get(left_out[0], "one without a name")),
            )
        flat = [parameter for parameter in parameters if is_flat_part(parameter)]
        if flat and not self._told_flat:
            self._told_flat = True
            _logger.warning(
                "watch: parameters of FullyShardedDataParallel, of which this may be a part, are "
                "left out: %d of them, %s the first; those of fully_shard are shown",
                *(len(flat), self._names.get(flat[0], "one without a name")),
            )
        return by_device
