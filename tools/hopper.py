"""What the first minutes on a Hopper GPU are for: are its attention kernels right, how fast are they, what does compute-sanitizer say.

    python -m tools.hopper OUT                       checks, times and sanitizes within 8 minutes; rows to OUT/attention-hopper-cuda.jsonl
    python -m tools.hopper OUT --device cpu --tokens 64     a rehearsal of this script on a machine without a GPU

Every head dimension runs in a process of its own that is ended after a while: a kernel that hangs costs its own rows. Verdicts are printed
as they come. A head dimension that is wrong is not timed.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import timing
from genfast import ops, reference
from genfast.testing.oracle import error, same_bits, tolerance

HEAD_DIMS = [64, 80, 96, 128, 160, 192, 256]
TOKENS = [1024, 4096, 16384]
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
BACKWARD = 128  # the widest head that has a backward kernel
SWITCH = "GENFAST_ATTENTION_HOPPER"


def draw(shape: tuple[int, ...], seed: int, device: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device).to(dtype)


def switch(wish: str | None) -> None:
    os.environ.pop(SWITCH, None) if wish is None else os.environ.update({SWITCH: wish})


def attend(arguments: dict[str, object], wish: str | None) -> tuple[Tensor, Tensor]:
    switch(wish)
    o, lse = ops.attention(**arguments, return_lse=True)  # type: ignore[arg-type]
    return o, lse


def differentiate(
    attention: Callable[..., Any], arguments: dict[str, object], cotangents: list[Tensor], wish: str | None = "all"
) -> list[Tensor]:
    """dq, dk, dv for these gradients of o and lse; ``wish`` is for the backward pass alone."""
    leaves = {name: t.detach().requires_grad_() for name in "qkv" if isinstance(t := arguments[name], Tensor)}
    switch("all")
    outputs = attention(**arguments | leaves, return_lse=True)
    switch(wish)
    return list(torch.autograd.grad(outputs, list(leaves.values()), cotangents))


# ---- right? ----------------------------------------------------------------------------------------------------------------------


def cases(d: int, device: str, small: bool) -> dict[str, dict[str, object]]:
    """Arguments of `attention`: tails of queries, keys and columns, groups, causality, terms, layouts, many units a block."""

    def inputs(batch: int, heads: int, kv_heads: int, n: int, m: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, object]:
        kv = (batch, kv_heads, m, d)
        return {
            "q": draw((batch, heads, n, d), 1, device, dtype),
            "k": draw(kv, 2, device, dtype),
            "v": draw(kv, 3, device, dtype),
        }

    tiny = {"one tile": inputs(1, 1, 1, 64, 64), "tails": inputs(1, 2, 2, 260, 370), "causal": inputs(1, 2, 1, 260, 370) | {"causal": True}}
    if small:
        return tiny
    packed = draw((2, 500, 12, d), 4, device)
    return tiny | {
        "float16": inputs(2, 2, 2, 300, 700, torch.float16),
        "fewer keys than queries, causal": inputs(1, 2, 2, 700, 200) | {"causal": True},
        "grouped heads, many units": inputs(8, 12, 3, 900, 1100),
        "grouped heads, many units, causal": inputs(8, 12, 3, 900, 1100) | {"causal": True},
        "(B, N, H, D) memory": dict(zip("qkv", (packed[:, :, i : i + 4].transpose(1, 2) for i in (0, 4, 8)), strict=True)),
        "narrower head": {name: t[..., : d - 8] for name, t in inputs(1, 2, 2, 260, 370).items()},  # type: ignore[index]
        "bias": inputs(2, 4, 4, 300, 500) | {"bias": draw((1, 4, 300, 500), 5, device, torch.float32)},
        "bias and mask, causal": inputs(2, 4, 2, 300, 500)
        | {"bias": draw((2, 1, 300, 500), 6, device), "mask": draw((2, 4, 300, 500), 7, device) > -1, "causal": True},
        "long": inputs(1, 2, 2, 4096, 4096),
        "long, causal": inputs(1, 2, 2, 4096, 4096) | {"causal": True},
    }


def faults_of(names: list[str], got: list[Tensor], working: list[Tensor], exact: list[Tensor], device: str) -> list[str]:
    faults = []
    for name, result, plain, truth in zip(names, got, working, exact, strict=True):
        rounding = 4 if device == "cuda" else 32  # AMX's exponential is shorter
        eps = rounding * torch.finfo(torch.float32).eps if name == "lse" else torch.finfo(result.dtype).eps
        wrong, bound = error(result, truth), tolerance(plain, truth, eps)
        if not wrong <= bound:
            faults.append(f"{name}: error {wrong:.3g} exceeds {bound:.3g}")
    return faults


def captured(run: Callable[[str], list[Tensor]]) -> list[Tensor]:
    """What a CUDA graph of ``run`` gives."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run("all")
    graph.replay()
    torch.cuda.synchronize()
    return results


def check(d: int, device: str, small: bool) -> bool:
    """Whether every case is as near to float64 as plain torch, gives the same bits thrice, and came from another kernel than mma.sync's.

    One of them is captured in a CUDA graph too, but not under compute-sanitizer (``small``).
    """
    good = True
    for name, arguments in cases(d, device, small).items():
        wide = {key: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for key, t in arguments.items()}
        q = arguments["q"]
        assert isinstance(q, Tensor)
        cotangents = [draw(tuple(q.shape), 8, device, q.dtype), draw(tuple(q.shape[:3]), 9, device, torch.float32)]

        def forward(wish: str | None, arguments: dict[str, object] = arguments) -> list[Tensor]:
            return list(attend(arguments, wish))

        def backward(wish: str | None, arguments: dict[str, object] = arguments, cotangents: list[Tensor] = cotangents) -> list[Tensor]:
            return differentiate(ops.attention, arguments, cotangents, wish)

        passes = {"forward": (["o", "lse"], forward)}
        if q.shape[3] <= BACKWARD and not {"bias", "mask"} & arguments.keys():
            passes["backward"] = (["dq", "dk", "dv"], backward)
        faults = []
        for direction, (names, run) in passes.items():
            if direction == "forward":
                working = list(reference.attention(**arguments, return_lse=True))  # type: ignore[arg-type]
                exact = list(reference.attention(**wide, return_lse=True))  # type: ignore[arg-type]
            else:
                working = differentiate(reference.attention, arguments, cotangents)
                exact = differentiate(reference.attention, wide, [t.double() for t in cotangents])
            got = run("all")
            faults += faults_of(names, got, working, exact, device)
            for _ in range(2):
                if not all(same_bits(a, b) for a, b in zip(got, run("all"), strict=True)):
                    faults.append(f"{direction}: other bits on another run")
            if device == "cuda" and name == "tails":
                if same_bits(got[0], run(None)[0]):
                    faults.append(f"{direction}: the bits of the mma.sync kernel, so Hopper's did not run")
                if not small and not all(same_bits(a, b) for a, b in zip(got, captured(run), strict=True)):
                    faults.append(f"{direction}: other bits from a CUDA graph")
        good &= not faults
        print(f"d {d}, {name}, {' and '.join(passes)}: {'; '.join(faults) or 'ok'}", flush=True)
    return good


# ---- fast? -----------------------------------------------------------------------------------------------------------------------


def sdpa(backend: SDPBackend, causal: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def variants_of(direction: str, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> dict[str, Callable[[], object]]:
    """Every kernel that runs, as a call that computes the outputs (forward), their gradients alone (backward), or both."""
    cotangent = draw(tuple(q.shape), 4, str(q.device.type), q.dtype)
    leaves = [t.detach().requires_grad_(direction != "forward") for t in (q, k, v)]

    def call_of(attention: Callable[..., Tensor], wish: str | None) -> Callable[[], object]:
        def forward() -> Tensor:
            switch(wish)
            return attention(*leaves)

        def backward(o: Tensor) -> object:
            switch(wish)
            return torch.autograd.grad(o, leaves, cotangent, retain_graph=True)

        if direction == "forward":
            return forward
        if direction == "forward and backward":
            return lambda: backward(forward())
        o = forward()
        return lambda: backward(o)

    ours = functools.partial(ops.attention, causal=causal)
    kernels: dict[str, tuple[Callable[..., Tensor], str | None]] = {"hopper": (ours, "all"), "mma.sync": (ours, None)}
    kernels |= {f"sdpa {name}": (functools.partial(sdpa, backend, causal), None) for name, backend in BACKENDS.items()}
    variants = {}
    for name, (attention, wish) in kernels.items():
        try:
            call = call_of(attention, wish)
            call()
        except RuntimeError:
            if not name.startswith("sdpa"):
                raise
            continue
        variants[name] = call
    return variants


def bench(d: int, device: str, out: Path, tokens: list[int]) -> None:
    """bf16, 16k tokens in all, some 2048 columns in all heads; every backend in one process, interleaved."""
    total = max(tokens)
    products = {"forward": 2, "backward": 5, "forward and backward": 7} if d <= BACKWARD else {"forward": 2}
    for n in tokens:
        for causal in (False, True):
            heads = 2048 // d
            q, k, v = (draw((total // n, heads, n, d), i, device) for i in range(3))
            for direction, count in products.items():
                variants = variants_of(direction, q, k, v, causal)
                times = timing.interleave(variants, device=device, rounds=11, round_seconds=0.01, quiet=device == "cuda")
                work = 2.0 * count * q.numel() * n * (0.5 if causal else 1.0)
                facts = timing.environment(device) | {
                    "command": "python -m tools.hopper",
                    "shape": list(q.shape),
                    "causal": causal,
                    "dtype": "bfloat16",
                }
                rows = [
                    {"case": f"attention {direction}, d {d}, {n} tokens{', causal' * causal}", "variant": name}
                    | {"median_us": round(t.median, 3), "iqr_us": round(t.iqr, 3), "rounds": t.rounds}
                    | {"tflops": round(work / t.median * 1e-6, 1)}
                    | facts
                    for name, t in times.items()
                ]
                timing.append(out / f"attention-hopper-{device}.jsonl", rows)
                print(f"{rows[0]['case']}: " + ", ".join(f"{row['variant']} {row['tflops']}" for row in rows) + " TFLOP/s", flush=True)


# ---- one process a head dimension ---------------------------------------------------------------------------------------------------


def worker(seconds: float, *arguments: str, before: tuple[str, ...] = ()) -> bool:
    command = [*before, sys.executable, "-m", "tools.hopper", *arguments]
    start = time.monotonic()
    try:
        ok = subprocess.run(command, timeout=seconds, check=False, cwd=Path(__file__).parents[1]).returncode == 0
        verdict = "ok" if ok else "FAILED"
    except subprocess.TimeoutExpired:
        ok, verdict = False, "HANGS, ended"
    print(
        f"== {' '.join(arguments[1:])}{' under ' + ' '.join(before[:3]) if before else ''}: {verdict} in {time.monotonic() - start:.0f} s",
        flush=True,
    )
    return ok


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.hopper", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--minutes", type=float, default=8.0, help="when to end, whatever is left")
    parser.add_argument("--only", nargs=2, metavar=("WHAT", "D"), help="check, tiny or bench of one head dimension, in this process")
    given = parser.parse_args()
    if given.only:
        what, d = given.only[0], int(given.only[1])
        if given.device == "cuda" and torch.cuda.get_device_capability() != (9, 0):
            raise SystemExit(f"device: got {torch.cuda.get_device_name()}, supported: sm_90")
        if what == "bench":
            bench(d, given.device, given.out, given.tokens)
            return 0
        return int(not check(d, given.device, small=what == "tiny" or given.device == "cpu"))

    given.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * given.minutes
    options = [str(given.out.resolve()), "--device", given.device, "--tokens", *map(str, given.tokens)]

    def run(seconds: float, what: str, d: int, *before: str) -> bool:
        left = min(seconds, end - time.monotonic())
        return left > 1 and worker(left, *options, "--only", what, str(d), before=before)

    right = [d for d in HEAD_DIMS if run(45, "check", d)]
    timed = [d for d in sorted(right, key=lambda d: (d != 128, d != 64, d)) if run(45, "bench", d)]
    clean = []
    if given.device == "cuda":
        for tool in ("memcheck", "synccheck", "racecheck"):
            clean += [(tool, run(60, "tiny", d, "compute-sanitizer", "--tool", tool, "--error-exitcode", "9")) for d in (64, 128)]
    print(f"right: {right}; timed: {timed}; compute-sanitizer: {clean}")
    return int(right != HEAD_DIMS or sorted(timed) != right or not all(ok for _, ok in clean))


if __name__ == "__main__":
    sys.exit(main())
