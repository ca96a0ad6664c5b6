"""Tables of README and docs from the rows in benchmarks/results/, and from nothing else.

``python -m benchmarks.report`` rewrites every block between ``<!-- benchmark:NAME -->`` and ``<!-- /benchmark -->``;
``--check`` fails when a block is not what the rows say. A row without a GPU never enters a GPU table, and the other way round.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ["README.md", "docs/performance.md", "docs/diffusers.md", "docs/gan-ops.md", "docs/gan-training.md", "docs/attention.md"]
BLOCK = re.compile(r"(<!-- benchmark:(\S+) -->\n)(.*?)(<!-- /benchmark -->)", re.DOTALL)

Row = dict[str, Any]


def read_rows(name: str) -> list[Row]:
    """The rows of benchmarks/results/NAME.jsonl; a later row of the same case, variant and threads replaces an earlier one."""
    path = RESULTS / f"{name}.jsonl"
    if not path.exists():
        return []
    latest: dict[tuple[Any, ...], Row] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        latest[row["case"], row["variant"], row.get("threads"), row["device"]] = row
    return list(latest.values())


def time_text(us: float) -> str:
    return f"{us / 1000:.2f} ms" if us >= 1000 else f"{us:.0f} us"


def ratio_text(times: float) -> str:
    """How many times: below one with two significant digits, so that no ratio reads 0.0x."""
    return f"{times:.1f}x" if times >= 0.95 else f"{float(f'{times:.2g}'):g}x"


def without_empty_columns(lines: list[str]) -> list[str]:
    """The table without the columns in which no row has a value."""
    cells = [line.strip("|").split("|") for line in lines]
    kept = [k for k in range(len(cells[0])) if any(row[k].strip() != "-" for row in cells[2:])]
    return ["|" + "|".join(row[k] for k in kept) + "|" for row in cells]


def steps_table(rows: list[Row]) -> str:
    """One line a case: genfast beside diffusers, the compiled expression and the reference, with ratios and the share of copy bandwidth."""
    lines = [
        "| case | genfast | diffusers | ratio | torch.compile | ratio | reference | share of copy bandwidth |",
        "|---|---|---|---|---|---|---|---|",
    ]
    cases: dict[str, dict[str, Row]] = {}
    for row in rows:
        cases.setdefault(row["case"], {})[row["variant"]] = row
    for case, variants in cases.items():
        if "genfast" not in variants:
            continue
        ours = variants["genfast"]
        cells = [case, time_text(ours["median_us"])]
        for name in ("diffusers", "compiled"):
            other = variants.get(name)
            cells += [time_text(other["median_us"]), ratio_text(other["median_us"] / ours["median_us"])] if other else ["-", "-"]
        cells.append(time_text(variants["reference"]["median_us"]) if "reference" in variants else "-")
        cells.append(f"{ours['share_of_copy']:.0%}" if ours.get("share_of_copy") else "-")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(without_empty_columns(lines))


def schedulers_table(rows: list[Row]) -> str:
    """One line a class, a pair of columns a shape: stock's time and how many times faster the fused class is, with either noise."""
    shapes = list(dict.fromkeys("x".join(map(str, row["shape"])) for row in rows))
    head = "".join(f" {shape}: stock | genfast | with seeds |" for shape in shapes)
    lines = [f"| class |{head}", "|---|" + "---|---|---|" * len(shapes)]
    cells: dict[str, dict[str, dict[str, Row]]] = {}
    for row in rows:
        name, shape = row["case"].split(", ")
        cells.setdefault(name, {}).setdefault(shape, {})[row["variant"]] = row
    for name in sorted(cells):
        line = f"| {name.removesuffix('Scheduler')} |"
        for shape in shapes:
            variants = cells[name].get(shape, {})
            stock = variants.get("diffusers")
            line += f" {time_text(stock['median_us'])} |" if stock else " - |"
            for variant in ("genfast", "genfast-seeds"):
                ours = variants.get(variant)
                line += f" {ratio_text(stock['median_us'] / ours['median_us'])} |" if ours and stock else " - |"
        lines.append(line)
    return "\n".join(lines)


def operators_table(rows: list[Row]) -> str:
    """One line a case: genfast's time, and how many times longer every other variant takes."""
    others = [name for name in dict.fromkeys(row["variant"] for row in rows) if name != "genfast"]
    lines = [f"| case | genfast | {' | '.join(others)} |", "|---|---|" + "---|" * len(others)]
    cases: dict[str, dict[str, Row]] = {}
    for row in rows:
        cases.setdefault(row["case"], {})[row["variant"]] = row
    for case, variants in cases.items():
        ours = variants["genfast"]["median_us"]
        ratios = [ratio_text(variants[name]["median_us"] / ours) if name in variants else "-" for name in others]
        lines.append(f"| {case} | {time_text(ours)} | {' | '.join(ratios)} |")
    return "\n".join(lines)


def training_table(rows: list[Row]) -> str:
    """`operators_table` with genfast's share of the measured peak of matrix products and, for whole steps, seconds per 1000 images."""
    ours = {row["case"]: row for row in rows if row["variant"] == "genfast"}
    columns = [" share of matrix peak | s/kimg |", "---|---|"]
    columns += [f" {row['share_of_matrix_peak']:.0%} | {row.get('s_per_kimg', '-')} |" for row in ours.values()]
    return "\n".join(line + more for line, more in zip(operators_table(rows).splitlines(), columns, strict=True))


def source_line(rows: list[Row]) -> str:
    def all_of(key: str) -> str:
        return ", ".join(dict.fromkeys(str(row[key]) for row in rows))

    row = rows[-1]
    machine = row.get("gpu") or f"{row.get('cpu')}, {row.get('threads')} threads, {row.get('isa')}"
    commands = ", ".join(f"`{command}`" for command in dict.fromkeys(row["command"] for row in rows))
    return f"Median per step on {machine}, torch {all_of('torch')}, commit {all_of('commit')}, {all_of('date')}; {commands}."


def block(name: str) -> str:
    """The text of one block; NAME is file[:threads]."""
    file, _, threads = name.partition(":")
    rows = [r for r in read_rows(file) if not threads or str(r.get("threads")) == threads]
    tables = {
        "schedulers": schedulers_table,
        "gan": operators_table,
        "attention": operators_table,
        "qknorm": operators_table,
        "gan_training": training_table,
    }
    table = tables.get(file.split("-")[0], steps_table)
    return f"{table(rows)}\n\n{source_line(rows)}\n" if rows else "No rows yet.\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a page differs from its rows")
    arguments = parser.parse_args()
    stale = []
    for page in PAGES:
        path = ROOT / page
        if not path.exists():
            continue
        old = path.read_text()
        new = BLOCK.sub(lambda m: m[1] + block(m[2]) + m[4], old)
        if new != old:
            stale.append(page)
            if not arguments.check:
                path.write_text(new)
    print(
        f"report: {'stale' if arguments.check else 'rewritten'}: {', '.join(stale)}"
        if stale
        else "report: every table is what its rows say"
    )
    return int(arguments.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
