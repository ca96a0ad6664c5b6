from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_run
import torch

from genfast import cli, data, models
from genfast.data import sets
from genfast.models import UNet, UNetConfig

SMALL = ["--channels", "8", "16", "--blocks", "1", "1", "--attention", "0", "0"]


@pytest.fixture
def bars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fetched data set "bars" of three classes."""
    entry = replace(sets.DATASETS["fashion"], read=lambda folder, split: tiny_run.pictures(), classes=("left", "middle", "right"))
    monkeypatch.setitem(data.DATASETS, "bars", entry)
    monkeypatch.setenv("GENFAST_DATA", str(tmp_path / "cache"))
    (tmp_path / "cache" / "bars").mkdir(parents=True)


def sentence(capsys: pytest.CaptureFixture[str]) -> str:
    """What went to stderr: exactly one line, ours."""
    text = capsys.readouterr().err
    assert text.startswith("genfast: ") and text.count("\n") == 1, text
    return text


def test_train_then_sample(bars: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    arguments = [
        "train",
        "diffusion",
        "--data",
        "bars",
        "--out",
        str(out),
        "--steps",
        "6",
        "--batch",
        "4",
        "--warmup",
        "2",
        "--validation",
        "10",
    ]
    assert cli.main([*arguments, *SMALL, "--sample-every", "3"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 6
    assert {path.name for path in out.glob("*.png")} == {"loss.png", "samples-000003.png", "samples-000006.png"}

    picture = tmp_path / "deep" / "grid.png"
    weights = ["--weights", str(out / "ema.safetensors"), "--out", str(picture)]
    assert cli.main(["sample", *weights, "--labels", "Right,0", "--seeds", "3,5-6", "--steps", "4", "--solver", "euler"]) == 0
    from PIL import Image

    with Image.open(picture) as image:
        assert image.size == (80 + 3 * 18, 2 + 2 * 18)  # 8 pixels, twice as large, with gaps of 2
    capsys.readouterr()

    assert cli.main([*arguments, *SMALL, "--lr", "0.5"]) == 2
    assert "lr: got 0.5, but the run in" in sentence(capsys)
    assert cli.main(["sample", *weights, "--labels", "up"]) == 2
    assert "--labels: got 'up', supported: 0 (left), 1 (middle), 2 (right)" in sentence(capsys)
    assert cli.main(["sample", *weights, "--seeds", "7-3"]) == 2
    assert "--seeds: got '7-3'" in sentence(capsys)


def test_pictures_are_those_of_the_label_and_seed(tmp_path: Path) -> None:
    """A row of the grid is the same, whatever else is drawn with it; another label or another seed is another picture."""
    from genfast.samplers import Sampler
    from genfast.train import pictures

    torch.manual_seed(0)
    net = UNet(replace(tiny_run.CONFIG, channels=(8, 8)))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    words = {"prediction": "v", "noise": "cosine", "noise_steps": 1000, "shift": 1.0}
    models.save(net, tmp_path / "net.safetensors", **words)
    denoiser, _ = pictures.load_denoiser(tmp_path / "net.safetensors")
    sampler = Sampler("euler", 4, guidance_scale=2.0, progress=False)
    both = pictures.draw(denoiser, sampler, [0, 2], [5, 9], (8, 8))
    alone = pictures.draw(denoiser, sampler, [2], [9], (8, 8))
    torch.testing.assert_close(both[3:], alone, rtol=1e-4, atol=1e-4)
    assert min((both[i] - both[j]).abs().max() for i in range(4) for j in range(i)) > 1e-2


def test_grid_puts_every_image_in_its_place() -> None:
    from genfast.train.pictures import grid

    x = torch.tensor([-1.0, 0.0, 1.0]).reshape(3, 1, 1, 1).expand(3, 1, 2, 2)
    pixels = np.asarray(grid(x, columns=2, zoom=1, gap=1))
    assert pixels.shape == (7, 7)
    assert pixels[1, 1] == 0 and pixels[1, 4] == 128 and pixels[4, 1] == 255 and pixels[0, 0] == 255


def test_errors_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENFAST_DATA", str(tmp_path))
    assert cli.main(["data", "fetch", "cifar"]) == 2
    assert "name: got 'cifar', supported: 'fashion'" in sentence(capsys)
    assert cli.main(["data", "fetch", "fashion", "--from", str(tmp_path / "none")]) == 2
    assert "which does not exist" in sentence(capsys)
    assert cli.main(["sample", "--weights", str(tmp_path / "none.safetensors")]) == 2
    assert "none.safetensors" in sentence(capsys)
    models.save(UNet(UNetConfig(channels=(8,), blocks=(1,), attention=(False,))), tmp_path / "w", noise="betas", prediction="v")
    assert cli.main(["sample", "--weights", str(tmp_path / "w")]) == 2
    assert "noise process 'betas', supported: 'cosine'" in sentence(capsys)


def test_data_list(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENFAST_DATA", str(tmp_path))
    assert cli.main(["data", "list"]) == 0
    text = capsys.readouterr().out
    assert "Fashion-MNIST" in text and "MIT" in text and "not fetched" in text
    (tmp_path / "fashion").mkdir()
    cli.main(["data", "list"])
    assert f"in {tmp_path / 'fashion'}" in capsys.readouterr().out


def test_what_is_passed_on_and_what_is_not(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
        commands.append(command[1:])
        return subprocess.CompletedProcess(command, 3)

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", run)
        patch.setattr(cli, "__file__", str(Path(__file__).resolve().parent.parent / "genfast" / "cli.py"))  # also where a wheel is tested
        with pytest.raises(SystemExit, match="3"):
            cli.main(["bench", "--quick", "x"])
    assert commands == [["-m", "benchmarks.run", "--quick", "x"]]
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "genfast" / "cli.py"))
    assert cli.main(["bench"]) == 2
    assert "in a checkout of the repository" in sentence(capsys)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["data", "list", "--quick"])
    with pytest.raises(SystemExit, match="0"):
        cli.main(["info", "--brief"])
    assert "genfast" in capsys.readouterr().out
