"""What `pytest -m gpu` collects."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`pytest -m gpu` imports the files of the GPU's tests alone.

    It has to work on a machine with a GPU, a torch, and little else: most other files import
    tensorboardX.
    """
    is_test = collection_path.name.startswith("test_")
    is_gpu_test = collection_path.name.startswith("test_gpu")
    return True if config.option.markexpr == "gpu" and is_test and not is_gpu_test else None
