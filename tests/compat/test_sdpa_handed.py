"""What the drop-in hands to torch: inside `patched` it gives torch's result, or torch's error, to the bit."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from genfast.compat import sdpa

STOCK = F.scaled_dot_product_attention
Q, K = (torch.randn(1, 2, n, 8, generator=torch.Generator().manual_seed(n)) for n in (20, 30))
QUANTIZED = torch.quantize_per_tensor(Q, 0.1, 0, torch.quint8)
NESTED = [torch.nested.nested_tensor([Q[0].transpose(0, 1), Q[0, :, :17].transpose(0, 1)], layout=torch.jagged).transpose(1, 2)] * 3


def attend(*arguments: Any, **options: Any) -> Any:
    return F.scaled_dot_product_attention(*arguments, **options)


class _Recognises(Tensor):
    """Its attention is 7 everywhere; it finds the call by the identity of the function, as it is now in torch.nn.functional or was."""

    now = False

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is (F.scaled_dot_product_attention if cls.now else STOCK):
            return torch.full((3,), 7.0)
        return super().__torch_function__(function, types, args, kwargs)


class _RecognisesNow(_Recognises):
    now = True


class _Doubles(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        return 2 * result if function is F.scaled_dot_product_attention else result


def under(context: Any, *arguments: Any, **options: Any) -> Any:
    with context:
        return attend(*arguments, **options)


def priority() -> Any:
    return sdpa_kernel(
        [SDPBackend.MATH, *(b for b in SDPBackend.__members__.values() if int(b) >= 0 and b != SDPBackend.MATH)], set_priority=True
    )


def flash_off() -> Tensor:
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        return attend(Q, K, K)
    finally:
        torch.backends.cuda.enable_flash_sdp(True)


def fake() -> Tensor:
    with FakeTensorMode() as mode:
        shape = attend(*(mode.from_tensor(t) for t in (Q, K, K))).shape
    return torch.zeros(shape)


def flops() -> Tensor:
    counter = FlopCounterMode(display=False)
    with counter:
        attend(Q, K, K)
    return torch.tensor(counter.get_total_flops())


def scripted() -> Tensor:
    module = torch.jit.script(nn.MultiheadAttention(8, 2).eval())
    torch.jit.save(module, io.BytesIO())
    for parameter in module.parameters():
        nn.init.constant_(parameter, 0.3)
    result: Tensor = module(Q[0, 0], K[0, 0], K[0, 0], need_weights=False)[0]
    return result


CASES: dict[str, Callable[[], Any]] = {
    "causal, lower right": lambda: attend(Q, K, K, attn_mask=causal_lower_right(20, 30)),
    "causal, upper left": lambda: attend(Q, K, K, attn_mask=causal_upper_left(20, 30)),
    "causal, square, scaled": lambda: attend(Q, Q, Q, attn_mask=causal_lower_right(20, 20), scale=0.3),
    "a subclass that knows torch's function": lambda: attend(Q.as_subclass(_Recognises), K, K),
    "a subclass that looks it up": lambda: attend(Q, K, K.as_subclass(_RecognisesNow)),
    "a mask of a subclass": lambda: attend(Q, K, K, torch.zeros(20, 30).as_subclass(_RecognisesNow)),
    "a subclass without rules": lambda: attend(Q.as_subclass(type("Named", (Tensor,), {})), K, K).as_subclass(Tensor),
    "a mode": lambda: under(_Doubles(), Q, K, K),
    "nested, strided": lambda: attend(*[torch.nested.nested_tensor([Q[0], 2 * Q[0]])] * 3).to_padded_tensor(0.0),
    "nested, jagged": lambda: attend(*NESTED).transpose(1, 2).values(),
    "fake": fake,
    "flops": flops,
    "meta": lambda: torch.zeros(attend(Q.to("meta"), K.to("meta"), K.to("meta")).shape),
    "functionalized": lambda: torch.func.functionalize(attend)(Q, K, K),
    "traced": lambda: torch.jit.trace(attend, (Q, K, K), check_trace=False)(2 * Q, K, K),
    "scripted": scripted,
    "compiled": lambda: torch.compile(attend, fullgraph=True, backend="aot_eager")(Q, K, K),
    "the math backend": lambda: under(sdpa_kernel(SDPBackend.MATH), Q, K, K),
    "a backend that is not there": lambda: under(sdpa_kernel(SDPBackend.CUDNN_ATTENTION), Q, K, K),
    "another priority": lambda: under(priority(), Q, K, K),
    "a backend switched off": flash_off,
    "mask without dimensions": lambda: attend(Q, K, K, torch.zeros(())),
    "mask of one dimension": lambda: attend(Q, K, K, torch.zeros(30)),
    "mask of five dimensions": lambda: attend(Q, K, K, torch.zeros(1, 1, 1, 20, 30)),
    "mask of integers": lambda: attend(Q, K, K, torch.zeros(20, 30, dtype=torch.int32)),
    "mask that is a list": lambda: attend(Q, K, K, [[0.0] * 30]),
    "positional scale": lambda: attend(Q, K, K, None, 0.0, False, 0.3),
    "scale inf": lambda: attend(Q, K, K, scale=float("inf")).isnan(),
    "scale as a tensor": lambda: attend(Q, K, K, scale=torch.tensor(0.3)),
    "scale as a string": lambda: attend(Q, K, K, scale="0.3"),
    "is_causal as a number": lambda: attend(Q, K, K, None, 0.0, 1),
    "enable_gqa as a number": lambda: attend(Q, K, K, enable_gqa=1),
    "dropout of None": lambda: attend(Q, K, K, None, None),
    "negative dropout": lambda: attend(Q, K, K, dropout_p=-0.5),
    "no tensor": lambda: attend(Q, K, None),
    "complex": lambda: attend(Q.cfloat(), K.cfloat(), K.cfloat()),
    "float8": lambda: attend(*[Q.to(torch.float8_e4m3fn)] * 3),
    "integers": lambda: attend(Q.int(), K.int(), K.int()),
    "quantized": lambda: attend(QUANTIZED, QUANTIZED, QUANTIZED),
    "sparse": lambda: attend(Q.to_sparse(), K, K),
    "empty": lambda: attend(Q[:, :, :0], K, K),
    "no keys": lambda: attend(Q, K[:, :, :0], K[:, :, :0]),
}


def outcome(case: Callable[[], Any]) -> Any:
    try:
        result = case()
    except Exception as error:  # whatever torch raises is what is compared
        return type(error), str(error)
    return result.as_subclass(Tensor) if isinstance(result, Tensor) else result


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore")
def test_torchs_result_or_torchs_error(name: str) -> None:
    expected = outcome(CASES[name])
    with patch.object(sdpa.ops, "attention", side_effect=AssertionError), sdpa.patched():
        got = outcome(CASES[name])
        assert F.scaled_dot_product_attention is sdpa.scaled_dot_product_attention
    assert F.scaled_dot_product_attention is STOCK
    if isinstance(expected, Tensor):
        assert got.dtype == expected.dtype and torch.equal(got, expected)
    else:
        assert got == expected


OURS: dict[str, Callable[[], Any]] = {
    "vmap": lambda: torch.vmap(attend, in_dims=(0, None, None))(torch.stack([Q, 2 * Q]), K, K),
    "gradient": lambda: torch.func.grad(lambda k: attend(Q, k, k).square().sum())(K),
    "a negated view": lambda: attend(torch.complex(Q, Q).conj().imag, K, K),
    "a broadcast last dimension": lambda: attend(Q, K[..., :1].expand(K.shape), K),
    "a mask of any strides": lambda: attend(Q, K, K, torch.linspace(-1, 1, 600).view(30, 20).t()),
    "negative scale": lambda: attend(Q, K, K, scale=-2.0),
    "integers of Python": lambda: attend(Q, K, K, None, 0, scale=1),
    "under a device": lambda: under(torch.device("cpu"), Q, K, K),
    "a parameter": lambda: attend(nn.Parameter(Q), K, K),
}


@pytest.mark.parametrize("name", OURS)
def test_ours(name: str) -> None:
    expected = OURS[name]()
    with patch.object(sdpa, "_torch_attention", side_effect=AssertionError), sdpa.patched():
        torch.testing.assert_close(OURS[name](), expected)


def test_order_of_leaving() -> None:
    """Contexts may be nested, and a call that is handed to torch may outlast the context of another thread."""
    entered, leave = threading.Event(), threading.Event()

    class Waits(Tensor):
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert function is STOCK is F.scaled_dot_product_attention
            entered.set()
            leave.wait(10)

    with sdpa.patched():
        with sdpa.patched():
            assert F.scaled_dot_product_attention is sdpa.scaled_dot_product_attention
        thread = threading.Thread(target=attend, args=(Q.as_subclass(Waits), K, K))
        assert F.scaled_dot_product_attention is sdpa.scaled_dot_product_attention
        thread.start()
        assert entered.wait(10)
    leave.set()
    thread.join()
    assert F.scaled_dot_product_attention is STOCK
    with sdpa.patched():
        assert F.scaled_dot_product_attention is sdpa.scaled_dot_product_attention
