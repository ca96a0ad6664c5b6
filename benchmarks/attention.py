"""Suite "attention": the shapes of real models beside torch's scaled_dot_product_attention, forward and backward alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import timing
from benchmarks.timing import Options, Row
from genfast import ops, reference

Call = Callable[..., Tensor]

# The reference and its compiled form hold all scores; beyond this many they are left out.
MOST_SCORES = 2**26
# Compiling takes most of a GPU's minutes, so there these cases alone; nor is float32, which no tensor core takes, timed beyond so much.
COMPILED = ("SD1.5, 32x32, self", "DiT-XL/2, 256 px", "GPT-2, causal", "T5, bias of positions")
MOST_FLOAT32_FLOPS = 1e11
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}


@dataclass(frozen=True)
class AttentionCase:
    """q (batch, heads, queries, width), k and v (batch, kv_heads, keys, width); ``bias`` is the shape of an additive bias with a gradient,
    ``mask`` that of a bool mask. ``tokens`` lie before ``heads`` in memory, as a projection leaves them."""

    name: str
    batch: int
    heads: int
    queries: int
    keys: int
    width: int
    bias: tuple[int, int, int, int] | None = None
    mask: tuple[int, int, int, int] | None = None
    causal: bool = False

    @property
    def shape(self) -> list[int]:
        return [self.batch, self.heads, self.queries, self.keys, self.width]

    @property
    def flops(self) -> float:
        """Of the forward pass: two products; the backward pass has five."""
        return 4.0 * self.batch * self.heads * self.queries * self.keys * self.width * (0.5 if self.causal else 1.0)


def attention_cases(device: str) -> list[AttentionCase]:
    """Guided batches of 2. On a CPU the longest sequences and the batches are cut, which the names say."""
    gpu = device == "cuda"
    cases = [
        AttentionCase("SD1.5, 64x64, self", 2, 8, 4096, 4096, 40),
        AttentionCase("SD1.5, 32x32, self", 2, 8, 1024, 1024, 80),
        AttentionCase("SD1.5, 16x16, self", 2, 8, 256, 256, 160),
        AttentionCase("SD1.5, 64x64, text", 2, 8, 4096, 77, 40),
        AttentionCase("SD1.5, 32x32, text", 2, 8, 1024, 77, 80),
        AttentionCase("SD1.5, 16x16, text", 2, 8, 256, 77, 160),
        AttentionCase("SDXL, 32x32, self", 2, 20, 1024, 1024, 64),
        AttentionCase("SDXL, 64x64, text", 2, 10, 4096, 77, 64),
        AttentionCase("DiT-XL/2, 256 px", 2, 16, 256, 256, 72),
        AttentionCase("PixArt, 512 px, self", 2, 16, 1024, 1024, 72),
        AttentionCase("PixArt, 512 px, masked text", 2, 16, 1024, 120, 72, mask=(2, 1, 1, 120)),
        AttentionCase("SD3, 512 px, joint", 2, 24, 1024 + 154, 1024 + 154, 64),
        AttentionCase("Flux, 512 px, joint", 1, 24, 1024 + 512, 1024 + 512, 128),
        AttentionCase("EDM U-Net, 16x16", 16, 1, 256, 256, 256),
        AttentionCase("GPT-2, causal", 2, 12, 1024, 1024, 64, causal=True),
        AttentionCase("T5, bias of positions", 2, 12, 512, 512, 64, bias=(1, 12, 512, 512)),
        AttentionCase("windows, bias", 64, 6, 64, 64, 32, bias=(1, 6, 64, 64)),
        AttentionCase("one head of 256, bias", 8, 1, 256, 256, 256, bias=(1, 1, 256, 256)),
        AttentionCase("SD1.5, 32x32, self, mask", 2, 8, 1024, 1024, 80, mask=(2, 1, 1024, 1024)),
    ]
    if gpu:
        sizes = [(1024, 16), (4096, 4), (16384, 1)]
        heads = {64: 32, 80: 32, 96: 24, 128: 16, 160: 16, 192: 12, 256: 8}
        cases += [AttentionCase(f"{n} tokens, d{d}", b, heads[d], n, n, d) for d in heads for n, b in sizes]
        cases += [AttentionCase(f"{n} tokens, d{d}, causal", b, heads[d], n, n, d, causal=True) for d in (64, 128) for n, b in sizes]
        return [*cases, AttentionCase("Wan, 32,760 tokens", 1, 12, 32760, 32760, 128)]
    return [*cases, AttentionCase("Wan, 8,192 of 32,760 tokens, 1 of 12 heads", 1, 1, 8192, 8192, 128)]


def _calls(case: AttentionCase, device: str, compiled: bool) -> dict[str, Call]:
    def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask if bias is None else bias, is_causal=case.causal)

    def fixed(backend: SDPBackend) -> Call:
        def call(*inputs: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return sdpa(*inputs)

        return call

    def plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
        o = reference.attention(q, k, v, bias=bias, mask=mask, causal=case.causal)
        assert isinstance(o, Tensor)
        return o

    def ours(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
        o = ops.attention(q, k, v, bias=bias, mask=mask, causal=case.causal)
        assert isinstance(o, Tensor)
        return o

    calls: dict[str, Call] = {"genfast": ours, "sdpa": sdpa}
    if device == "cuda":
        calls |= {f"sdpa {name}": fixed(backend) for name, backend in BACKENDS.items()}
    if case.batch * case.heads * case.queries * case.keys <= MOST_SCORES:
        calls["reference"] = plain
        if compiled:
            calls["compiled"] = torch.compile(plain, dynamic=False)
    return calls


def _works(call: Call, inputs: list[Tensor | None], backward: bool) -> bool:
    """Whether a backend of torch takes these arguments."""
    try:
        o = call(*inputs)
        if backward:
            o.sum().backward()
    except RuntimeError:
        return False
    return True


def time_case(case: AttentionCase, dtype: torch.dtype, direction: str, ceiling: float, options: Options) -> list[Row]:
    """Microseconds of one pass of every variant; ``direction``: "forward", "backward" (alone, its graph kept) or "tangent"."""
    backward, device = direction == "backward", options.device
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    sides = [(case.batch, rows, case.heads, case.width) for rows in (case.queries, case.keys, case.keys)]
    q, k, v = (draw(*side).transpose(1, 2).requires_grad_(backward) for side in sides)
    bias = None if case.bias is None else draw(*case.bias).requires_grad_(backward)
    mask = None if case.mask is None else torch.rand(case.mask, generator=generator, device=device) < 0.8
    inputs = [q, k, v, bias, mask]
    compiles = case.name in COMPILED and dtype == torch.bfloat16 if device == "cuda" else dtype == torch.float32 and not backward
    compiled = compiles and not options.quick
    torch.compiler.reset()
    calls = {
        name: call
        for name, call in _calls(case, device, compiled).items()
        if not name.startswith("sdpa ") or _works(call, inputs, backward)
    }
    wide = [None if t is None else t.detach().to(torch.float32) if t.is_floating_point() else t for t in inputs]
    with torch.no_grad():
        o = calls["sdpa"](*wide)
        bound = 1e-4 if dtype == torch.float32 else 3e-2
        for name, call in calls.items():
            error = ((call(*inputs) - o).abs().max() / o.abs().max()).item()
            if not error < bound:
                raise RuntimeError(f"{case.name}, {dtype}: {name} differs from torch in float32 by {error:.1e} on the timed inputs")
    do = draw(case.batch, case.queries, case.heads, case.width).transpose(1, 2)
    wanted = [t for t in (q, k, v, bias) if t is not None]

    def variant(call: Call) -> Callable[[], object]:
        if not backward:
            return lambda: call(*inputs)
        result = call(*inputs)
        return lambda: torch.autograd.grad(result, wanted, do, retain_graph=True)

    variants = {name: variant(call) for name, call in calls.items()}
    if direction == "tangent":
        tq, tk, tv = (torch.randn_like(t) for t in (q, k, v))
        variants = {"forward": variants["genfast"]}
        variants["genfast"] = lambda: ops.attention_jvp(q, k, v, tq, tk, tv, bias=bias, mask=mask, causal=case.causal)
    results = timing.interleave(
        variants,
        device=device,
        rounds=3 if options.quick else 9,
        round_seconds=0.0 if options.quick else 0.03,
        quiet=not options.quick,
    )
    facts = timing.environment(device) | {"command": options.command}
    label = f"{case.name}, {str(dtype).removeprefix('torch.')}, {direction}, {'x'.join(map(str, case.shape))}"
    # The least a pass can move: q, k, v, o and the bias or mask; the backward pass besides the gradients of all of them but the mask.
    terms, given = sum(t.nbytes for t in (bias, mask) if t is not None), sum(t.nbytes for t in (q, k, v, q))
    size = given + terms if not backward else 2 * given + terms + (0 if bias is None else bias.nbytes)
    rows = []
    for name, t in results.items():
        tflops = case.flops * (2.5 if backward else 1.0) / t.median * 1e-6
        row: Row = {"case": label, "variant": name, "shape": case.shape, "dtype": str(dtype).removeprefix("torch.")}
        row |= {"median_us": round(t.median, 3), "iqr_us": round(t.iqr, 3), "rounds": t.rounds, "discarded": t.discarded}
        row |= {"tflops": float(f"{tflops:.4g}"), "share_of_matmul": round(tflops / ceiling, 4)}
        rows.append(row | {"bytes": size, "gflop": round(case.flops * (2.5 if backward else 1.0) / 1e9, 3)} | facts)
    return rows


@dataclass(frozen=True)
class DecodeCase:
    """One new query a sample against a cache of ``length`` keys."""

    name: str
    batch: int
    heads: int
    kv_heads: int
    length: int
    width: int


DECODE = [
    DecodeCase("GPT-2 decode, 1k keys", 1, 12, 12, 1024, 64),
    DecodeCase("LLaMA-7B decode, 4k keys", 1, 32, 32, 4096, 128),
    DecodeCase("LLaMA-8B decode, 8 heads for 32, 8k keys", 1, 32, 8, 8192, 128),
    DecodeCase("LLaMA-8B decode, batch 8, 8 heads for 32, 2k keys", 8, 32, 8, 2048, 128),
]


def time_decode(case: DecodeCase, dtype: torch.dtype, options: Options) -> list[Row]:
    """Microseconds of one step; torch is handed the part of the cache that is in use."""
    device = options.device
    generator = torch.Generator(device).manual_seed(0)
    length = min(case.length, 256) if options.quick else case.length

    def draw(heads: int, rows: int) -> Tensor:
        return torch.randn(case.batch, heads, rows, case.width, generator=generator, device=device).to(dtype)

    q, k, v = draw(case.heads, 1), draw(case.kv_heads, length + 64), draw(case.kv_heads, length + 64)
    lengths = torch.full((case.batch,), length, dtype=torch.int32, device=device)
    grouped = case.heads != case.kv_heads
    variants: dict[str, Callable[[], object]] = {
        "genfast": lambda: ops.attention_decode(q, k, v, lengths),
        "sdpa": lambda: F.scaled_dot_product_attention(q, k[:, :, :length], v[:, :, :length], enable_gqa=grouped),
    }
    results = timing.interleave(
        variants,
        device=device,
        rounds=3 if options.quick else 9,
        round_seconds=0.0 if options.quick else 0.03,
        quiet=not options.quick,
    )
    facts = timing.environment(device) | {"command": options.command}
    name = str(dtype).removeprefix("torch.")
    shape = [case.batch, case.heads, case.kv_heads, length, case.width]
    moved = 2.0 * case.batch * case.kv_heads * length * case.width * dtype.itemsize
    row: Row = {"case": f"{case.name}, {name}, {'x'.join(map(str, shape))}", "shape": shape, "dtype": name}
    return [
        row
        | {"variant": variant, "median_us": round(t.median, 3), "iqr_us": round(t.iqr, 3), "rounds": t.rounds, "discarded": t.discarded}
        | {"gb_per_s": round(moved / t.median * 1e-3, 3), "bytes": round(moved)}
        | facts
        for variant, t in results.items()
    ]


def matmul_tflops(device: str, dtype: torch.dtype, quick: bool) -> float:
    """The ceiling: torch's product of two square matrices of random numbers, in TFLOP/s."""
    n = 256 if quick else 8192 if device == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    us = timing.interleave({"matmul": lambda: a @ b}, device=device, rounds=11, round_seconds=0.05, quiet=False)["matmul"].median
    return 2.0 * n**3 / us * 1e-6


def run(options: Options) -> Iterator[tuple[str, list[Row]]]:
    dtypes = [torch.bfloat16, torch.float32]
    for threads in options.threads:
        if options.device == "cpu":
            torch.set_num_threads(threads)
        ceilings = {dtype: matmul_tflops(options.device, dtype, options.quick) for dtype in dtypes}
        for shape in attention_cases(options.device):
            if options.filter not in shape.name:
                continue
            case = shape
            if options.quick:
                keys = min(shape.keys, 64 if shape.causal else 77)  # torch's causality is another where keys are not queries
                case = replace(shape, queries=min(shape.queries, 64), keys=keys, bias=None, mask=None)
            for dtype in dtypes:
                if options.device == "cuda" and dtype == torch.float32 and case.flops > MOST_FLOAT32_FLOPS:
                    continue
                directions = ["forward", "backward"]
                if case.name == "SD1.5, 32x32, self" and not options.quick:
                    directions.append("tangent")
                for direction in directions:
                    label = f"{case.name}, {dtype}, {direction}"
                    rows = options.attempt(label, partial(time_case, case, dtype, direction, ceilings[dtype], options))
                    if rows:
                        yield rows[0]["case"] + (f", {threads} threads" if threads else ""), rows
        for cache in DECODE:
            for dtype in dtypes if options.filter in cache.name else []:
                rows = options.attempt(f"{cache.name}, {dtype}", partial(time_decode, cache, dtype, options))
                if rows:
                    yield rows[0]["case"] + (f", {threads} threads" if threads else ""), rows
