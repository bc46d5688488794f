"""Hands the build to CMake: CMakeLists.txt is its one description."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        """The ops know nothing of Python, so their library has one name for every Python."""
        if fullname.endswith("._ops"):
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        """One run of CMake makes every extension; they all lie in the same folder."""
        try:
            import torch
        except ImportError:
            sys.exit("peftkern builds against the installed torch: `pip install torch` first")
        build = Path(self.build_temp).resolve()
        output = Path(self.get_ext_fullpath(self.extensions[0].name)).resolve().parent
        jobs = os.environ.get("MAX_JOBS")
        subprocess.check_call(
            ["cmake", "-S", ".", "-B", build, "-G", "Ninja",
             f"-DPEFTKERN_TORCH={Path(torch.__file__).parent}",
             f"-DPEFTKERN_OUTPUT={output}",
             f"-DPEFTKERN_VERSION={self.distribution.get_version()}",
             f"-DPython_EXECUTABLE={sys.executable}"])  # fmt: skip
        subprocess.check_call(
            ["cmake", "--build", build, "--target", "peftkern_native"]
            + (["--parallel", jobs] if jobs else [])
        )


setup(
    ext_modules=[Extension("peftkern._ops", []), Extension("peftkern._build", [])],
    cmdclass={"build_ext": CMakeBuild},
)
