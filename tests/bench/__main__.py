"""`python -m tests.bench [NAME ...] [--quick] [--json FILE]`: a table, and the same with every sample as JSON."""

import argparse
import importlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import libvirt
from rich.console import Console
from rich.table import Table
from tests.bench.harness import HOME, RESULTS, Figure
from tests.lab.hypervisor import Hypervisor
from tests.lab.leftovers import find_leftovers, mark_children

_WITH_HYPERVISOR = ("claim", "loop", "memory")
_ALONE = ("seal", "scrub", "restore", "chain", "stall", "upload")
NAMES = (*_WITH_HYPERVISOR, *_ALONE)
_COLUMNS = ("figure", "ours", "other", "ratio", "target", "met?")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of {', '.join(NAMES)}; default: all")
    parser.add_argument("--quick", action="store_true", help="small sizes, one round: right or wrong, not fast or slow")
    parser.add_argument(
        "--json", type=Path, default=RESULTS / "bench.json", metavar="FILE", help="default: %(default)s"
    )
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(NAMES)
    if unknown:
        parser.error(f"there is no bench {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    libvirt.registerErrorHandler(lambda *_: None, None)
    token = mark_children()
    figures = _run([name for name in NAMES if name in (arguments.names or NAMES)], quick=arguments.quick)
    _write(arguments.json, figures, quick=arguments.quick)
    _show(figures)
    left = find_leftovers(token, [HOME])
    if left:
        print("left behind:", *left, sep="\n", file=sys.stderr)
    return 1 if left else 0


def _run(names: Sequence[str], *, quick: bool) -> list[Figure]:
    HOME.mkdir(parents=True, exist_ok=True)
    figures: list[Figure] = []
    try:
        with ExitStack() as resources:
            lab = {}
            if set(names) & set(_WITH_HYPERVISOR):
                lab["hypervisor"] = resources.enter_context(Hypervisor())
            for name in names:
                started_s = time.monotonic()
                bench = importlib.import_module(f"tests.bench.{name}")
                figures += bench.run(quick=quick, **(lab if name in _WITH_HYPERVISOR else {}))
                words = f"{name}: {time.monotonic() - started_s:.0f} s; load {os.getloadavg()[0]:.2f}"
                print(words, file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(HOME)
    return figures


def _write(path: Path, figures: Sequence[Figure], *, quick: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    machine = {"machine": platform.machine(), "kernel": platform.release(), "python": platform.python_version()}
    machine |= {"cpus": str(os.cpu_count()), "cpu": _cpu()}
    about = {"quick": quick, "at_s": int(time.time()), "machine": machine}
    path.write_text(json.dumps(about | {"figures": [asdict(figure) for figure in figures]}, indent=1) + "\n")


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "")


def _show(figures: Sequence[Figure]) -> None:
    table = Table(*_COLUMNS, title=r"median \[least..most], round by round", show_lines=True)
    for figure in figures:
        met = {None: "", True: "[green]yes", False: "[red]NO"}[figure.met]
        table.add_row(figure.name, figure.ours, figure.other, figure.ratio, figure.target, met)
        if figure.met is False or (figure.met is None and figure.binds):
            table.add_row("", f"[dim]{figure.binds}", "", "", "", "")
    Console(width=None if sys.stdout.isatty() else 200).print(table)


if __name__ == "__main__":
    sys.exit(main())
