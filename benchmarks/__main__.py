"""`python -m benchmarks run|list|plot|readme|gpu`: what autoseg costs beside nnU-Net v2 and others."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

# Before numpy and torch are imported: threads that wait for each other count as CPU time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

_ON_A_DEVICE = (["training_step"], ["pretrain_step", "all"], ["prediction_step"])


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 where a goal is missed."""
    given = _parser().parse_args(arguments)
    return given.command(given)


def _parser() -> argparse.ArgumentParser:
    from benchmarks.catalog import CATALOG

    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="measure, print and store")
    run.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    run.add_argument("--against", choices=sorted({b.against for b in CATALOG.values()}), help="only these references")
    run.add_argument("--scale", choices=["small", "full"], default="full", help="small: seconds, no data needed")
    run.add_argument("--rounds", type=int, default=3, help="of each side, in alternation")
    run.set_defaults(command=_run)
    commands.add_parser("list", help="names, goals and what is measured").set_defaults(command=_list)
    plot = commands.add_parser("plot", help="how cost grows with the size of the problem")
    plot.add_argument("names", nargs="*", metavar="NAME", help="of voxels, labels, cases; default: all")
    plot.set_defaults(command=_plot)
    commands.add_parser("readme", help="put the newest results into benchmarks/README.md").set_defaults(command=_readme)
    gpu = commands.add_parser("gpu", help="training, pretraining and prediction on a GPU: hours on a CPU")
    gpu.add_argument("--device", default="cuda")
    gpu.set_defaults(command=_gpu)
    return parser


def _run(given: argparse.Namespace) -> int:
    from benchmarks.catalog import CATALOG
    from benchmarks.measuring import Scale, compare, opened
    from benchmarks.table import markdown, row_of, store

    unknown = set(given.names) - set(CATALOG)
    if unknown:
        print(f"No benchmark {', '.join(sorted(unknown))}; there are {', '.join(CATALOG)}", file=sys.stderr)
        return 2
    scale, rows = Scale(given.scale), {}
    for name, benchmark in CATALOG.items():
        if (given.names and name not in given.names) or given.against not in (None, benchmark.against):
            continue
        with opened(benchmark.make(scale)) as duel:
            rows[name] = row_of(benchmark, compare(duel, given.rounds), scale, given.rounds)
        print(markdown({name: rows[name]}).splitlines()[-1], flush=True)
        page = store(name, rows[name])
    print(f"\n{markdown(rows)}\n\nWrote {page}" if rows else "Nothing to run")
    return int(not all(row["met"] for row in rows.values()))


def _list(given: argparse.Namespace) -> int:
    from benchmarks.catalog import CATALOG

    for name, benchmark in CATALOG.items():
        print(f"{name:22} >= {benchmark.goal:3g}x  {benchmark.against:7} {benchmark.what}")
    return 0


def _plot(given: argparse.Namespace) -> int:
    from benchmarks.growth import CURVES, measure_curve, plot_curve

    unknown = set(given.names) - set(CURVES)
    if unknown:
        print(f"No curve {', '.join(sorted(unknown))}; there are {', '.join(CURVES)}", file=sys.stderr)
        return 2
    for name in given.names or CURVES:
        print(f"Wrote {plot_curve(measure_curve(name))}")
    return 0


def _readme(given: argparse.Namespace) -> int:
    from benchmarks.table import README, update_readme

    print(f"Wrote {update_readme().name} into {README}")
    return 0


def _gpu(given: argparse.Namespace) -> int:
    from benchmarks.table import HERE, write_page
    from planners.device import choose_device
    from planners.errors import SettingsError

    try:
        choose_device(given.device)
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 2
    page, worst = "# On a GPU\n", 0
    for name, *arguments in _ON_A_DEVICE:
        command = ["-m", f"benchmarks.{name}", *arguments, "--device", given.device]
        # Each in a process of its own, so that none finds memory taken; what is finished is kept if a later one fails.
        done = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, encoding="utf-8", cwd=HERE.parent)
        page += f"\n## `python {' '.join(command)}`\n\n{done.stdout}"
        page += "Failed.\n" if done.returncode else ""
        worst = max(worst, abs(done.returncode))
        print(f"Wrote {write_page('gpu', page)}", flush=True)
    return worst


if __name__ == "__main__":
    sys.exit(main())
