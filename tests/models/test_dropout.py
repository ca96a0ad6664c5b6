"""Dropout whose masks are a part of the network's state."""

from __future__ import annotations

import pytest
import torch

from genfast.nn import Dropout


def test_it_drops_the_share_keeps_the_mean_and_differs_from_call_to_call() -> None:
    torch.manual_seed(0)
    layer, x = Dropout(0.3), torch.ones(64, 1000)
    first, second = layer(x), layer(x)
    for y in (first, second):
        assert y.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
        assert (y == 0).float().mean().item() == pytest.approx(0.3, abs=0.01)  # 5 standard deviations are 0.009
    assert 0.55 < (first == second).float().mean() < 0.61  # 0.3^2 + 0.7^2
    assert (first[0] != first[1]).any()
    assert torch.equal(layer.eval()(x), x)


def test_the_state_brings_the_masks_back() -> None:
    torch.manual_seed(0)
    layer, x = Dropout(0.5), torch.randn(4, 50)
    layer(x)
    state = {name: t.clone() for name, t in layer.state_dict().items()}
    expected = [layer(x) for _ in range(3)]
    other = Dropout(0.5, "reference")
    other.load_state_dict(state)
    assert all(torch.equal(other(x), y) for y in expected)


def test_each_rank_has_the_masks_of_its_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer, x = Dropout(0.5), torch.ones(6, 40)
    start = layer.calls.clone()
    whole = layer(x)
    monkeypatch.setattr("genfast.ranks.count", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr("genfast.ranks.rank", lambda rank=rank: rank)
        layer.calls.copy_(start)
        assert torch.equal(layer(x[rank::2]), whole[rank::2])


def test_the_gradient_is_the_mask() -> None:
    torch.manual_seed(0)
    layer, x = Dropout(0.5), torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, torch.where(y == 0, 0.0, 2.0).double())


def test_a_share_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="p: got 1, supported: a share from 0 up to, but not, 1"):
        Dropout(1)
