"""Which toolkit a build takes for CUDA, for which GPUs, what it says of that."""

import os
import re
import shutil
import subprocess

import pytest
from test_build import ROOT, run, script  # noqa: F401

TOOLKIT = ROOT / "csrc" / "toolkit.cmake"
ARCHITECTURES = "80 86 89 90 100 103 110 120"
NOTHING = "no CUDA kernels: "


def a_toolkit(folder, version="13.0.88", architectures=ARCHITECTURES, error=""):
    """Its nvcc answers what is asked of it, and compiles unless there is an error."""
    (folder / "bin").mkdir(parents=True)
    nvcc = folder / "bin" / "nvcc"
    known = "".join(f"compute_{number}\\n" for number in architectures.split())
    nvcc.write_text(
        f"""#!/bin/sh
case "$1" in
  --version) echo "Build cuda_{version[:4]}.r, V{version}" ;;
  --list-gpu-arch) printf '{known}' ;;
  *) echo "$@" > "{folder}/asked"; echo "{error}" >&2; test -z "{error}" ;;
esac
"""
    )
    nvcc.chmod(0o755)
    return folder


@pytest.fixture
def take(tmp_path, monkeypatch):
    """What CMake decides; it sees no toolkit but the one in CUDA_HOME."""
    cmake, sh = shutil.which("cmake"), shutil.which("sh")
    if cmake is None:
        pytest.skip("no cmake")
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sh").symlink_to(sh)
    for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "CUDAHOSTCXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    text = TOOLKIT.read_text().replace("PATHS /usr/local/cuda", f"PATHS {tmp_path}/none")
    (tmp_path / "toolkit.cmake").write_text(text)
    (tmp_path / "ask.cmake").write_text(
        'include(toolkit.cmake)\nmessage(STATUS "TAKEN:${cuda_taken}:${cuda_version}:'
        '${CMAKE_CUDA_COMPILER}:${CMAKE_CUDA_ARCHITECTURES}")\n'
    )

    def ask(choice="auto", **variables):
        found = subprocess.run(
            [cmake, f"-DPEFTKERN_CUDA={choice}", "-DCMAKE_CXX_COMPILER=/a/c++", "-P", "ask.cmake"],
            cwd=tmp_path, env=os.environ | variables, capture_output=True, text=True,
        )  # fmt: skip
        if found.returncode:  # CMake breaks its lines
            return " ".join(found.stderr.split())
        return re.search("TAKEN:(.*)", found.stdout).group(1)

    return ask


def test_what_is_found_is_taken_and_said(take, tmp_path):
    home = a_toolkit(tmp_path / "cuda")
    wanted = (
        "CUDA kernels for sm_80+PTX sm_90a sm_100 sm_120 by nvcc 13.0.88:13.0.88:"
        f"{home}/bin/nvcc:80-real;80-virtual;90a-real;100-real;120-real"
    )
    for choice in ("auto", "on"):
        assert take(choice, CUDA_HOME=str(home)) == wanted
    assert "-ccbin /a/c++ " in (home / "asked").read_text()
    take("on", CUDA_HOME=str(home), CUDAHOSTCXX="/an/older/c++")
    assert "-ccbin /an/older/c++ " in (home / "asked").read_text()
    for there, elsewhere in ((home, None), (a_toolkit(tmp_path / "old", "11.8.89"), home)):
        path = f"{there / 'bin'}{os.pathsep}{os.environ['PATH']}"
        variables = {"CUDA_HOME": str(elsewhere)} if elsewhere else {}
        assert take("auto", PATH=path, **variables) == wanted


def test_an_older_toolkit_compiles_for_the_gpus_that_it_knows(take, tmp_path):
    home = a_toolkit(tmp_path / "cuda", "12.4.131", "75 80 86 89 90")
    assert take(CUDA_HOME=str(home)).startswith("CUDA kernels for sm_80+PTX sm_90a by nvcc 12.4")


@pytest.mark.parametrize(
    ("listed", "names"),
    [
        ("8.6", "sm_86"),
        ("8.0;9.0a+PTX", "sm_80 sm_90a+PTX"),
        ("7.0 7.5 8.0+PTX", "sm_80+PTX"),
        ("Ampere;Hopper", "sm_80 sm_86+PTX sm_90+PTX"),
        ("10.3 12.0", "sm_103 sm_120"),
    ],
)
def test_the_list_of_torch_is_obeyed(take, tmp_path, listed, names):
    home = a_toolkit(tmp_path / "cuda")
    taken = take(CUDA_HOME=str(home), TORCH_CUDA_ARCH_LIST=listed)
    assert taken.startswith(f"CUDA kernels for {names} by nvcc")
    numbers = re.findall(r"sm_(\w+)(\+PTX)?", names)
    wanted = [f"{n}-{kind}" for n, ptx in numbers for kind in ["real", "virtual"][: 1 + bool(ptx)]]
    assert taken.rpartition(":")[2].split(";") == wanted


@pytest.mark.parametrize(
    ("listed", "error"),
    [
        ("sm_80", "must list versions such as 8.0 and 9.0a+PTX or names from Ampere on, got sm_80"),
        ("8.0 9.9", "must list what nvcc 13.0.88 compiles, got 9.9"),
    ],
)
def test_a_list_that_cannot_be_obeyed_is_refused(take, tmp_path, listed, error):
    home = a_toolkit(tmp_path / "cuda")
    for choice in ("auto", "on"):
        said = take(choice, CUDA_HOME=str(home), TORCH_CUDA_ARCH_LIST=listed)
        assert f"peftkern: TORCH_CUDA_ARCH_LIST {error}" in said


def test_off_does_not_even_look(take, tmp_path):
    home = a_toolkit(tmp_path / "cuda")
    assert take("off", CUDA_HOME=str(home)) == f"{NOTHING}PEFTKERN_CUDA is off:none::"
    assert not (home / "asked").exists()


def test_what_is_missing_is_told_and_where_it_is_insisted_on_stops(take, tmp_path):
    old = a_toolkit(tmp_path / "old", "11.8.89")
    torn = a_toolkit(tmp_path / "torn", error="host_config.h: error: unsupported GNU version!")
    reasons = {
        "nvcc must be in CUDA_HOME, PATH or /usr/local/cuda, got none": {},
        "nvcc must be 12.0 or newer, the first to know C++20, got 'V11.8.89'": {"CUDA_HOME": old},
        "must compile with /a/c++, got 'host_config.h: error: unsupported GNU version!'": {
            "CUDA_HOME": torn
        },
        "TORCH_CUDA_ARCH_LIST must list a version from 8.0 on, got 7.5": {
            "CUDA_HOME": a_toolkit(tmp_path / "cuda"), "TORCH_CUDA_ARCH_LIST": "7.5",
        },
    }  # fmt: skip
    for reason, variables in reasons.items():
        variables = {name: str(value) for name, value in variables.items()}
        taken = take("auto", **variables)
        assert taken.startswith(NOTHING) and reason in taken and taken.endswith(":none::")
        said = take("on", **variables)
        assert f"{reason}" in said and "and PEFTKERN_CUDA is on" in said
    assert "PEFTKERN_CUDA must be on, off or auto, got yes" in take("yes")


def test_the_build_insists_before_it_asks_cmake(script, monkeypatch, tmp_path):  # noqa: F811
    for name in ("PEFTKERN_CUDA", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert script.need_toolkit() == "auto"
    monkeypatch.setenv("PEFTKERN_CUDA", "yes")
    with pytest.raises(SystemExit, match="^peftkern: PEFTKERN_CUDA must be on, off or auto, got y"):
        script.need_toolkit()
    monkeypatch.setenv("PEFTKERN_CUDA", "on")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(script, "TOOLKIT", str(tmp_path / "none"))
    with pytest.raises(SystemExit, match="^peftkern: nvcc must be in .* is on, got none: inst"):
        script.need_toolkit()
    monkeypatch.setenv("CUDA_HOME", str(a_toolkit(tmp_path / "cuda")))
    assert script.need_toolkit() == "on"
