"""The model that comes with the package, and the demonstration that draws from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from genfast import demo
from genfast.generate import SHIPPED, generate, open_model
from genfast.request import SamplingOptions, every


def test_the_shipped_model_draws_clothes() -> None:
    """Facts of Fashion-MNIST that hold for every picture, or for the mean of a class, and fail for a broken model or a wrong label."""
    assert SHIPPED.stat().st_size <= 8_000_000
    model = open_model()
    classes = model.classes
    names = ["Trouser", "Pullover", "Sandal", "Sneaker", "Ankle boot"]
    x = generate(model, every([classes.index(name) for name in names], range(4), SamplingOptions("dpmpp_2m", 12, guidance_scale=2.5)))
    assert x.shape == (20, 1, 28, 28) and x.isfinite().all()
    ink = (x.clamp(-1, 1)[:, 0] + 1) / 2  # 0 black, 1 white
    assert ink[:, 0, [0, 27]].max() < 0.1  # the upper corners are black
    trouser, pullover, sandal, sneaker, boot = ink.unflatten(0, (5, 4)).mean(1)
    assert pullover.mean() > 1.5 * sandal.mean()  # a pullover fills the picture, a sandal does not
    assert boot[4:9, 14:].mean() > 0.3 > 0.1 > sneaker[4:9].mean()  # a boot is high, a sneaker is not
    assert trouser[:, :4].mean() < 0.05 < 0.1 < pullover[8:24, 1:6].mean()  # a pullover has sleeves


@pytest.mark.slow
def test_the_demonstration_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "STEPS", 4)
    monkeypatch.setattr(demo, "COLUMNS", 1)
    assert demo.main(["--out", str(tmp_path / "out" / "demo.png"), "--device", "cpu"]) == 0
    assert (tmp_path / "out" / "demo.png").stat().st_size > 1000
    text = capsys.readouterr().out
    assert "fused" in text and "reference" in text
    assert text.split("largest difference of a pixel")[1].split()[0] == "0"


def test_fused_and_reference_draw_the_same_bits() -> None:
    model = open_model()
    a, b = (
        generate(model, every([0, 7], [1], SamplingOptions("dpmpp_2m", 3, guidance_scale=2.5, impl=impl)))
        for impl in ("fused", "reference")
    )
    assert torch.equal(a, b)
