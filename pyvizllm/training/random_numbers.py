"""The random numbers of python, numpy and torch together: seed, save, restore."""

import random
from typing import Any

import numpy as np
import torch

__all__ = ["random_state", "restore_random_state", "seed_everything"]


def seed_everything(seed: int) -> None:
    """Seed python's, numpy's and torch's random numbers (torch: on every device)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """The state of python's, numpy's and torch's random numbers, of plain types and tensors."""
    legacy: Any = np.random.get_state()
    name, keys, position, has_gauss, cached = legacy
    initialized = torch.cuda.is_initialized()
    cuda = torch.cuda.get_rng_state_all() if initialized else []
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Bring the random numbers back to what `random_state` returned."""
    name, keys, position, has_gauss, cached = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    for index, saved in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(saved, index)
