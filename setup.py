"""Hands the build to CMake: CMakeLists.txt is its one description.

What is missing for a build is said here in one sentence each, before CMake is asked. This is
setuptools' script and, for pyproject.toml, the build backend too: setuptools' own, but for torch.
"""

import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.build_meta import *  # noqa: F403
from setuptools.command.build_ext import build_ext

OLDEST_TORCH = (2, 11)
NEED_TORCH = "torch>=2.11"
TOOLKIT = "/usr/local/cuda"
GB_PER_JOB = 2  # what the compiler takes for the largest of our files, with room to spare


def find_torch():
    """The folder of the installed torch, else None; it is never imported, its files are enough.

    An isolated build does not see what is installed beside pip. Only headers and the name of one
    library are needed of torch, so the installed one is used all the same: another would be a
    download of some gigabytes.
    """
    spec = find_spec("torch")
    here = [Path(spec.origin).parent] if spec and spec.origin else []
    base = {"base": sys.base_prefix, "platbase": sys.base_prefix}  # outside a virtual environment
    beside = (
        sysconfig.get_path("platlib"),
        site.getusersitepackages(),
        sysconfig.get_path("platlib", vars=base),
    )
    folders = here + [Path(folder, "torch") for folder in beside]
    return next((folder for folder in folders if (folder / "version.py").exists()), None)


def torch_version(folder):
    match = re.search(r"__version__ = '([^']+)'", (folder / "version.py").read_text())
    return match.group(1) if match else "0"


def is_old(version):
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST_TORCH


def get_requires_for_build_wheel(config_settings=None):
    """What an isolated build has to install beside the `requires` of pyproject.toml."""
    folder = find_torch()
    return [NEED_TORCH] if folder is None or is_old(torch_version(folder)) else []


get_requires_for_build_editable = get_requires_for_build_wheel


def need_torch():
    folder = find_torch()
    if folder is None:
        fail(f"torch must be installed, got none: pip install '{NEED_TORCH}'")
    if is_old(torch_version(folder)):
        fail(
            f"torch must be 2.11 or newer, got {torch_version(folder)}: pip install '{NEED_TORCH}'"
        )
    return folder


def need_compiler():
    """CMake looks for these too; it says that it found none in twenty lines."""
    chosen = os.environ.get("CXX")
    command = shlex.split(chosen)[:1] if chosen else ["c++", "g++", "clang++"]
    if not any(map(shutil.which, command)):
        fail(
            f"CXX must name a C++ compiler, got {chosen}"
            if chosen
            else "a C++20 compiler must be in PATH, got none: apt-get install g++, "
            "dnf install gcc-c++, or name yours in CXX"
        )


def need_toolkit():
    """PEFTKERN_CUDA; CMake looks for the toolkit itself (csrc/toolkit.cmake)."""
    chosen = os.environ.get("PEFTKERN_CUDA") or "auto"
    if chosen not in ("on", "off", "auto"):
        fail(f"PEFTKERN_CUDA must be on, off or auto, got {chosen}")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), TOOLKIT]
    folders = [os.path.join(home, "bin") for home in homes if home]
    path = os.pathsep.join([*folders, os.environ.get("PATH", os.defpath)])
    if chosen == "on" and not shutil.which("nvcc", path=path):
        fail(
            f"nvcc must be in CUDA_HOME, PATH or {TOOLKIT} where PEFTKERN_CUDA is on, got none: "
            "install NVIDIA's CUDA toolkit, 12.0 or newer"
        )
    return chosen


def need_python_headers():
    folder = sysconfig.get_path("include")
    if not Path(folder, "Python.h").exists():
        fail(f"Python.h must be in {folder}, got none: apt-get install python3-dev")


def need_tool(package, folder):
    """The package's own program where it is installed, whatever PATH says; else that in PATH."""
    try:
        path = getattr(import_module(package), folder, None)
    except ImportError:
        path = None
    program = shutil.which(package, path=path) or shutil.which(package)
    if program is None:
        fail(f"{package} must be installed, got none: pip install {package}")
    return program


def need_pybind11():
    if find_spec("pybind11") is None:
        fail("pybind11 must be installed, got none: pip install pybind11")


def jobs():
    """MAX_JOBS; else as many as cores and memory allow."""
    chosen = os.environ.get("MAX_JOBS")
    if chosen:
        if not chosen.isdecimal() or int(chosen) < 1:
            fail(f"MAX_JOBS must be a whole number of at least 1, got {chosen}")
        return int(chosen)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(cores or 1, int(free_gigabytes() // GB_PER_JOB)))


def free_gigabytes():
    try:
        text = Path("/proc/meminfo").read_text()
        return int(re.search(r"MemAvailable:\s*(\d+)", text).group(1)) / 2**20
    except (OSError, AttributeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def forget_configuration(build):
    """An earlier run may have found its tools in an isolated environment that is gone, or another
    compiler than CXX names now; what it compiled stays."""
    (build / "CMakeCache.txt").unlink(missing_ok=True)
    for folder in build.glob("CMakeFiles/[0-9]*"):
        shutil.rmtree(folder)


def fail(sentence):
    sys.exit(f"peftkern: {sentence}")


def run(*command):
    if subprocess.call(list(map(str, command))):
        fail(f"{Path(command[0]).name} failed; what it says above is the reason")


class CMakeBuild(build_ext):
    def get_ext_filename(self, fullname):
        """The ops know nothing of Python, so their library has one name for every Python."""
        if fullname.endswith("._ops"):
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    def build_extensions(self):
        """One run of CMake makes every extension; they all lie in the same folder."""
        torch = need_torch()
        need_compiler()
        cuda = need_toolkit()
        need_python_headers()
        need_pybind11()
        cmake, ninja = need_tool("cmake", "CMAKE_BIN_DIR"), need_tool("ninja", "BIN_DIR")
        parallel = jobs()
        build = Path(self.build_temp).resolve()
        output = Path(self.get_ext_fullpath(self.extensions[0].name)).resolve().parent
        forget_configuration(build)
        run(
            cmake, "-S", ".", "-B", build, "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPEFTKERN_TORCH={torch}",
            f"-DPEFTKERN_OUTPUT={output}",
            f"-DPEFTKERN_CUDA={cuda}",
            f"-DPEFTKERN_VERSION={self.distribution.get_version()}",
            f"-DPython_EXECUTABLE={sys.executable}",
        )  # fmt: skip
        run(cmake, "--build", build, "--target", "peftkern_native", "--parallel", parallel)


if __name__ == "__main__":  # which setuptools sets; the backend is imported
    setup(
        ext_modules=[Extension("peftkern._ops", []), Extension("peftkern._build", [])],
        cmdclass={"build_ext": CMakeBuild},
    )
