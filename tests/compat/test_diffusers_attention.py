"""`accelerate` puts the attention of a pipeline's networks on genfast's operator, and `restore` takes it back."""

from __future__ import annotations

import copy
import io
import pickle
import types

import diffusers
import pytest
import tiny
import torch
import torch.nn.functional as F
from diffusers.models import attention_processor

import genfast.compat.diffusers as gfd
from genfast.compat import sdpa
from genfast.compat.diffusers import attention
from genfast.compat.diffusers.attention import FusedAttention


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.fixture
def calls(monkeypatch):
    """The shapes of q that genfast's attention was called with."""
    shapes, attention = [], sdpa.ops.attention

    def counted(q, *rest):
        shapes.append(tuple(q.shape))
        return attention(q, *rest)

    monkeypatch.setattr(sdpa.ops, "attention", counted)
    return shapes


def unet():
    torch.manual_seed(0)
    return tiny.unet().eval(), (draw(2, 4, 16, 16), 3, draw(2, 5, 8))


def wan():
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, freq_dim=16, ffn_dim=16, num_layers=1
    )
    return model, (draw(1, 4, 2, 8, 8), torch.tensor([3]), draw(1, 5, 8))


def pixart():
    """The text has a mask, which becomes an additive one."""
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        sample_size=16,
        cross_attention_dim=16,
        caption_channels=8,
        use_additional_conditions=False,
    )
    none = {"resolution": None, "aspect_ratio": None}
    return model, (draw(2, 4, 16, 16), draw(2, 5, 8), torch.tensor([3, 4]), none, None, None, torch.tensor([[1, 1, 1, 0, 0], [1] * 5]))


def pipe_of(model):
    return types.SimpleNamespace(components={"net": model})


def count(model, kind=FusedAttention):
    return sum(isinstance(m, kind) for m in model.modules())


def assert_close(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("make, modules", [(unet, 8), (wan, 2), (pixart, 2)], ids=["unet", "wan", "pixart"])
@torch.no_grad()
def test_outputs_and_back(make, modules, calls):
    """Every attention of enough queries is genfast's; afterwards every bit is stock's again."""
    torch.manual_seed(0)
    model, given = make()
    state, expected = list(model.state_dict()), model(*given, return_dict=False)[0]
    report = gfd.accelerate(pipe_of(model))
    assert report.swapped == {"net": f"{modules} attention modules, fused"} and not report.left
    assert str(gfd.accelerate(pipe_of(model))) == f"net: {modules} attention modules, fused already"
    assert not calls
    assert_close(model(*given, return_dict=False)[0], expected)
    assert len(calls) == modules == count(model) and list(model.state_dict()) == state
    gfd.restore(pipe_of(model))
    assert torch.equal(model(*given, return_dict=False)[0], expected)
    assert len(calls) == modules and count(model) == 0


def test_gradients(calls):
    model, given = unet()

    def gradients():
        return torch.autograd.grad(model(*given).sample.square().sum(), list(model.parameters()))

    expected = gradients()
    gfd.accelerate(pipe_of(model))
    for got, want in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * max(1.0, float(want.abs().max())))
    assert len(calls) == 8


def saved_and_loaded(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded, lambda m: m.to(torch.float64).float()]
)
@torch.no_grad()
def test_copies_stay_accelerated(how, calls):
    model, given = unet()
    gfd.accelerate(pipe_of(model))
    expected = model(*given).sample
    twin = how(model)
    assert count(twin) == 8 and torch.equal(twin(*given).sample, expected) and len(calls) == 16
    gfd.restore(pipe_of(twin))
    assert count(twin) == 0


def test_a_saved_pipeline_is_a_stock_one(tmp_path):
    pipe = tiny.stable_diffusion()
    gfd.accelerate(pipe)
    pipe.unet.save_pretrained(tmp_path)
    loaded = diffusers.UNet2DConditionModel.from_pretrained(tmp_path)
    assert count(loaded) == 0 and count(pipe.unet) == 8
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, pipe.unet.state_dict()[name])


@torch.no_grad()
def test_what_computes_attention_itself_is_left_and_named(calls):
    model, given = unet()
    attentions = [m for m in model.modules() if isinstance(m, attention_processor.Attention)]
    for module in attentions[:3]:
        module.set_processor(attention_processor.AttnProcessor())
    attentions[3].processor._attention_backend = "_native_math"
    report = gfd.accelerate(pipe_of(model))
    assert report.swapped == {"net": "4 attention modules, fused"}
    assert str(report).splitlines()[1] == (
        "net: left, 3 attention modules, AttnProcessor does not call torch's attention; 1 attention module, set to the backend _native_math"
    )
    model(*given)
    assert len(calls) == 4
    attentions[4].processor._attention_backend = "_native_math"  # chosen later
    attentions[5].set_processor(attention_processor.AttnProcessor())
    model(*given)
    assert len(calls) == 6
    attentions[5].set_processor(attention_processor.AttnProcessor2_0())  # a new processor of the same module is accelerated
    model(*given)
    assert len(calls) == 9


def own(**options):
    """A module whose processor is the user's: 4 heads of q, 2 of k and v."""

    class Mine:
        def __call__(self, attn, hidden_states, attention_mask=None, **_):
            q = hidden_states.unflatten(2, (4, -1)).transpose(1, 2)
            k = q[:, ::2]
            return F.scaled_dot_product_attention(q, k, k, attention_mask, enable_gqa=True, **options).transpose(1, 2).flatten(2)

    return attention_processor.Attention(query_dim=32, heads=4, dim_head=8, processor=Mine())


@pytest.mark.parametrize("kind", ["additive", "bool", "causal"])
@torch.no_grad()
def test_arguments_reach_the_operator(kind, calls):
    module, x, seen = own(scale=0.7, is_causal=kind == "causal"), draw(2, 20, 32), draw(2, 1, 1, 20) > -0.5
    mask = {"bool": seen, "additive": torch.where(seen, 0.0, -10000.0), "causal": None}[kind]
    expected = module(x, attention_mask=mask)
    gfd.accelerate(pipe_of(module))
    assert_close(module(x, attention_mask=mask), expected)
    assert calls == [(2, 4, 20, 8)]


@torch.no_grad()
def test_dropout_stays_torchs(calls):
    module, x, found = own(dropout_p=0.5), draw(1, 20, 32), []
    for change in (gfd.accelerate, gfd.restore):
        change(pipe_of(module))
        torch.manual_seed(3)
        found.append(module(x))
    assert torch.equal(*found) and not calls


@torch.no_grad()
def test_nothing_outside_the_module_changes(calls):
    model, given = unet()
    q, before = draw(1, 2, 20, 8), F.scaled_dot_product_attention
    expected, seen = F.scaled_dot_product_attention(q, q, q), []
    gfd.accelerate(pipe_of(model))
    handle = model.register_forward_hook(lambda *_: seen.append(F.scaled_dot_product_attention(q, q, q)))
    model(*given)
    handle.remove()
    assert torch.equal(seen[0], expected) and len(calls) == 8 and F.scaled_dot_product_attention is before
    with pytest.raises(RuntimeError, match="shapes"):
        next(m for m in model.modules() if isinstance(m, FusedAttention))(draw(1, 3, 5))
    assert torch.equal(F.scaled_dot_product_attention(q, q, q), expected) and len(calls) == 8


@torch.no_grad()
def test_compiled(calls):
    """Compiled code keeps torch's attention and stays whole."""
    model, given = unet()
    gfd.accelerate(pipe_of(model))
    expected = model(*given).sample
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(compiled(*given).sample, expected)
    assert len(calls) == 8


@pytest.mark.parametrize(
    ("shape", "context", "small"),
    [
        ((2, 256, 64), None, False),  # 2^15 elements times 256 tokens: 2^23
        ((2, 255, 64), None, True),
        ((2, 64, 16, 16), None, False),  # channels first, as the attention of a VAE
        ((2, 1024, 64), (2, 77, 64), False),
        ((2, 16, 64), (2, 77, 64), True),
        ((1, 16, 64), (1, 10_000, 64), False),  # joint attention to a long text
    ],
)
def test_small_calls_run_as_they_are(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], context: tuple[int, ...] | None, small: bool
) -> None:
    """No torch function is looked at where that would cost more than the attention; the output is the same either way."""
    monkeypatch.setattr(attention, "SMALL", 1 << 23)
    torch.manual_seed(0)
    module = attention_processor.Attention(64, cross_attention_dim=64 if context else None, heads=2, dim_head=32)
    model, x = torch.nn.ModuleList([module]), torch.randn(shape)
    arguments = (x,) if context is None else (x, torch.randn(context))
    stock = module(*arguments)
    attention.accelerate_attention(model)
    calls = []
    ours = attention.scaled_dot_product_attention
    monkeypatch.setattr(attention, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or ours(*a, **k))
    torch.testing.assert_close(module(*arguments), stock, atol=1e-5, rtol=1e-5)
    assert bool(calls) != small
