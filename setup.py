"""Builds `pyvizllm._C`, one binary for every torch >= 2.11 and every Python >= 3.10, and
`pyvizllm._events`, which is for the Python that builds it (pybind11), and with it the wheel.

What is decided where: csrc/build_toolchain.py and csrc/build_cuda.py look at the machine,
csrc/build_graph.py writes the commands, ninja runs them, csrc/build_backend.py is called by pip.
Environment: CXX, CUDA_HOME, FORCE_CUDA=0|1, TORCH_CUDA_ARCH_LIST, MAX_JOBS, PYVIZLLM_WERROR=1.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, __version__, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))

from build_backend import SETUPTOOLS, TORCH_REQUIREMENT  # noqa: E402
from build_cuda import decide_cuda  # noqa: E402
from build_graph import EVENTS, GRAPH, LIBRARY, Plan, sources, write_graph  # noqa: E402
from build_toolchain import (  # noqa: E402
    MINIMUM_TORCH,
    BuildError,
    cpu_capabilities,
    find_compiler,
    find_launcher,
    find_torch,
    release,
    require_linux,
    require_ninja,
    require_pybind11,
    require_torch,
)

CONFIG = "_build_config.json"


def make_plan() -> Plan:
    """Look at the machine and decide what to build."""
    require_linux()
    torch = require_torch(find_torch())
    compiler = find_compiler(os.environ)
    return Plan(
        torch=torch,
        compiler=compiler,
        launcher=find_launcher(os.environ, compiler),
        capabilities=cpu_capabilities(),
        cuda=decide_cuda(os.environ, sys.path, torch, sources(ROOT, "csrc/cuda/*.cu")),
        python_include=Path(sysconfig.get_paths()["include"]),
        pybind11_include=require_pybind11(torch),
        python_suffix=sysconfig.get_config_var("EXT_SUFFIX"),
        werror=os.environ.get("PYVIZLLM_WERROR") == "1",
    )


def run_ninja(plan: Plan) -> None:
    """Build both libraries in build/, doing again only what has changed."""
    write_graph(plan, ROOT)
    jobs = [f"-j{os.environ['MAX_JOBS']}"] if os.environ.get("MAX_JOBS") else []
    command = [require_ninja(os.environ), "-f", GRAPH, *jobs]
    code = subprocess.run(command, cwd=ROOT).returncode
    if code != 0:
        raise BuildError(f"expected every kernel to compile, got ninja's exit code {code} (above).")


class NinjaBuild(build_ext):  # type: ignore[misc]  # setuptools picks the base at run time
    """build_ext that leaves compiling to ninja, in a folder that stays."""

    def build_extensions(self) -> None:
        plan = make_plan()
        print(plan.describe(), flush=True)
        run_ninja(plan)
        built = {"pyvizllm._C": LIBRARY, "pyvizllm._events": f"{EVENTS}{plan.python_suffix}"}
        for name, source in built.items():
            library = Path(self.get_ext_fullpath(name))
            library.parent.mkdir(parents=True, exist_ok=True)
            # A new file, not the old one written over: a running process may have it mapped.
            library.unlink(missing_ok=True)
            shutil.copy2(ROOT / source, library)
        (library.parent / CONFIG).write_text(plan.config())

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        package = Path(self.get_finalized_command("build_py").get_package_dir("pyvizllm"))
        built = Path(self.build_lib) / "pyvizllm" / CONFIG
        shutil.copy2(built, ROOT / package / CONFIG)

    def get_outputs(self) -> list[str]:
        return [*super().get_outputs(), str(Path(self.build_lib) / "pyvizllm" / CONFIG)]


if release(__version__) < release(SETUPTOOLS):
    raise BuildError(
        f"expected setuptools >= {SETUPTOOLS}, got {__version__}; "
        "use pip install -e . (which fetches it) or upgrade it: pip install --upgrade setuptools."
    )

headers = [name for end in ("cu", "cuh", "h", "py") for name in sources(ROOT, f"csrc/**/*.{end}")]
event_sources = sources(ROOT, "csrc/events/*.cpp")
kernel_sources = [name for name in sources(ROOT, "csrc/**/*.cpp") if name not in event_sources]
extensions = [  # what they depend on goes into the source distribution too
    Extension("pyvizllm._C", sources=kernel_sources, depends=headers, py_limited_api=True),
    Extension("pyvizllm._events", sources=event_sources, depends=headers),
]

setup(
    ext_modules=extensions,
    cmdclass={"build_ext": NinjaBuild},
    install_requires=[
        os.environ.get(TORCH_REQUIREMENT, f"torch>={MINIMUM_TORCH}"),
        "numpy",
        "tensorboard",
        "tensorboardX",
        "tqdm",
        "tyro",
    ],
)
