"""`bench --predict`: floors by hand, and nothing that could pass for a measurement."""

import json
import sys
from pathlib import Path

import pytest
import torch

from peftkern import cli
from peftkern.bench import predict, qlora_gpu, record, sass, table
from peftkern.bench.predict_data import DEVICES, SLOTS
from peftkern.kernels import qlora_paths


@pytest.fixture(autouse=True)
def no_device(monkeypatch):
    """Nor a word with the driver; compiling takes its time in one test alone."""

    def asked(*_):
        raise AssertionError("a GPU was asked for")

    for name in ("get_device_capability", "get_device_properties", "get_device_name", "_lazy_init"):
        monkeypatch.setattr(torch.cuda, name, asked)
    monkeypatch.setattr(sass, "tools", lambda: (None, None))


def row_of(device, case, counted=None):
    (found,) = (row for row in predict.predict(device, counted) if row.case == case)
    return found


def test_one_row_of_a_large_weight_is_bound_by_memory():
    row = row_of("h200", "14336 x 4096, 1 row")
    weights = 14336 * 4096
    assert (row.path, row.bound) == ("decode", "memory")
    # Half a byte a code, 4 bytes for 64 of them, and two a number of x and y.
    assert row.bytes == weights // 2 + weights // 16 + 2 * (4096 + 14336) == 33_067_008
    assert row.operations == 2 * weights
    assert row.slots == 2.9
    assert row.floor_us == row.memory_us == pytest.approx(33.067008 / 4.8)
    assert row.matrix_us == pytest.approx(117.440512 / 989)
    assert row.issue_us == pytest.approx(2.9 * 58.720256 / (132 * 128 * 1.98e-3))
    assert row.goal == "60% of bandwidth: 11.5 µs; 1.5x as fast as bitsandbytes"
    assert row.group == "qlora linear, forward: 14336 x 4096, 1 row"


def test_more_rows_take_the_wider_kernel_and_an_adapter_its_operations():
    assert [row_of("a100", f"4096 x 4096, {m} rows").slots for m in (8, 16)] == [2.9, 3.4]
    row = row_of("a100", "4096 x 4096, 1 row, r 16")
    assert row.operations == 2 * 4096 * 4096 + 2 * 16 * (4096 + 4096)
    assert row.bytes == 4096 * 4096 * 9 // 16 + 2 * (16 + 1) * 8192
    assert row.goal == ""


def test_the_path_is_that_of_the_architecture_and_says_what_decoding_costs():
    found = [row_of(device, "4096 x 4096, 64 rows") for device in ("a100", "h100")]
    assert [(row.path, row.slots, row.bound) for row in found] == [
        ("gemm", SLOTS["gemm 64"], "issue"),
        ("panels", SLOTS["panel"], "issue"),
    ]
    assert found[0].issue_us == pytest.approx(9.5 * 16.777216 / (108 * 128 * 1.41e-3))
    assert row_of("h100", "4096 x 4096, 32 rows").path == "gemm"


def test_training_multiplies_and_decodes_twice():
    row = row_of("h200", "4096 x 4096, 2048 rows, r 16, dropout 0.1")
    assert (row.path, row.direction, row.bound) == ("panels", "forward+backward", "matrix")
    assert row.operations == 4 * 2048 * 4096**2 + 6 * 2048 * 16 * 8192
    assert row.slots == 2 * SLOTS["panel"]
    assert row.floor_us == row.matrix_us == pytest.approx(row.operations / 989e6)
    assert "1.15x" in row.goal and "peft + bitsandbytes" in row.goal
    assert row_of("h200", "4096 x 4096, 2048 rows, r 16").goal == "1.1x as fast as unsloth"


@pytest.mark.parametrize("device", DEVICES)
def test_every_row_of_the_gpu_benchmark_is_there(device):
    rows = predict.predict(device)
    names = {name.split(": ", 1)[1] for name in qlora_gpu.jobs("cuda")}
    assert {row.case for row in rows} == names and len(rows) == len(names)
    assert all(row.floor_us == max(row.memory_us, row.matrix_us, row.issue_us) for row in rows)
    assert all((row.goal != "") <= (device == "h200") for row in rows)


def test_what_a_user_has_measured_is_left_out_and_the_tables_are_as_before(monkeypatch, tmp_path):
    tiles = tmp_path / "tiles.json"
    tiles.write_text("no JSON")
    monkeypatch.setenv("PEFTKERN_TILES", str(tiles))
    qlora_paths._own.cache_clear()
    before = qlora_paths.architecture, qlora_paths._own
    assert predict.predict("h200")
    assert (qlora_paths.architecture, qlora_paths._own) == before


def test_a_device_that_is_not_there_is_refused_with_the_list(capsys):
    with pytest.raises(ValueError, match="must be one of h200, h100, a100, got v100"):
        predict.predict("v100")
    assert cli.main(["bench", "--predict", "v100"]) == 2
    assert "DEVICE must be one of h200, h100, a100, got v100" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--json", "x.json"], "--json must stand with --predict"),
        (["--predict", "h200", "--out", "x.json"], "--out must not stand with --predict"),
        (["--predict", "h200", "--tune"], "not allowed with"),
        (["model", "--predict", "h200"], "FAMILY must be qlora with --predict, got model"),
    ],
)
def test_arguments_that_make_no_sense_are_status_2(arguments, said, capsys):
    assert cli.main(["bench", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_no_number_stands_without_its_label(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "rich.console", None)  # lines that can be taken apart
    file = tmp_path / "predicted.json"
    assert cli.main(["bench", "--predict", "h200", "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    assert shown.count(f"{predict.LABEL}: qlora linear, ") == 2
    rows = predict.predict("h200")
    for row in rows:
        for heading, cell in zip(predict.HEADINGS, predict.cells(row), strict=True):
            said = heading in ("case", "path", "slots from", "goal")
            assert said or heading.startswith("predicted "), heading
            assert cell in shown
    stored = json.loads(file.read_text())
    assert (stored["kind"], stored["label"]) == ("peftkern prediction", "predicted, not measured")
    assert stored["device"]["source"] == DEVICES["h200"].source
    assert [row["label"] for row in stored["predictions"]] == [predict.LABEL] * len(rows)
    assert [row["floor_us"] for row in stored["predictions"]] == [row.floor_us for row in rows]


def test_no_table_of_measured_rows_takes_a_prediction(tmp_path):
    predicted, measured, readme = (tmp_path / name for name in ("p.json", "m.json", "R.md"))
    predict.save("h200", predict.predict("h200"), predicted)
    record.save([], measured)
    text = f"{table.BEGIN}\n{table.END}\n"
    readme.write_text(text)
    for files in ([predicted], [measured, predicted]):
        with pytest.raises(ValueError, match="must hold measured rows, got a peftkern prediction"):
            table.main([*map(str, files), str(readme)])
    assert readme.read_text() == text


LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA 0x80 ;
        /*0020*/                   LDGSTS.E.BYPASS.128 [R2], [R4.64] ;
        /*0030*/                   FFMA R0, R0, R1, R2 ;
        /*0040*/              @P1  BRA 0x30 ;
        /*0050*/                   IADD3 R4, R4, 0x1, RZ ;
        /*0060*/              @P0  BRA 0x20 ;
        /*0070*/              @!P2 BRA 0x0 ;
        /*0080*/                   EXIT ;
"""


def test_the_main_loop_is_the_shortest_that_copies_ahead():
    code = sass.listing(LISTING)
    assert len(code) == 9 and code[1] == (0x10, "BRA 0x80")
    assert sass.main_loop(code) == 5
    assert sass.main_loop(code[2:5]) == 0
    assert sass.readable("_ZN413decode_kernelINS_4bf16ENS0_6LayoutILi4ELi64ELb0EEELi8EEEv12") == (
        "decode half 4 64 0 8"
    )


def test_slots_come_from_the_machine_code_where_there_is_a_toolkit(monkeypatch):
    def compiled(source, nvcc, cuobjdump, folder, architectures):
        assert source.is_file() and (nvcc, cuobjdump) == ("nvcc", "cuobjdump")
        assert architectures == ["sm_80"]
        yield sass.Kernel("decode half 4 64 0 8", "sm_80", 32, 0, 0, 256, sass.listing(LISTING))

    monkeypatch.setattr(sass, "compiled", compiled)
    stated = row_of("a100", "4096 x 4096, 1 row")
    assert (stated.slots, stated.slots_from) == (2.9, predict.STATED)
    monkeypatch.setattr(sass, "tools", lambda: ("nvcc", None))
    assert row_of("a100", "4096 x 4096, 1 row") == stated
    monkeypatch.setattr(sass, "tools", lambda: ("nvcc", "cuobjdump"))
    row = row_of("a100", "4096 x 4096, 1 row")
    assert (row.slots, row.slots_from) == (5 / 64, "SASS of sm_80")
    other = row_of("a100", "4096 x 4096, 16 rows")
    assert (other.slots, other.slots_from) == (3.4, predict.STATED)


def test_without_sources_the_stated_slots_are_taken(monkeypatch, tmp_path):
    monkeypatch.setattr(sass, "tools", lambda: ("/no/nvcc", "/no/cuobjdump"))
    monkeypatch.setattr(predict, "DECODE_SOURCE", tmp_path / "cuda_decode.cu")
    assert predict.count("sm_90a") == {}


def test_a_toolkit_that_does_not_work_is_status_1(monkeypatch, tmp_path, capsys):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho no host compiler >&2\nexit 1\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(sass, "tools", lambda: (str(nvcc), str(Path(sys.executable))))
    assert cli.main(["bench", "--predict", "h200"]) == 1
    said = capsys.readouterr().err
    assert said == "peftkern: nvcc must compile cuda_decode.cu, got: no host compiler\n"
