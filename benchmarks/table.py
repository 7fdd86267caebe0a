"""Results as a file for programs, a page for readers, and the table in benchmarks/README.md.

Results of a day and machine share `results/<date>_performance.json` and `.md`; running some benchmarks again replaces their
rows and keeps the others.
"""

from __future__ import annotations

import datetime
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import psutil

from benchmarks.catalog import CATALOG, Benchmark
from benchmarks.measuring import Outcome, Scale
from planners.errors import DatasetError
from planners.files import read_json, replacing, write_json

HERE = Path(__file__).parent
RESULTS = HERE / "results"
README = HERE / "README.md"
_BEGIN = "<!-- table: written by `python -m benchmarks readme` -->"
_END = "<!-- end of the table -->"


def row_of(benchmark: Benchmark, outcome: Outcome, scale: Scale, rounds: int) -> dict:
    """A row of the table, in JSON types."""
    memory, goal = outcome.memory_ratio, benchmark.memory_goal
    lean = goal is None or memory is None or memory <= goal
    return {
        "what": benchmark.what,
        "against": benchmark.against,
        "scale": scale.value,
        "rounds": rounds,
        "commit": _commit(),
        "reference_cpu_s": outcome.reference.cpu_s,
        "ours_cpu_s": outcome.ours.cpu_s,
        "ratio": outcome.ratio,
        "spread": [min(outcome.ratios), max(outcome.ratios)],
        "goal": benchmark.goal,
        "memory_ratio": memory,
        "memory_goal": goal,
        "agreement": outcome.agreement.text,
        "agrees": outcome.agreement.holds,
        "met": outcome.ratio >= benchmark.goal and outcome.agreement.holds and lean,
    }


def store(name: str, row: dict) -> Path:
    """Write a row into today's files; returns the page."""
    date, machine = datetime.date.today().isoformat(), this_machine()
    file = RESULTS / f"{date}_performance.json"
    found = read_json(file) if file.is_file() else {}
    rows = found["rows"] if found.get("machine") == machine else {}
    rows[_key(name, row)] = row
    content = {"date": date, "machine": machine, "rows": _in_order(rows)}
    write_json(file, content)
    return write_page("performance", _page(content))


def write_page(name: str, text: str) -> Path:
    """Write `results/<date>_<name>.md`; returns it."""
    page = RESULTS / f"{datetime.date.today().isoformat()}_{name}.md"
    with replacing(page) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return page


def markdown(rows: dict[str, dict]) -> str:
    """The table of readers."""
    lines = [
        "| benchmark | what | reference, CPU s | ours, CPU s | ratio (rounds) | goal | memory (goal) | agreement | met |",
        "|---|---|--:|--:|--:|--:|--:|---|---|",
    ]
    for name, row in rows.items():
        low, high = row["spread"]
        memory = "–" if row["memory_ratio"] is None else f"{row['memory_ratio']:.2f}"
        if row["memory_goal"] is not None:
            memory += f" (≤ {row['memory_goal']:g})"
        against = "" if row["against"] == "nnunet" else f", against {row['against']}"
        lines.append(
            f"| {name} | {row['what']}{against} | {_seconds(row['reference_cpu_s'])} | {_seconds(row['ours_cpu_s'])} "
            f"| **{row['ratio']:.1f}** ({low:.1f} to {high:.1f}) | {row['goal']:g} | {memory} | {row['agreement']} "
            f"| {'yes' if row['met'] else 'no'} |"
        )
    return "\n".join(lines)


def update_readme() -> Path:
    """Put the newest results at full size into benchmarks/README.md, between its two marks; returns the results' page."""
    files = sorted(RESULTS.glob("*_performance.json"))
    if not files:
        raise DatasetError("No results yet", where=RESULTS, remedy="python -m benchmarks run")
    content = read_json(files[-1])
    rows = {name: row for name, row in content["rows"].items() if row["scale"] == Scale.full.value}
    page = files[-1].with_suffix(".md")
    block = f"{_heading(content)}\nSource: [{page.name}](results/{page.name}).\n\n{markdown(rows)}"
    before, _, rest = README.read_text(encoding="utf-8").partition(_BEGIN)
    _, _, after = rest.partition(_END)
    with replacing(README) as temporary:
        temporary.write_text(f"{before}{_BEGIN}\n{block}\n{_END}{after}", encoding="utf-8")
    return page


def _page(content: dict) -> str:
    parts = [f"# Performance, {content['date']}\n\n{_heading(content)}"]
    for scale, title in (("full", "Full size"), ("small", "Small, as CI runs it")):
        rows = {name: row for name, row in content["rows"].items() if row["scale"] == scale}
        if rows:
            commits = ", ".join(sorted({row["commit"] for row in rows.values()}))
            names = " ".join(name.removesuffix(" (small)") for name in rows)
            command = (
                f"python -m benchmarks run {names} --scale {scale} --rounds {max(r['rounds'] for r in rows.values())}"
            )
            parts.append(f"## {title}\n\n```bash\n{command}\n```\n\nCommit {commits}.\n\n{markdown(rows)}")
    return "\n\n".join(parts) + "\n"


def machine_text(machine: dict) -> str:
    """Cores, memory and versions, as a phrase."""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    return f"{machine['cores']} cores of an {machine['cpu']}, {machine['memory_gb']} GB, {versions}"


def _heading(content: dict) -> str:
    return (
        f"Measured on {content['date']}: {machine_text(content['machine'])}. CPU time is user + system, the median of the "
        "rounds, which alternate in one process; the ratio stands beside its lowest and highest round. Memory is the peak "
        "growth of ours over the reference's, without that of processes they start."
    )


def this_machine() -> dict:
    """What results depend on and are not mixed across."""
    return {
        "cpu": _cpu(),
        "cores": psutil.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30),
        "versions": {
            "Python": platform.python_version(),
            **{name: version(name) for name in ("torch", "nnunetv2", "numpy", "scipy")},
        },
    }


def _cpu() -> str:
    information = Path("/proc/cpuinfo")
    if not information.is_file():
        return platform.processor() or platform.machine()
    fields = (line.partition(":") for line in information.read_text().splitlines())
    return next((value.strip() for key, _, value in fields if key.strip() == "model name"), platform.machine())


def _commit() -> str:
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=HERE, capture_output=True, text=True
    )
    return described.stdout.strip() or "unknown"


def _key(name: str, row: dict) -> str:
    return name if row["scale"] == Scale.full.value else f"{name} ({row['scale']})"


def _in_order(rows: dict[str, dict]) -> dict[str, dict]:
    known = [key for name in CATALOG for key in (name, f"{name} (small)") if key in rows]
    return {key: rows[key] for key in [*known, *(key for key in rows if key not in known)]}


def _seconds(value: float) -> str:
    return f"{value:.3g}"
