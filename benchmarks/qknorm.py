"""Suite "qknorm": norm and rotary embedding of queries and keys, alone and in front of attention, beside the operators one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import timing
from benchmarks.timing import Options, Row
from genfast import ops, reference

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class QkNormCase:
    """Packed qkv (batch, tokens, 3, heads, width)."""

    name: str
    batch: int
    tokens: int
    heads: int
    width: int
    interleaved: bool = True
    across_heads: bool = False

    @property
    def shape(self) -> list[int]:
        return [self.batch, self.tokens, self.heads, self.width]


def qknorm_cases(device: str) -> list[QkNormCase]:
    cases = [
        QkNormCase("SD3, 512 px", 2, 1024, 24, 64),
        QkNormCase("Flux, 512 px", 1, 1024 + 512, 24, 128),
        QkNormCase("Qwen3, 1,024 tokens", 1, 1024, 32, 128, interleaved=False),
        QkNormCase("Wan 1.3B, 4,096 tokens", 1, 4096, 12, 128, across_heads=True),
        QkNormCase("64 tokens", 1, 64, 8, 64),
    ]
    large = [replace(case, name=f"{case.name}, 8 of them", batch=8 * case.batch) for case in cases[:4]]
    return cases + large if device == "cuda" else cases


def one_by_one(case: QkNormCase, q: Tensor, k: Tensor, weights: Pair, table: Pair) -> Pair:
    """As the models write it: torch's norm, then the rotation in float32 with tables as wide as a head."""
    results = []
    for x, weight in ((q, weights[0]), (k, weights[1])):
        if case.across_heads:
            flat = x.transpose(1, 2).flatten(2)
            x = F.rms_norm(flat, flat.shape[-1:], weight.flatten(), 1e-6).unflatten(2, (case.heads, case.width)).transpose(1, 2)
        else:
            x = F.rms_norm(x, (case.width,), weight, 1e-6)
        wide = x.float()
        if case.interleaved:
            a, b = wide.unflatten(-1, (-1, 2)).unbind(-1)
            turned = torch.stack([-b, a], -1).flatten(3)
        else:
            a, b = wide.chunk(2, -1)
            turned = torch.cat([-b, a], -1)
        results.append((wide * table[0] + turned * table[1]).to(x.dtype))
    return results[0], results[1]


def time_case(case: QkNormCase, dtype: torch.dtype, part: str, options: Options) -> list[Row]:
    """Microseconds of every variant; ``part``: "forward", "backward" (alone, its graph kept) or "with attention" (forward)."""
    random, backward = torch.Generator(options.device).manual_seed(0), part == "backward"

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=options.device).to(dtype)

    qkv = draw(case.batch, case.tokens, 3, case.heads, case.width)
    shape = (case.heads, case.width) if case.across_heads else (case.width,)
    leaves = [t.requires_grad_(backward) for t in (qkv, 1 + 0.1 * draw(*shape), 1 + 0.1 * draw(*shape))]
    cos, sin = (t.to(options.device) for t in ops.rope_table(torch.arange(case.tokens), case.width))
    double = [t.repeat_interleave(2, -1) if case.interleaved else torch.cat([t, t], -1) for t in (cos, sin)]
    settings: dict[str, Any] = {"interleaved": case.interleaved, "across_heads": case.across_heads}

    def split(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return q, k, v

    def eager(qkv: Tensor, *weights: Tensor) -> Pair:
        q, k, _ = split(qkv)
        return one_by_one(case, q, k, (weights[0], weights[1]), (double[0], double[1]))

    def ours(qkv: Tensor, *weights: Tensor) -> Pair:
        q, k, _ = split(qkv)
        return ops.qknorm_rope(q, k, weights[0], weights[1], cos, sin, **settings)

    def plain(qkv: Tensor, *weights: Tensor) -> Pair:
        q, k, _ = split(qkv)
        return reference.qknorm_rope(q, k, weights[0], weights[1], cos, sin, **settings)

    torch.compiler.reset()
    pairs: dict[str, Callable[..., Pair]] = {"genfast": ours, "eager": eager, "reference": plain}
    # On a GPU, compiling takes most of its minutes.
    if not options.quick and (options.device == "cpu" or (dtype == torch.bfloat16 and part != "with attention")):
        pairs["compiled"] = torch.compile(eager, dynamic=False)
    with torch.no_grad():
        exact = plain(*(t.double() for t in leaves))
        for name, call in pairs.items():
            for got, want in zip(call(*leaves), exact, strict=True):
                error = float((got - want).abs().max() / want.abs().max())
                if not error < (1e-5 if dtype == torch.float32 else 2e-2):
                    raise RuntimeError(f"{case.name}, {dtype}: {name} differs from float64 by {error:.1e} on the timed inputs")

    def variant(name: str) -> Callable[[], object]:
        if part == "with attention":
            if name == "genfast":
                return lambda: ops.qknorm_rope_attention(qkv, leaves[1], leaves[2], cos, sin, **settings)
            return lambda: F.scaled_dot_product_attention(*pairs[name](*leaves), split(qkv)[2])
        if not backward:
            return lambda: pairs[name](*leaves)
        results, grads = pairs[name](*leaves), tuple(t.transpose(1, 2) for t in qkv.detach().unbind(2)[:2])
        return lambda: torch.autograd.grad(results, leaves, grads, retain_graph=True)

    variants = {name: variant(name) for name in pairs}
    elements = 2 * case.batch * case.tokens * case.heads * case.width
    if not backward and part != "with attention":
        source, target = draw(elements), draw(elements)
        variants["copy"] = lambda: target.copy_(source)
    results = timing.interleave(
        variants,
        device=options.device,
        rounds=3 if options.quick else 11,
        round_seconds=0.0 if options.quick else 0.03,
        quiet=not options.quick,
    )
    facts = timing.environment(options.device) | {"command": options.command}
    kind = str(dtype).removeprefix("torch.")
    label = f"{case.name}, {kind}, {part}, {'x'.join(map(str, case.shape))}"
    rows = []
    for name, t in results.items():
        row: Row = {"case": label, "variant": name, "shape": case.shape, "dtype": kind}
        row |= {"median_us": round(t.median, 3), "iqr_us": round(t.iqr, 3), "rounds": t.rounds, "discarded": t.discarded}
        row |= {"bytes": (3 if backward else 2) * elements * dtype.itemsize, "gflop": 0.0}
        if part == "with attention":  # the two products; q, k and v in, the result out
            row |= {"gflop": round(4e-9 * case.batch * case.heads * case.tokens**2 * case.width, 3)}
        if "copy" in results:
            row |= {"share_of_copy": round(results["copy"].median / t.median, 3)}
        rows.append(row | facts)
    return rows


def run(options: Options) -> Iterator[tuple[str, list[Row]]]:
    for threads in options.threads:
        if options.device == "cpu":
            torch.set_num_threads(threads)
        for case in qknorm_cases(options.device):
            if options.filter not in case.name:
                continue
            if options.quick:
                case = replace(case, tokens=min(case.tokens, 64))
            for dtype in (torch.bfloat16, torch.float32):
                for part in ("forward", "backward", "with attention"):
                    rows = options.attempt(f"{case.name}, {dtype}, {part}", partial(time_case, case, dtype, part, options))
                    if rows:
                        yield rows[0]["case"] + (f", {threads} threads" if threads else ""), rows
