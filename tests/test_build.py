"""What is built, what is packed, and what a build says where something is missing."""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import peftkern
from peftkern import _native

ROOT = Path(__file__).parent.parent
LIBRARY = Path(os.environ.get("PEFTKERN_LIBRARY", Path(peftkern.__file__).parent / "_ops.so"))
SOURCES = [
    "CMakeLists.txt", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "Makefile", "README.md",
    "pyproject.toml", "setup.py", "peftkern/py.typed",
]  # fmt: skip
SUFFIXES = {".py", ".h", ".cpp", ".cu", ".cmake"}


def needs(*programs):
    missing = [program for program in programs if shutil.which(program) is None]
    return pytest.mark.skipif(bool(missing), reason=f"no {', '.join(missing)}")


needs_library = pytest.mark.skipif(not LIBRARY.exists(), reason="no compiled library")


def run(*command, **options):
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=True, **options
    ).stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy without what earlier builds left, since packing writes into the folder it packs."""
    copy = tmp_path_factory.mktemp("checkout") / "peftkern"
    left = ("build", "dist", "demo-out", "results", "__pycache__", ".git", ".venv", "*.so")
    ignore = shutil.ignore_patterns(*left, ".*_cache", "*.egg-info", ".benchmarks", ".hypothesis")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignore)
    for link in ("kernels", "bench"):  # an unpacked sdist has folders there
        assert (copy / "peftkern" / link).is_symlink() or not (ROOT / ".git").exists()
    (copy / "bench" / "results").mkdir()
    (copy / "bench" / "results" / "run.json").write_text("{}")
    return copy


def files_below(folder):
    """Of a room whose every file counts, named as from the repository's root."""
    found = (path for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES)
    return {str(path.relative_to(ROOT)) for path in found}


# What is packed


def test_an_sdist_holds_all_that_a_build_and_its_tests_need(checkout, tmp_path):
    script = "import sys, setup; setup.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", script, tmp_path, cwd=checkout)
    (packed,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(packed) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
        links = [member.name for member in tar if member.issym()]
    rooms = ("csrc", "kernels", "bench", "tests", "peftkern")
    wanted = set(SOURCES).union(*map(files_below, rooms))
    wanted |= {f"peftkern/{file}" for file in files_below("kernels") | files_below("bench")}
    assert not wanted - names
    assert not links, "a folder stands for each link"
    assert not {name for name in names if "/results/" in name or name.endswith((".so", ".pyc"))}


def test_a_wheel_holds_the_linked_folders_and_no_source_of_the_library(checkout, tmp_path):
    run(sys.executable, "setup.py", "-q", "build_py", "--build-lib", tmp_path, cwd=checkout)
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    wanted = files_below("peftkern") | {"peftkern/py.typed"}
    wanted |= {f"peftkern/{file}" for file in files_below("kernels") | files_below("bench")}
    assert found == wanted, "a new package must be in the list of packages in pyproject.toml"


def test_what_writes_an_adapter_is_required(checkout, tmp_path):
    """safetensors imports numpy to write a tensor, and asks for it in an extra."""
    run(sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path, cwd=checkout)
    required = (tmp_path / "peftkern.egg-info" / "requires.txt").read_text()
    assert "safetensors[torch]" in required.splitlines()


# What is built


@needs_library
@pytest.mark.skipif("PEFTKERN_LIBRARY" in os.environ, reason="the facts of another build")
def test_the_build_knows_its_own_facts():
    from peftkern import _build

    (version,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert _build.version == version
    assert re.fullmatch(r"[0-9a-f]{12}|unknown", _build.commit)
    assert re.fullmatch(r"\w+ [\d.]+", _build.compiler) and re.match(r"2\.\d+", _build.torch)
    assert _build.isas.split()[0] == "baseline"
    assert set(_native.available_isas()) <= {*_build.isas.split(), "avx512bf16"}


@needs("readelf")
@needs_library
def test_the_library_needs_neither_python_nor_cuda():
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", run("readelf", "-d", LIBRARY))
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if re.search(r"python|cuda|c10", name)], needed


@needs("readelf")
@needs_library
def test_the_library_names_no_folder_of_the_machine_that_built_it():
    assert not re.search(r"\((RPATH|RUNPATH)\)", run("readelf", "-d", LIBRARY))


@needs("cmake", "ninja", "nm", "c++")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64 has the wider sets")
def test_wide_kernels_share_no_inline_function_with_anyone(tmp_path):
    """The linker keeps one copy of a weak symbol: out of AVX-512 it would stop an older CPU."""
    run("cmake", "-S", ROOT, "-B", tmp_path, "-G", "Ninja")
    run("cmake", "--build", tmp_path, "--target", "kernels_avx2", "kernels_avx512")
    for isa in ("avx2", "avx512"):
        objects = list((tmp_path / "CMakeFiles" / f"kernels_{isa}.dir").rglob("*.o"))
        assert objects
        for line in run("nm", "-C", *objects).splitlines():
            kind, _, name = line[17:].partition(" ")
            assert kind not in tuple("WwVvu") or f"::{isa}::" in name, line


# What is missing


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("peftkern_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def a_torch(folder, version):
    folder.mkdir()
    (folder / "version.py").write_text(f"__version__ = '{version}'\n")
    return folder


def only_torch(script, monkeypatch, folder):
    """As in an isolated build: nothing to import, and `folder` the packages beside pip."""
    monkeypatch.setattr(script, "find_spec", lambda name: None)
    monkeypatch.setattr(script.sysconfig, "get_path", lambda *name, **base: str(folder))
    monkeypatch.setattr(script.site, "getusersitepackages", lambda: str(folder / "none"))


@pytest.mark.parametrize(("version", "asked"), [("2.10.1+cpu", True), ("2.11.0", False)])
def test_an_isolated_build_uses_the_torch_beside_it(script, monkeypatch, tmp_path, version, asked):
    only_torch(script, monkeypatch, tmp_path)
    assert script.get_requires_for_build_wheel() == ["torch>=2.11"]
    folder = a_torch(tmp_path / "torch", version)
    assert script.get_requires_for_build_editable() == ["torch>=2.11"] * asked
    if asked:
        with pytest.raises(SystemExit, match=r"2\.11 or newer, got 2\.10\.1\+cpu: pip install"):
            script.need_torch()
    else:
        assert script.need_torch() == folder


def test_each_missing_thing_is_one_sentence_with_its_remedy(script, monkeypatch, tmp_path):
    only_torch(script, monkeypatch, tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(script, "import_module", importlib.import_module)
    said = {
        script.need_torch: "torch must be installed, got none: pip install",
        script.need_compiler: "a C[+][+]20 compiler must be in PATH, got none: apt-get install",
        script.need_python_headers: "Python.h must be in .*, got none: apt-get install",
        script.need_pybind11: "pybind11 must be installed, got none: pip install",
        lambda: script.need_tool("no_such_tool", "BIN"): "no_such_tool must be installed, got none",
    }
    for check, sentence in said.items():
        with pytest.raises(SystemExit, match=f"^peftkern: {sentence}") as stop:
            check()
        assert "\n" not in str(stop.value)
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(SystemExit, match="CXX must name a C[+][+] compiler, got no-such-compiler"):
        script.need_compiler()


def test_jobs_fit_into_cores_and_memory(script, monkeypatch):
    monkeypatch.delenv("MAX_JOBS", raising=False)
    assert 1 <= script.jobs() <= os.cpu_count()
    monkeypatch.setattr(script, "free_gigabytes", lambda: 0.5)
    assert script.jobs() == 1
    monkeypatch.setenv("MAX_JOBS", "7")
    assert script.jobs() == 7
    for wrong in ("0", "many", "-1"):
        monkeypatch.setenv("MAX_JOBS", wrong)
        with pytest.raises(SystemExit, match=f"MAX_JOBS must be .* at least 1, got {wrong}"):
            script.jobs()


def test_an_unloadable_library_is_one_sentence(tmp_path):
    library = tmp_path / "_ops.so"
    library.write_bytes(b"\x7fELF for another machine")
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "import peftkern"],
        cwd=ROOT, env=os.environ | {"PEFTKERN_LIBRARY": str(library)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert found.returncode == 1
    last = found.stderr.strip().splitlines()[-1]
    assert re.match(r"ImportError: .*_ops\.so must be built for .*, got '.+': build", last)
    assert "During handling" not in found.stderr and "OSError" not in found.stderr
    assert found.stderr.count(str(library)) == 1, "the loader's own line names it again"
