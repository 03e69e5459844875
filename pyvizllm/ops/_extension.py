"""Loads the compiled kernels, so that `torch.ops.pyvizllm` has them: import this before a call."""

import importlib

import torch

MINIMUM_TORCH = (2, 11)


def check_torch(version: str) -> None:
    """Raise ImportError for a torch older than the ABI that the kernels are built for."""
    major, minor = version.split(".")[:2]
    if (int(major), int(minor)) < MINIMUM_TORCH:
        raise ImportError(
            f"pyvizllm: expected torch >= 2.11, got torch {version}; "
            "upgrade it: pip install --upgrade torch"
        )


def load(name: str = "pyvizllm._C") -> None:
    """Import the extension module, after torch, whose libraries it is linked to.

    Raises ImportError with what to do where it was never built, or built by an incomplete install.
    """
    check_torch(torch.__version__)
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"pyvizllm: expected its compiled kernels, got: {error}; "
            "build them: pip install -e . (or make build) in the folder of pyvizllm's sources"
        ) from error


load()
