"""genfast.compat.stylegan runs code written against `torch_utils` and `dnnlib`, with the reference's values in float64."""

from __future__ import annotations

import copy
import importlib
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from genfast import ops, reference
from genfast.compat import stylegan


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def torch_utils() -> Iterator[ModuleType]:
    stylegan.install()
    yield importlib.import_module("torch_utils")
    stylegan.uninstall()


@pytest.fixture
def networks(torch_utils: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    yield importlib.import_module("stylegan_networks")
    del sys.modules["stylegan_networks"]


def plain() -> dict[str, SimpleNamespace]:
    """The modules that the networks use, of `genfast.reference` alone and without torch's own convolution tricks."""

    def without_impl(name: str) -> Any:
        return lambda *args, impl="cuda", **kwargs: getattr(reference, name)(*args, **kwargs)

    return {
        "bias_act": SimpleNamespace(bias_act=without_impl("bias_act"), activation_funcs={}),
        "upfirdn2d": SimpleNamespace(upsample2d=without_impl("upsample2d")),
        "conv2d_resample": SimpleNamespace(conv2d_resample=reference.conv2d_resample),
        "fma": SimpleNamespace(fma=lambda a, b, c: a * b + c),
    }


def everything(g: Any, d: Any, dtype: torch.dtype, fused: bool) -> list[Tensor]:
    """Pictures, logits, and the gradients of a generator step with path length and of a discriminator step with R1."""
    g, d = copy.deepcopy(g).to(dtype), copy.deepcopy(d).to(dtype)
    z, real = normal(4, 8).to(dtype), normal(4, 3, 8, 8, seed=1).to(dtype).requires_grad_()
    image = g(z, fused)
    ws = normal(4, 2, 8, seed=2).to(dtype).requires_grad_()
    path_images = g.synthesis(ws, fused)
    (path,) = torch.autograd.grad((path_images * normal(*path_images.shape, seed=3).to(dtype)).sum(), ws, create_graph=True)
    lengths = path.square().sum(2).mean(1).sqrt()
    step_g = F.softplus(-d(image)).mean() + 2 * (lengths - 1).square().mean()
    logits = d(real)
    (slope,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
    penalty = slope.square().sum([1, 2, 3])
    step_d = (F.softplus(d(image.detach())) + F.softplus(-logits) + 5 * penalty).mean()
    results = [image, logits, lengths, penalty]
    for step, network in ((step_g, g), (step_d, d)):
        results += [t for t in torch.autograd.grad(step, list(network.parameters()), allow_unused=True) if t is not None]
    return [t.detach() for t in results]


@pytest.mark.parametrize("fused", [True, False], ids=["grouped", "dense"])
@pytest.mark.parametrize("impl", ["cuda", "ref"])
def test_networks(impl: str, fused: bool, networks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, path length and R1 with the gradients of both steps: as the reference in float64, and near it in float32."""
    torch.manual_seed(0)
    g, d = networks.Generator(), networks.Discriminator()
    monkeypatch.setattr(networks, "IMPL", impl)
    got = {dtype: everything(g, d, dtype, fused) for dtype in (torch.float64, torch.float32)}
    for name, module in plain().items():
        monkeypatch.setattr(networks, name, module)
    want, working = everything(g, d, torch.float64, fused), everything(g, d, torch.float32, fused)
    assert len(want) > 30
    for exact, literal, double, single in zip(want, working, got[torch.float64], got[torch.float32], strict=True):
        scale = float(exact.abs().max())
        assert scale > 0
        torch.testing.assert_close(double, exact, rtol=1e-9, atol=1e-10 * scale)
        error = float((literal - exact).abs().max())
        assert float((single - exact).abs().max()) <= 4 * error + 1e-5 * scale


def test_impl(torch_utils: Any) -> None:
    x, f = normal(1, 2, 4, 4), ops.setup_filter([1, 3, 3, 1])
    t = torch_utils.ops
    for function, name, arguments in (
        (t.bias_act.bias_act, "bias_act", {"act": "swish"}),
        (t.upfirdn2d.upfirdn2d, "upfirdn2d", {"f": f, "up": 2}),
        (t.upfirdn2d.filter2d, "filter2d", {"f": f}),
        (t.upfirdn2d.upsample2d, "upsample2d", {"f": f}),
        (t.upfirdn2d.downsample2d, "downsample2d", {"f": f}),
        (t.filtered_lrelu.filtered_lrelu, "filtered_lrelu", {"fu": f, "fd": f, "up": 2, "down": 2, "padding": 3}),
    ):
        for impl in ("cuda", "ref"):
            torch.testing.assert_close(
                function(x, **arguments, impl=impl), getattr(reference, name)(x, **arguments), rtol=1e-12, atol=1e-12
            )
        with pytest.raises(ValueError, match="impl: got 'xla', supported: 'cuda'"):
            function(x, **arguments, impl="xla")
    for act, known in t.bias_act.activation_funcs.items():
        y = known.func(x, alpha=known.def_alpha) * known.def_gain
        torch.testing.assert_close(y, reference.bias_act(x, act=act))


def test_no_weight_gradients(torch_utils: Any) -> None:
    """Inside, weights get no gradient and inputs do; the graph made inside still reaches the weights."""
    gradfix, resample = torch_utils.ops.conv2d_gradfix, torch_utils.ops.conv2d_resample
    for function in (
        lambda x, w: gradfix.conv2d(x, w, padding=1),
        lambda x, w: gradfix.conv_transpose2d(x, w, stride=2),
        lambda x, w: resample.conv2d_resample(x, w, up=2, padding=1),
    ):
        x, w = normal(1, 2, 5, 5).requires_grad_(), normal(2, 2, 3, 3, seed=1).requires_grad_()
        (want,) = torch.autograd.grad(torch.autograd.grad(function(x, w).square().sum(), x, create_graph=True)[0].square().sum(), w)
        gradfix.enabled = True
        try:
            y = function(x, w)
            with gradfix.no_weight_gradients():
                y.sum().backward(retain_graph=True)
                assert w.grad is None and x.grad is not None
                (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            torch.testing.assert_close(torch.autograd.grad(slope.square().sum(), w)[0], want)
            with gradfix.no_weight_gradients(False):
                function(x, w).sum().backward()
            assert w.grad is not None
        finally:
            gradfix.enabled = False


def test_grid_sample(torch_utils: Any) -> None:
    """Torch's values and gradients, and the second derivative that torch does not have; that in the grid is refused."""
    gradfix = torch_utils.ops.grid_sample_gradfix
    x, grid = normal(2, 2, 4, 5).requires_grad_(), (normal(2, 3, 3, 2, seed=1) / 2).requires_grad_()
    want = F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    dy = normal(*want.shape, seed=2)
    gradfix.enabled = True
    try:
        got = gradfix.grid_sample(x, grid)
        assert torch.equal(got, want)
        for a, b in zip(torch.autograd.grad(got, (x, grid), dy), torch.autograd.grad(want, (x, grid), dy), strict=True):
            torch.testing.assert_close(a, b)
        fixed = grid.detach()
        assert torch.autograd.gradgradcheck(lambda t: gradfix.grid_sample(t, fixed) ** 2, [x])
        (slope,) = torch.autograd.grad(gradfix.grid_sample(x, grid).square().sum(), grid, create_graph=True)
        with pytest.raises(NotImplementedError, match="grid_sample: got a second derivative in grid, supported: "):
            slope.sum().backward()
    finally:
        gradfix.enabled = False


def test_fma(torch_utils: Any) -> None:
    a, b, c = normal(2, 3, 4, 4), normal(2, 3, 1, 1, seed=1), normal(4, 4, seed=2)
    torch.testing.assert_close(torch_utils.ops.fma.fma(a, b, c), a * b + c)


def test_persistence(networks: Any) -> None:
    made = networks.Conv(2, 3, kernel=1, activation="lrelu")
    assert made.init_args == (2, 3) and made.init_kwargs == {"kernel": 1, "activation": "lrelu"}
    assert networks.persistence.is_persistent(made) and not networks.persistence.is_persistent(torch.nn.Linear(1, 1))
    again = pickle.loads(pickle.dumps(made))
    assert again.init_args == (2, 3) and torch.equal(again.weight, made.weight)
    foreign = b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n((dtR."  # the original's form of a pickled object
    with pytest.raises(NotImplementedError, match="pickle: got one of StyleGAN's persistent classes"):
        pickle.loads(foreign)


def test_misc(torch_utils: Any) -> None:
    misc = torch_utils.misc
    torch.testing.assert_close(misc.constant([[1, 2]], shape=[3, 2]), torch.tensor([[1.0, 2]] * 3))
    assert misc.const_like(torch.zeros(1, dtype=torch.float16), 2).dtype == torch.float16
    assert misc.constant(1, dtype=torch.int32).dtype == torch.int32
    with pytest.raises(AssertionError, match=r"tensor: got shape \(1, 2\), supported: \(None, 3\)"):
        misc.assert_shape(torch.zeros(1, 2), [None, 3])
    source, target = torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)
    source.running_mean.fill_(2)  # type: ignore[union-attr]
    misc.copy_params_and_buffers(source, target, require_all=True)
    assert target.running_mean.tolist() == [2, 2, 2]  # type: ignore[union-attr]
    shards = [iter(misc.InfiniteSampler(range(10), rank=r, num_replicas=2, seed=3, window_size=0)) for r in (0, 1)]
    assert sorted(next(s) for _ in range(5) for s in shards) == list(range(10))


def test_print_module_summary(torch_utils: Any, capsys: pytest.CaptureFixture[str]) -> None:
    network = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    assert torch_utils.misc.print_module_summary(network, [torch.zeros(4, 2)]).shape == (4, 3)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows == [
        ["0", "9", "0", "[4,", "3]", "float32"],
        ["1", "6", "7", "[4,", "3]", "float32"],
        ["<top-level>", "0", "0", "[4,", "3]", "float32"],
    ]


def test_training_stats(torch_utils: Any) -> None:
    stats = torch_utils.training_stats
    collector = stats.Collector(regex="test/.*")
    value = normal(5, 3)
    assert stats.report("test/value", value) is value
    stats.report("test/value", 2.0)
    stats.report("other", 1.0)
    collector.update()
    together = torch.cat([value.flatten(), torch.tensor([2.0])])
    assert collector.num("test/value") == 16 and collector.names() == ["test/value"]
    assert collector["test/value"] == pytest.approx(float(together.mean()))
    assert collector.as_dict()["test/value"].std == pytest.approx(float(together.std(correction=0)))
    stats.report("test/value", 7.0)
    collector.update()
    assert collector.mean("test/value") == 7.0
    with pytest.raises(NotImplementedError, match="init_multiprocessing: got rank 1"):
        stats.init_multiprocessing(1, None)


def test_dnnlib(torch_utils: Any) -> None:
    dnnlib = importlib.import_module("dnnlib")
    options = dnnlib.EasyDict(a=1)
    options.b = 2
    del options.a
    assert options == {"b": 2} and not hasattr(options, "a")
    assert dnnlib.util.construct_class_by_name(2, 3, class_name="torch.nn.Linear").weight.shape == (3, 2)
    assert dnnlib.util.get_obj_by_name("torch.nn.functional.relu") is F.relu
    assert [dnnlib.util.format_time(s) for s in (59.4, 61, 3661, 90061)] == ["59s", "1m 01s", "1h 01m 01s", "1d 01h 01m"]


def test_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's own modules in these folders still come from there; `uninstall` leaves nothing; what is imported already stays."""
    (tmp_path / "torch_utils" / "ops").mkdir(parents=True)
    for name in ("__init__.py", "misc.py", "own.py", "ops/__init__.py", "ops/own.py"):
        (tmp_path / "torch_utils" / name).write_text(f"WHO = 'the user, {name}'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        stylegan.install()
        stylegan.install()
        assert importlib.import_module("torch_utils.misc") is stylegan.misc
        assert importlib.import_module("torch_utils.own").WHO == "the user, own.py"
        assert importlib.import_module("torch_utils.ops.own").WHO == "the user, ops/own.py"
        with pytest.raises(NotImplementedError, match="get_plugin: got 'bias_act_plugin', supported: none"):
            importlib.import_module("torch_utils.custom_ops").get_plugin("bias_act_plugin", sources=[])
        stylegan.uninstall()
        assert "torch_utils.misc" not in sys.modules
        for name in ("torch_utils.own", "torch_utils.ops.own"):
            del sys.modules[name]
        assert importlib.import_module("torch_utils.misc").WHO == "the user, misc.py"
        with pytest.raises(RuntimeError, match="install: got torch_utils imported already, supported: "):
            stylegan.install()
    finally:
        stylegan.uninstall()
        for name in [name for name in sys.modules if name.split(".")[0] == "torch_utils"]:
            del sys.modules[name]
