"""The in-tree PEP 517 backend: setuptools, building against the torch that will be imported.

pip builds in isolation, where the torch of the target environment is hidden. Naming torch in
`[build-system].requires` would fetch another one (2.6 GB, maybe another version) for every build.
But pip's isolation runs the target's own interpreter and hides its packages only by PYTHONPATH and
PYTHONNOUSERSITE, so a child without these two can say where they are.

Installers that build in a separate virtual environment (uv) cannot be seen through that way: use
`--no-build-isolation` there, or name the target's interpreter in PYVIZLLM_PYTHON.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
from typing import Any

from build_toolchain import (
    MINIMUM_TORCH,
    PINNED_TORCH,
    Torch,
    find_ninja,
    find_pybind11,
    find_torch,
    release,
)

SETUPTOOLS = "77.0.3"  # the first with the `license = "Apache-2.0"` of today's pyproject.toml
TORCH_REQUIREMENT = "PYVIZLLM_TORCH_REQUIREMENT"  # read by setup.py


def target_paths() -> list[str]:
    """Return `sys.path` of the environment that is installed into, as it is without isolation."""
    hidden = ("PYTHONPATH", "PYTHONNOUSERSITE", "PYVIZLLM_PYTHON")
    environ = {name: value for name, value in os.environ.items() if name not in hidden}
    command = [
        os.environ.get("PYVIZLLM_PYTHON", sys.executable),
        "-c",
        "import json, sys; print(json.dumps(sys.path))",
    ]
    try:
        printed = subprocess.run(command, env=environ, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(
            f"pyvizllm build: expected a Python interpreter at {command[0]}, got: {error}"
        ) from None
    paths: list[str] = json.loads(printed.stdout)
    return [path for path in paths if path]


def show_target() -> None:
    """Append the target's folders to `sys.path`, after those of the isolated environment."""
    sys.path.extend(path for path in target_paths() if path not in sys.path)


def requirements() -> list[str]:
    """Return what the build needs and the target has not: nothing, in most environments."""
    missing = []
    torch = find_torch()
    if torch is None or release(torch.version) < release(MINIMUM_TORCH):
        missing.append(PINNED_TORCH)
    try:
        old = release(importlib.metadata.version("setuptools")) < release(SETUPTOOLS)
    except importlib.metadata.PackageNotFoundError:
        old = True
    if old:
        missing.append(f"setuptools>={SETUPTOOLS}")
    if find_ninja(os.environ) is None:
        missing.append("ninja")
    if find_pybind11(torch) is None:
        missing.append("pybind11")
    return missing


def pin_fetched_torch(torch: Torch | None) -> None:
    """Let the editable install require the very torch that pip fetched to build it.

    Otherwise pip would go on to install the newest one: a second download, and another torch than
    the one built against. Only under pip's isolation, where it is certain that the target has none.
    """
    isolated = "pip-build-env" not in sys.prefix
    if torch is not None and isolated and "pip-build-env" in str(torch.root):
        os.environ[TORCH_REQUIREMENT] = PINNED_TORCH


def _setuptools() -> Any:
    show_target()
    import setuptools.build_meta

    return setuptools.build_meta


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    show_target()
    return requirements()


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    return get_requires_for_build_wheel(config_settings)


def get_requires_for_build_sdist(config_settings: dict[str, Any] | None = None) -> list[str]:
    show_target()
    return [name for name in requirements() if name.startswith("setuptools")]


def prepare_metadata_for_build_wheel(
    metadata_directory: str, config_settings: dict[str, Any] | None = None
) -> str:
    name: str = _setuptools().prepare_metadata_for_build_wheel(metadata_directory, config_settings)
    return name


def prepare_metadata_for_build_editable(
    metadata_directory: str, config_settings: dict[str, Any] | None = None
) -> str:
    backend = _setuptools()
    pin_fetched_torch(find_torch())
    name: str = backend.prepare_metadata_for_build_editable(metadata_directory, config_settings)
    return name


def build_wheel(
    wheel_directory: str,
    config_settings: dict[str, Any] | None = None,
    metadata_directory: str | None = None,
) -> str:
    name: str = _setuptools().build_wheel(wheel_directory, config_settings, metadata_directory)
    return name


def build_editable(
    wheel_directory: str,
    config_settings: dict[str, Any] | None = None,
    metadata_directory: str | None = None,
) -> str:
    backend = _setuptools()
    pin_fetched_torch(find_torch())
    name: str = backend.build_editable(wheel_directory, config_settings, metadata_directory)
    return name


def build_sdist(sdist_directory: str, config_settings: dict[str, Any] | None = None) -> str:
    name: str = _setuptools().build_sdist(sdist_directory, config_settings)
    return name
