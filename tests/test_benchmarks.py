"""The benchmarks run and write rows; their figures are nobody's business here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import ceilings, report
from benchmarks import run as runner
from benchmarks.cases import step_cases
from benchmarks.composites import StockRun, expression
from benchmarks.steps import Fused
from benchmarks.timing import Options, Row
from genfast import ops

ROOT = Path(__file__).resolve().parent.parent


def test_quick_run_writes_rows(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.run", "--quick", "--device", "cpu", "--out", str(tmp_path), "--filter", "2M"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    rows = [json.loads(line) for line in (tmp_path / "steps-cpu.jsonl").read_text().splitlines()]
    assert {row["variant"] for row in rows} == {"genfast", "reference", "copy"}
    assert not (tmp_path / "sampling-cpu.jsonl").exists()
    for row in rows:
        assert row["median_us"] > 0 and row["device"] == "cpu" and row["torch"] == torch.__version__ and "2M" in row["case"]


def test_quick_sampling_writes_rows(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.run", "--quick", "--device", "cpu", "--out", str(tmp_path), "--suite", "sampling"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    rows = {row["variant"]: row for row in map(json.loads, (tmp_path / "sampling-cpu.jsonl").read_text().splitlines())}
    assert set(rows) == {"genfast", "reference"} and all(row["max_abs_difference_from_genfast"] == 0 for row in rows.values())


@pytest.mark.parametrize("case", step_cases((2, 3, 16, 16), (1, 4, 8, 8)), ids=lambda c: c.name)
def test_the_timed_variants_compute_the_same(case: object) -> None:
    """Against diffusers' own scheduler in float64, and against the expression handed to the compiler."""
    fused = Fused(case, ops, torch.float64, "cpu")  # type: ignore[arg-type]
    x, cond, uncond = (torch.randn(case.shape, dtype=torch.float64) for _ in range(3))  # type: ignore[attr-defined]
    ours = fused(x, cond, uncond).clone()
    if case.solver == "euler_ancestral":  # type: ignore[attr-defined]
        return  # its noise differs by design; tests/samplers compares its rows with the literal recursion
    state = [x] * fused.slots
    for coef, index in zip(fused.program.coef, fused.program.index, strict=True):
        _, step = expression(coef, index, guided=True)
        i = index.tolist()
        written = step(state[0], cond, uncond, coef, [state[j] for j in i[3 : 3 + i[2]]], None)
        for slot, value in zip(i[9 : 9 + i[1]], written, strict=True):
            state[slot] = value
    assert torch.allclose(ours, state[0], rtol=1e-10, atol=1e-10)
    stock = StockRun(case.stock_scheduler(), 20, 7.5)  # type: ignore[attr-defined]
    assert torch.isfinite(stock(x, cond, uncond)).all()


def planted(options: Options) -> Iterator[tuple[str, list[Row]]]:
    """A suite in which cases fail, end the process and hang."""

    def fails() -> list[Row]:
        raise ValueError("planted")

    cases = {"first": lambda: [{"case": "first"}], "fails": fails, "crashes": lambda: os._exit(3), "hangs": lambda: time.sleep(600) or []}
    for name, case in {**cases, "last": lambda: [{"case": "last"}]}.items():
        if rows := options.attempt(name, case):
            yield name, rows


def test_a_suite_goes_on_after_a_case_that_fails_crashes_or_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "CASE_SECONDS", 1.0)
    told: list[tuple[str, str]] = []
    options = Options("cpu", [1], "", True, "", tell=lambda kind, number, text: told.append((kind, text)))
    assert [label for label, _ in runner.supervised("suite", planted, options)] == ["first", "last"]
    assert told == [
        ("failed", "suite: fails: ValueError: planted"),
        ("failed", "suite: the process ended in crashes"),
        ("failed", "suite: hangs was ended: it took too long"),
    ]


def test_a_case_after_the_deadline_is_left_out() -> None:
    told: list[tuple[str, int, str]] = []
    options = Options("cpu", [1], "", True, "", deadline=time.monotonic(), tell=lambda *message: told.append(message))
    assert list(planted(options)) == []
    assert told == [("late", number, name) for number, name in enumerate(["first", "fails", "crashes", "hangs", "last"])]


def test_shares_of_the_ceilings() -> None:
    ceiling: list[Row] = [
        {"variant": "copy", "gb_per_s": 4000.0},
        {"variant": "matmul bfloat16", "tflops": 800.0},
        {"variant": "matmul tf32", "tflops": 400.0},
        {"variant": "launch", "median_us": 2.0},
    ]
    row: Row = {"median_us": 20.0, "bytes": 4e7, "gflop": 4.0, "dtype": "bfloat16"}  # 10 us of copying, 5 us of products
    assert ceilings.share(row, ceiling) == row | {"ceiling": "copy bandwidth", "share_of_ceiling": 0.5}
    row |= {"gflop": 12.0}  # 15 us
    assert ceilings.share(row, ceiling) == row | {"ceiling": "matmul bfloat16", "share_of_ceiling": 0.75}
    assert ceilings.share(row | {"dtype": "float32"}, ceiling)["share_of_ceiling"] == 1.5
    assert ceilings.share({"median_us": 8.0}, ceiling) == {"median_us": 8.0, "ceiling": "launch latency", "share_of_ceiling": 0.25}


def test_report_makes_tables_from_rows_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = {
        "case": "c",
        "threads": 2,
        "device": "cpu",
        "cpu": "x",
        "isa": "avx2",
        "torch": "2",
        "commit": "abc",
        "date": "d",
        "command": "run",
    }
    rows = [base | {"variant": "genfast", "median_us": 10.0, "share_of_copy": 0.5}, base | {"variant": "diffusers", "median_us": 70.0}]
    (tmp_path / "steps-cpu.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    text = report.block("steps-cpu:2")
    assert "| case | genfast | diffusers | ratio | share of copy bandwidth |" in text  # nothing else was measured
    assert "| c | 10 us | 70 us | 7.0x | 50% |" in text and "abc" in text
    assert report.block("steps-cuda") == "No rows yet.\n"
    rows += [
        base | {"case": "d", "variant": "genfast", "median_us": 1000.0},
        base | {"case": "d", "variant": "diffusers", "median_us": 1.0},
    ]
    rows += [base | {"case": "d", "variant": "reference", "median_us": 1000.0}]
    (tmp_path / "steps-cpu.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert report.block("steps-cpu:2").splitlines()[2:4] == [
        "| c | 10 us | 70 us | 7.0x | - | 50% |",
        "| d | 1.00 ms | 1 us | 0.001x | 1.00 ms | - |",
    ]


@pytest.mark.parametrize(
    ("times", "text"),
    [
        (103.44, "103.4x"),
        (7.0, "7.0x"),
        (1.04, "1.0x"),
        (0.96, "1.0x"),
        (0.94, "0.94x"),
        (0.2, "0.2x"),
        (0.0312, "0.031x"),
        (0.00004, "4e-05x"),
    ],
)
def test_no_ratio_reads_as_nothing(times: float, text: str) -> None:
    assert report.ratio_text(times) == text


def test_the_tables_are_what_the_rows_say() -> None:
    run = subprocess.run([sys.executable, "-m", "benchmarks.report", "--check"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout


def test_quick_gan_training_writes_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks, a penalised block and whole steps; every variant computes the same, or the suite stops."""
    command = [sys.executable, "-m", "benchmarks.run", "--quick", "--device", "cpu", "--out", str(tmp_path), "--suite", "gan_training"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    rows = [json.loads(line) for line in (tmp_path / "gan_training-cpu.jsonl").read_text().splitlines()]
    assert {row["variant"] for row in rows} == {"genfast", "reference", "grouped"} and len({row["case"] for row in rows}) == 7
    assert all(row["median_us"] > 0 and row["gflop"] > 0 for row in rows)
    assert all(row["s_per_kimg"] == pytest.approx(row["median_us"] / 4e3, abs=1e-3) for row in rows if "step" in row["case"])
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    lines = report.block("gan_training-cpu").splitlines()
    assert lines[0] == "| case | genfast | reference | grouped | share of matrix peak | s/kimg |" and len(lines) == 2 + 7 + 2


def test_quick_gan_writes_rows(tmp_path: Path) -> None:
    """Every variant computes the same, or the suite stops."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.run",
        "--quick",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
        "--suite",
        "gan",
        "--threads",
        "1",
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    rows = [json.loads(line) for line in (tmp_path / "gan-cpu.jsonl").read_text().splitlines()]
    assert {row["variant"] for row in rows} == {"genfast", "genfast, grouped", "reference", "torch", "torch, grouped"}
    assert all(row["median_us"] > 0 for row in rows)


def test_quick_attention_writes_rows(tmp_path: Path) -> None:
    """Every variant computes the same, or the suite stops."""
    command = [sys.executable, "-m", "benchmarks.run", "--quick", "--device", "cpu", "--out", str(tmp_path), "--suite", "attention"]
    subprocess.run([*command, "--filter", "SD1.5, 32x32"], cwd=ROOT, check=True, capture_output=True, text=True)
    rows = [json.loads(line) for line in (tmp_path / "attention-cpu.jsonl").read_text().splitlines()]
    assert {row["variant"] for row in rows} == {"genfast", "sdpa", "reference"}
    assert all(row["median_us"] > 0 and row["tflops"] > 0 for row in rows)


def test_quick_qknorm_writes_rows(tmp_path: Path) -> None:
    """Every variant computes the same, or the suite stops."""
    command = [sys.executable, "-m", "benchmarks.run", "--quick", "--device", "cpu", "--out", str(tmp_path), "--suite", "qknorm"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    rows = [json.loads(line) for line in (tmp_path / "qknorm-cpu.jsonl").read_text().splitlines()]
    assert {row["variant"] for row in rows} == {"genfast", "eager", "reference", "copy"}
    assert all(row["median_us"] > 0 for row in rows)


def test_the_pages_have_no_ratio_of_zero() -> None:
    for page in report.PAGES:
        assert " 0.0x" not in (ROOT / page).read_text(), page
