"""What importing the package does, and does not do, and whether its surface says what it is."""

import ast
import inspect
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import peftkern
from peftkern import _native

ROOT = Path(__file__).parent.parent
HEAVY = ("transformers", "peft", "bitsandbytes", "matplotlib", "triton", "rich", "gguf")
MODULES = (peftkern, peftkern.qlora)
PUBLIC = [
    (module.__name__, name)
    for module in MODULES
    for name in module.__all__
    if callable(getattr(module, name))  # a module or a table has no parameters
]


def run(script, **options):
    """In a fresh interpreter whose first import folder is the repository's root."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        cwd=ROOT, capture_output=True, text=True, **options,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result


def test_other_packages_import_from_the_root_of_the_repository():
    script = "\n".join(
        [
            "import sys, peft, bitsandbytes, peftkern",
            "assert peft.LoraConfig and bitsandbytes.nn.Linear4bit",
            f"here = {str(ROOT)!r}",
            "for module in (peft, bitsandbytes):",
            "    assert 'site-packages' in module.__file__, module.__file__",
            "assert peftkern.__file__.startswith(here), peftkern.__file__",
        ]
    )
    run(script)


def test_the_folder_of_kernels_does_not_hide_the_package_of_that_name(tmp_path):
    """A stand-in for Hugging Face's `kernels`, later in the path than the repository's root."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("stand_in = True")
    run(f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; assert kernels.stand_in")
    if find_spec("kernels") and find_spec("kernels").origin:  # the real one, where it is installed
        run("import kernels; assert 'site-packages' in kernels.__file__")


def test_nothing_is_printed_on_import():
    result = run("import peftkern")
    assert (result.stdout, result.stderr) == ("", "")


def test_no_extra_is_imported_along():
    """torch itself may import some; only what our import adds counts."""
    script = "\n".join(
        [
            "import sys, torch, safetensors.torch",
            f"heavy, before = {HEAVY}, set(sys.modules)",
            "import peftkern",
            "print(*(n for n in heavy if n in sys.modules and n not in before))",
        ]
    )
    assert run(script).stdout.strip() == ""


def test_a_state_dict_loads_where_numpy_is_missing():
    script = "\n".join(
        [
            "import sys",
            "sys.modules['numpy'] = None",
            "from peftkern import QLoRALinear",
            "from torch import nn",
            "layer = QLoRALinear.from_linear(nn.Linear(64, 8), r=2, base='nf4')",
            "print(layer.load_state_dict(layer.state_dict()))",
        ]
    )
    assert "All keys matched" in run(script).stdout


def test_the_types_are_published():
    assert (Path(peftkern.__file__).parent / "py.typed").exists()


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_init_files_hold_public_names_and_nothing_else(module):
    tree = ast.parse(Path(module.__file__).read_text())
    kinds = (ast.Expr, ast.Import, ast.ImportFrom, ast.Assign)
    assert all(isinstance(node, kinds) for node in tree.body)
    imported = [alias.name for n in tree.body if isinstance(n, ast.ImportFrom) for alias in n.names]
    assert sorted(imported) == sorted(module.__all__) == list(module.__all__)


def parameters(thing):
    if inspect.isclass(thing):
        thing = thing.__init__
    names = [name for name in inspect.signature(thing).parameters if name != "self"]
    return [name for name in names if name not in ("args", "kwargs")]


@pytest.mark.parametrize(("module", "name"), PUBLIC)
def test_every_public_name_is_documented(module, name):
    thing = getattr(sys.modules[module], name)
    text = inspect.getdoc(thing)
    assert text and text.splitlines()[0].endswith((".", "…", ":")), "a sentence first"
    names = parameters(thing)
    if names:
        assert "Args:" in text, "Args"
        section = text.split("Args:")[1]
        missing = [n for n in names if n not in section]
        assert not missing, f"Args lacks {missing}"
    if inspect.isfunction(thing):
        source = ast.parse(inspect.getsource(thing)).body[0]
        returns = inspect.signature(thing).return_annotation
        assert ("Returns:" in text) == (returns not in (None, "None")), "Returns"
        if any(isinstance(node, ast.Raise) for node in ast.walk(source)):
            assert "Raises:" in text, "Raises"


def test_info_tells_what_serves_what():
    info = peftkern.info()
    assert set(info.kernels) >= {"qlora_quantize", "qlora_dequantize", "qlora_linear"}
    loaded = bool(info.available_isas)
    assert {kernels.get("cpu") for kernels in info.kernels.values()} == {
        "C++" if loaded else "reference", None,
    }  # fmt: skip
    steps = {op for op, kernels in info.kernels.items() if "cpu" not in kernels}
    assert steps == {"qlora_decode", "onebit_decode", "sparse_sample_"}
    assert (info.isa != "none") == loaded and (info.build or not loaded)
    lines = str(info).splitlines()
    for begin in (f"peftkern {info.version}", f"torch    {info.torch}", f"isa      {info.isa}"):
        assert any(line.startswith(begin) for line in lines), begin
    for begin in (*info.kernels, *info.devices):
        assert any(line.split()[:1] == [begin] for line in lines), begin


def test_an_op_without_a_kernel_runs_its_reference_and_says_so_once(monkeypatch):
    monkeypatch.setattr(_native, "_warned", set())
    run = _native._announced("some_op", lambda x: x + 1)
    with pytest.raises(NotImplementedError, match="some_op has no kernel for cpu in this build"):
        run(torch.ones(1))
    monkeypatch.delenv("PEFTKERN_STRICT")
    with pytest.warns(UserWarning, match="some_op has no kernel for cpu"):
        assert run(torch.ones(1)) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(torch.ones(1)) == 2
