"""ConvBlock and Attention honour whatever stands in their submodules' place or hangs on them: equal to calls of the submodules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from genfast.models.dcgan import TorchBlock
from genfast.nn import Attention, ConvBlock
from genfast.nn.plain import plain


class LoRA(nn.Module):
    """An adapter in a layer's place that still shows the layer's weight, as peft's do."""

    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Conv2d(base.in_channels, 2, base.kernel_size, base.stride, base.padding, bias=False)  # type: ignore[arg-type]
        self.up = nn.Conv2d(2, base.out_channels, 1, bias=False)

    def __getattr__(self, name: str) -> Any:
        return getattr(super().__getattr__("base"), name) if name in ("weight", "stride", "padding", "bias") else super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))  # type: ignore[no-any-return]


class Doubled(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w


class NamedParameter(nn.Parameter):
    pass


def circular(conv: Any) -> None:
    """How pictures without seams are made of a network: the method that convolves is replaced on every instance."""
    conv._conv_forward = lambda x, weight, bias: F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias)


def conv(**options: Any) -> Callable[[Any], None]:
    def change(block: Any) -> None:
        block.conv = nn.Conv2d(**{"in_channels": 3, "out_channels": 4, "kernel_size": 3, "padding": 1, "bias": False, **options})

    return change


def norm(make: Callable[[], nn.Module]) -> Callable[[Any], None]:
    def change(block: Any) -> None:
        block.norm = make()

    return change


def freeze(block: Any) -> None:
    block.norm.eval()


def untracked(block: Any) -> None:
    block.norm.track_running_stats = False


CHANGES: dict[str, Callable[[Any], object]] = {
    "nothing": lambda b: None,
    "a forward hook": lambda b: b.conv.register_forward_hook(lambda m, i, o: 3 * o),
    "a hook before": lambda b: b.conv.register_forward_pre_hook(lambda m, i: (2 * i[0],)),
    "a hook of the gradient": lambda b: b.conv.register_full_backward_hook(lambda m, i, o: (2 * i[0],)),
    "a hook before the gradient": lambda b: b.conv.register_full_backward_pre_hook(lambda m, o: (2 * o[0],)),
    "a hook of the norm": lambda b: b.norm.register_forward_hook(lambda m, i, o: 3 * o),
    "spectral norm": lambda b: parametrizations.spectral_norm(b.conv),
    "spectral norm, old": lambda b: nn.utils.spectral_norm(b.conv),
    "weight norm": lambda b: parametrizations.weight_norm(b.conv),
    "weight norm, old": lambda b: nn.utils.weight_norm(b.conv),
    "a parametrised norm": lambda b: parametrize.register_parametrization(b.norm, "weight", Doubled()),
    "pruning": lambda b: prune.random_unstructured(b.conv, "weight", 0.5),
    "pruning, made permanent": lambda b: (prune.random_unstructured(b.conv, "weight", 0.5), prune.remove(b.conv, "weight")),
    "an adapter": lambda b: setattr(b, "conv", LoRA(b.conv)),
    "a sequence": lambda b: setattr(b, "conv", nn.Sequential(b.conv, nn.Dropout(0.0))),
    "a forward of its own": lambda b: setattr(b.conv, "forward", lambda x: F.conv2d(x, 2 * b.conv.weight, padding=1)),
    "seamless": lambda b: (setattr(b.conv, "padding", (0, 0)), circular(b.conv)),
    "a parameter of another class": lambda b: setattr(b.conv, "weight", NamedParameter(b.conv.weight.detach())),
    "a larger kernel": conv(kernel_size=5, padding=2),
    "a stride": conv(stride=2),
    "a bias": conv(bias=True),
    "dilation": conv(dilation=2, padding=2),
    "padding by name": conv(padding="same"),
    "reflected padding": conv(padding_mode="reflect"),
    "transposed": lambda b: setattr(b, "conv", nn.ConvTranspose2d(3, 4, 3, 2, 1, output_padding=1, bias=False)),
    "grouped": lambda b: setattr(b, "conv", nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, 1, 1, groups=2, bias=False))),
    "lazy": lambda b: setattr(b, "conv", nn.LazyConv2d(4, 3, padding=1, bias=False)),
    "frozen statistics": freeze,
    "statistics not tracked": norm(lambda: nn.BatchNorm2d(4, track_running_stats=False)),
    "statistics no longer tracked": untracked,
    "a cumulative average": norm(lambda: nn.BatchNorm2d(4, momentum=None)),
    "without an affine map": norm(lambda: nn.BatchNorm2d(4, affine=False)),
    "another epsilon": norm(lambda: nn.BatchNorm2d(4, eps=0.5, momentum=0.3)),
    "group norm": norm(lambda: nn.GroupNorm(2, 4, eps=0.1)),
    "instance norm": norm(lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True)),
    "identity": norm(nn.Identity),
    "lazy norm": norm(nn.LazyBatchNorm2d),
    "no norm": lambda b: setattr(b, "norm", None),
    "a bias before the norm": lambda b: setattr(b, "bias", nn.Parameter(torch.arange(4.0))),
}


def called(block: Any, x: Tensor, residual: Tensor | None) -> Tensor:
    y = block.conv(x)
    y = y if block.bias is None else y + block.bias[:, None, None]
    y = y if block.norm is None else block.norm(y)
    return F.leaky_relu(y if residual is None else y + residual, 0.2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("name", CHANGES)
def test_conv_block(name: str, residual: bool) -> None:
    """Values, gradients and buffers over two steps of training and one of evaluation."""
    blocks = []
    for _ in range(3):
        torch.manual_seed(0)
        block = ConvBlock(3, 4, act="lrelu")
        CHANGES[name](block)
        blocks.append(block)
    probe, x = blocks.pop(), torch.randn(4, 3, 8, 8)
    for step in range(3):
        if step == 2:
            for block in blocks:
                block.eval()
        xs = [x.clone().requires_grad_() for _ in blocks]
        torch.manual_seed(1)
        more = torch.randn(called(probe, x, None).shape) if residual else None
        ys = []
        for way, block, given in zip((ConvBlock.__call__, called), blocks, xs, strict=True):
            torch.manual_seed(2)  # for parameters that are made by the first call
            ys.append(way(block, given, more))
        torch.testing.assert_close(ys[0], ys[1])
        for y in ys:
            (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        torch.testing.assert_close(xs[0].grad, xs[1].grad)
        for a, b in zip(blocks[0].parameters(), blocks[1].parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None)
            if a.grad is not None:
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
        for a, b in zip(blocks[0].buffers(), blocks[1].buffers(), strict=True):
            torch.testing.assert_close(a, b)


def test_calls_are_seen_by_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x, seen = ConvBlock(3, 4), torch.randn(2, 3, 8, 8), list[type]()
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(type(m)))
    block(x)
    handle.remove()
    assert seen == [nn.Conv2d, nn.BatchNorm2d, ConvBlock]
    original = nn.Conv2d.forward
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: 0 * original(self, x))
    bare = ConvBlock(3, 4, norm=None)
    assert bare(x).abs().max() == 0
    monkeypatch.undo()
    assert bare(x).abs().max() > 0
    assert all(plain(m, type(m)) for m in (block.conv, block.norm))


def test_weights_given_for_one_call() -> None:
    block, x = ConvBlock(3, 4), torch.randn(2, 3, 8, 8)
    doubled = {name: 2 * p for name, p in block.named_parameters()}
    y = torch.func.functional_call(block, doubled, (x,))
    block.load_state_dict({**block.state_dict(), **doubled})
    torch.testing.assert_close(y, block(x))


def test_replaced_in_a_16_bit_body() -> None:
    """A submodule that is called meets pictures of 16 bits with its own wide weights, as the fused way does."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8).bfloat16()
    for make in (lambda: ConvBlock(3, 4, act="lrelu"), lambda: TorchBlock(3, 4, 3, act="lrelu")):
        block: Any = make()
        want = block(x)
        block.conv.register_forward_hook(lambda m, i, o: None)
        block.norm.register_forward_hook(lambda m, i, o: None)
        got = block(x)
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)


@pytest.fixture
def one_rank(tmp_path: Any) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.filterwarnings("ignore")
def test_sharded_by_module() -> None:
    """A sharded submodule has its weights only while it is called; a sharded block has those of its submodules."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, x = init_device_mesh("cpu", (1,)), torch.randn(2, 3, 8, 8)
    for whole in (False, True):
        block = ConvBlock(3, 4)
        want = block(x)
        fully_shard(block if whole else block.conv, mesh=mesh)
        got = block(x)
        torch.testing.assert_close(got, want)
        got.square().sum().backward()
        assert block.conv.weight.grad is not None


# ---- attention ----------------------------------------------------------------------------------------------------------------


def normed_late(module: Attention, x: Tensor) -> Tensor:
    q, k, v = module.qkv(x).unflatten(2, (-1, 8)).transpose(1, 2).split(4, dim=1)
    o = F.scaled_dot_product_attention(module.q_norm(q), module.k_norm(k), v)
    result: Tensor = module.proj(o.transpose(1, 2).flatten(2))
    return result


ATTENTION_CHANGES: dict[str, Callable[[Any], object]] = {
    "nothing": lambda m: None,
    "a hook": lambda m: m.q_norm.register_forward_hook(lambda m, i, o: 3 * o),
    "a hook before": lambda m: m.k_norm.register_forward_pre_hook(lambda m, i: (i[0] + 1,)),
    "a parametrisation": lambda m: parametrize.register_parametrization(m.k_norm, "weight", Doubled()),
    "identity": lambda m: (setattr(m, "q_norm", nn.Identity()), setattr(m, "k_norm", nn.Identity())),
    "both of another kind": lambda m: (setattr(m, "q_norm", nn.LayerNorm(8)), setattr(m, "k_norm", nn.LayerNorm(8))),
    "one of another kind": lambda m: setattr(m, "q_norm", nn.LayerNorm(8)),
    "another epsilon": lambda m: (setattr(m.q_norm, "eps", 0.5), setattr(m.k_norm, "eps", 0.5)),
    "two epsilons": lambda m: setattr(m.q_norm, "eps", 0.5),
    "an epsilon of its own": lambda m: (setattr(m.q_norm, "eps", None), setattr(m.k_norm, "eps", None)),
    "no weight": lambda m: setattr(m, "q_norm", nn.RMSNorm(8, eps=1e-6, elementwise_affine=False)),
    "an adapter of the projection": lambda m: setattr(m, "qkv", nn.Sequential(m.qkv, nn.Tanh())),
    "a forward of its own": lambda m: setattr(m.q_norm, "forward", lambda x: x.sin()),
}


@pytest.mark.parametrize("impl", ["fused", "reference"])
@pytest.mark.parametrize("name", ATTENTION_CHANGES)
def test_attention(name: str, impl: str) -> None:
    torch.manual_seed(0)
    module, x = Attention(32, 4, qk_norm="rms", impl=impl), torch.randn(2, 20, 32)
    ATTENTION_CHANGES[name](module)
    got, want = module(x), normed_late(module, x)
    torch.testing.assert_close(got, want)
    for a, b in zip(
        *(torch.autograd.grad(y.square().sum(), list(module.parameters()), materialize_grads=True) for y in (got, want)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_attention_with_a_hook_under_autocast() -> None:
    module, x = Attention(32, 4, qk_norm="rms"), torch.randn(2, 20, 32)
    module.q_norm.register_forward_hook(lambda m, i, o: None)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), module(x), rtol=0, atol=0.03)
