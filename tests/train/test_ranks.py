"""Several processes are one: the same draws to the bit, the same weights to rounding."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_ranks
import torch
from safetensors.torch import load_file

from genfast import ranks

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ROOT = Path(__file__).resolve().parent.parent


def launch(*words: str, cache: Path | None = None) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT.parent)])}
    environment |= {} if cache is None else {"GENFAST_DATA": str(cache)}
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.fixture(scope="module")
def outs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The directories of what one process and two processes made of `tiny_ranks`."""
    found = {count: tmp_path_factory.mktemp(f"ranks-{count}") for count in (1, 2)}
    for count, out in found.items():
        start = [sys.executable] if count == 1 else LAUNCH
        process = launch(*start, tiny_ranks.__file__, str(out))
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    return found


@pytest.mark.slow
def test_draws_and_data_are_the_same_to_the_bit(outs: dict[int, Path]) -> None:
    one = torch.load(outs[1] / "seen-1-0")
    two = [torch.load(outs[2] / f"seen-2-{rank}") for rank in range(2)]
    assert len(one) == len(two[0]) == len(two[1]) > 30
    for whole, *parts in zip(one, *two, strict=True):
        for rank, part in enumerate(parts):
            assert whole.keys() == part.keys()
            assert all(torch.equal(tensor[rank::2], part[name]) for name, tensor in whole.items())


@pytest.mark.slow
@pytest.mark.parametrize("run", ["diffusion", *tiny_ranks.RUNS])
def test_weights_optimizers_averages_and_logs_are_the_same_to_rounding(outs: dict[int, Path], run: str) -> None:
    for name in ("checkpoint.safetensors", "ema.safetensors"):
        a, b = load_file(outs[1] / run / name), load_file(outs[2] / run / name)
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")
    rows = [[json.loads(line) for line in (out / run / "log.jsonl").read_text().splitlines()] for out in outs.values()]
    for mine, other in zip(*rows, strict=True):
        assert mine.keys() == other.keys()
        assert all(mine[key] == pytest.approx(other[key], rel=1e-4, abs=1e-5) for key in mine if key != "images_per_second")


@pytest.mark.slow
def test_samples_are_shared_out_and_gathered_in_their_order(outs: dict[int, Path]) -> None:
    one, two, other = (torch.load(outs[count] / f"samples-{count}-{rank}") for count, rank in ((1, 0), (2, 0), (2, 1)))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    assert torch.equal(two, other) and len(one) == 6


@pytest.mark.slow
def test_torchrun_starts_stops_and_continues_the_command(tmp_path: Path) -> None:
    """SIGTERM on one rank ends all of them in good order; the same command, in one process, continues."""
    cache = tmp_path / "cache"
    (tmp_path / "tests_cli.py").write_text(
        "from test_failure import COMMAND\nexec(COMMAND)\n"  # the command line on the bars of tiny_run
    )
    words = "train fashion-unet --data bars --channels 8 --blocks 1 --attention False --warmup 1 --validation 10 --batch 4 --log-every 1"
    options = [*words.split(), "--lr-schedule", "constant", "--checkpoint-every", "5", "--out", str(tmp_path / "run")]
    process = launch(*LAUNCH, str(tmp_path / "tests_cli.py"), *options, "--steps", "100000", cache=cache)
    log = tmp_path / "run" / "log.jsonl"
    while not log.exists() or log.read_text().count("\n") < 8:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    pid = int((tmp_path / "run" / ".lock").read_text().split()[1])
    os.kill(pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert f"interrupted; the same command continues the run in {tmp_path / 'run'}" in errors, errors
    steps = log.read_text().count("\n")
    done = launch(sys.executable, str(tmp_path / "tests_cli.py"), *options, "--steps", str(steps + 3), cache=cache)
    text, errors = done.communicate(timeout=120)
    assert done.returncode == 0 and "step" in json.loads(text), errors
    odd = launch(*LAUNCH, str(tmp_path / "tests_cli.py"), *options, "--batch", "3", "--out", str(tmp_path / "odd"), cache=cache)
    _, errors = odd.communicate(timeout=120)
    assert "batch: got 3, supported: a multiple of 2, the number of processes that share it" in errors and not (tmp_path / "odd").exists()


def test_alone_everything_is_as_it_is() -> None:
    x = torch.arange(3.0, requires_grad=True)
    assert (ranks.count(), ranks.rank()) == (1, 0) and ranks.join("cpu") == "cpu"
    assert ranks.share([1, 2, 3]) == [1, 2, 3] and ranks.mean(x) is x and ranks.gather(x, [1, 2, 3]) is x
    assert ranks.anyone(True) and not ranks.anyone(False) and ranks.means([1.5, 2]) == [1.5, 2]
