"""What the machine can do, measured in the run whose rows are held against it: copy bandwidth, matrix rates, launch latency."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks import timing
from benchmarks.timing import Options, Row


def measure(device: str, command: str, quick: bool = False) -> list[Row]:
    """Copy bandwidth in GB/s, counting bytes read and written; TFLOP/s of a product of square matrices of random numbers, in bf16 and in
    TF32 (on a CPU float32); microseconds between the starts of operators that have nothing to do."""
    cuda = device == "cuda"
    elements = 2**20 if quick else 2**30 if cuda else 2**26  # several times the last cache
    n = 256 if quick else 8192 if cuda else 1024
    source, target = torch.empty(elements, dtype=torch.int8, device=device).fill_(1), torch.empty(elements, dtype=torch.int8, device=device)
    nothing = torch.zeros(1, device=device)
    launches = 100

    def launch() -> None:
        for _ in range(launches):
            nothing.add_(1)

    def rate(dtype: torch.dtype, tf32: bool) -> float:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if tf32 else before)
        try:
            return 2e-6 * n**3 / timed({"matmul": lambda: a @ b})["matmul"]
        finally:
            torch.set_float32_matmul_precision(before)

    def timed(variants: dict[str, timing.Call]) -> dict[str, float]:
        times = timing.interleave(
            variants, device=device, rounds=3 if quick else 11, round_seconds=0.0 if quick else 0.03, quiet=False, slow_seconds=1.0
        )
        return {name: t.median for name, t in times.items()}

    times = timed({"copy": lambda: target.copy_(source), "launch": launch})
    found = {"copy": ("gb_per_s", 2e-3 * elements / times["copy"]), "matmul bfloat16": ("tflops", rate(torch.bfloat16, False))}
    found["matmul tf32" if cuda else "matmul float32"] = ("tflops", rate(torch.float32, cuda))
    found["launch"] = ("median_us", times["launch"] / launches)
    facts = timing.environment(device) | {"command": command}
    return [{"case": "ceiling", "variant": name, unit: round(value, 4)} | facts for name, (unit, value) in found.items()]


def run(options: Options) -> Iterator[tuple[str, list[Row]]]:
    yield "ceilings", measure(options.device, options.command, options.quick)


def share(row: Row, ceilings: list[Row]) -> Row:
    """``row`` with the share of the ceiling that it reaches: the least time that its ``bytes`` or its ``gflop`` (of one call) need, one
    launch at the least, by its ``median_us``. Rows without a time stay as they are."""
    if "median_us" not in row:
        return row
    one = {ceiling["variant"]: ceiling for ceiling in ceilings}
    matrix = next(one[name] for name in (f"matmul {row.get('dtype')}", "matmul tf32", "matmul float32") if name in one)
    floors = {
        "copy bandwidth": row.get("bytes", 0) / one["copy"]["gb_per_s"] * 1e-3,
        matrix["variant"]: row.get("gflop", 0.0) / matrix["tflops"] * 1e3,
        "launch latency": one["launch"]["median_us"],
    }
    name = max(floors, key=lambda name: floors[name])
    return row | {"ceiling": name, "share_of_ceiling": round(floors[name] / row["median_us"], 4)}
