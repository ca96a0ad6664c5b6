"""Pictures of what a model has learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_gan
import tiny_vae
import torch
from PIL import Image
from torch import nn

from genfast import cli, explore
from genfast.data import ArraySamples
from genfast.generate import generate, open_model
from genfast.models.dcgan import DCGANConfig
from genfast.models.families import FAMILIES
from genfast.models.family import Model
from genfast.request import Request


class Linear(nn.Module):
    """A "generator" whose pictures are its latents."""

    config = DCGANConfig(latent=64)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return (self.weight * z).view(-1, 1, 8, 8)


def model(**about: Any) -> Model:
    return Model(Linear(), about, FAMILIES["dcgan"])


def test_interpolations_keep_to_the_sphere_and_begin_and_end_at_the_seeds() -> None:
    rows = explore.interpolations(model(), [3, 5]).flatten(1).double().unflatten(0, (2, explore.STEPS))
    expected = generate(model(), Request([3, 5])).flatten(1).double()
    torch.testing.assert_close(rows[:, 0], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(rows[:, -1], expected[[1, 0]], atol=1e-5, rtol=0)
    first, last = expected
    angles = torch.nn.functional.cosine_similarity(rows[0, :-1], rows[0, 1:], dim=1).arccos()
    whole = torch.nn.functional.cosine_similarity(first, last, dim=0).arccos()
    torch.testing.assert_close(angles.sum(), whole, atol=1e-4, rtol=0)  # no way is shorter
    norms = rows[0].norm(dim=1)
    assert norms.min() > 0.97 * min(first.norm(), last.norm())


def test_traversals_move_one_dimension_a_row() -> None:
    rows = explore.traversals(model(), 3, dimensions=2).flatten(1).unflatten(0, (2, explore.STEPS))
    expected = generate(model(), Request([3])).flatten(1)[0]
    for dimension in range(2):
        moved = rows[dimension]
        torch.testing.assert_close(moved[:, dimension], torch.linspace(-2.5, 2.5, explore.STEPS))
        others = [i for i in range(64) if i != dimension]
        torch.testing.assert_close(moved[:, others], expected[others].expand(explore.STEPS, -1))


def test_the_nearest_are_those_of_a_search_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.random.default_rng(0).integers(0, 256, (50, 1, 8, 8)).astype(np.uint8)
    samples, seeds = ArraySamples(images), [4, 9]
    table = explore.nearest(model(), samples, seeds).unflatten(0, (2, explore.STEPS))
    scaled = torch.from_numpy(images).double() / 127.5 - 1
    for row, drawn in zip(table, generate(model(), Request(seeds)), strict=True):
        picture = drawn.clamp(-1, 1).double()
        order = sorted(range(50), key=lambda i: float((scaled[i] - picture).square().sum()))
        torch.testing.assert_close(row[0].double(), picture)
        torch.testing.assert_close(row[1:].double(), scaled[order[: explore.STEPS - 1]], atol=1e-6, rtol=0)


def test_mixed_styles_take_the_coarse_of_the_row_and_the_fine_of_the_column(tmp_path: Path) -> None:
    tiny_gan.run(tmp_path, config=tiny_gan.STYLE, steps=1)
    found = open_model(tmp_path)
    seeds = [0, 1, 2, 3]
    alone = generate(found, Request(seeds)).float()
    every = found.net.config.styles
    for coarse, expected in {0: alone[[2, 3, 2, 3]], every: alone[[0, 0, 1, 1]]}.items():
        table = explore.mixed_styles(found, seeds, coarse).unflatten(0, (3, 3))
        torch.testing.assert_close(table[0, 1:], alone[2:], atol=1e-2, rtol=0)  # in bfloat16
        torch.testing.assert_close(table[1:, 0], alone[:2], atol=1e-2, rtol=0)
        torch.testing.assert_close(table[1:, 1:].flatten(0, 1), expected, atol=1e-2, rtol=0)
    assert bool((table[0, 0] == 1).all())


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import tiny_run

    monkeypatch.setattr("genfast.data.open_samples", lambda name, split="train", **_: tiny_run.samples())
    tiny_vae.run(tmp_path / "run", steps=2, about={"data": "bars"})
    assert cli.main(["explore", str(tmp_path / "run"), "--seeds", "0-2"]) == 0
    written = [Path(line) for line in capsys.readouterr().out.split()]
    assert [path.stem for path in written] == ["interpolations", "traversals", "nearest", "reconstructions"]
    assert all(path.parent == tmp_path / "run" / "explore" for path in written)
    sizes = {path.stem: Image.open(path).size for path in written}
    assert sizes["interpolations"] == (2 + 8 * 18, 2 + 3 * 18) and sizes["traversals"] == (2 + 8 * 18, 2 + 3 * 18)
    assert Image.open(written[0]).text["genfast"].startswith('{"weights":')  # type: ignore[attr-defined]
