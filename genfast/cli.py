"""The ``genfast`` command. Every option is a parameter or a field of a dataclass that says its meaning, unit and default.

Heavy imports (torch) happen inside the commands, so that --help is instant."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from genfast.explore import explore
from genfast.failure import dispatch, guarded, parse
from genfast.request import SamplingOptions


def data_list() -> None:
    """What data sets there are, where they come from, and whether they are here."""
    from genfast import data

    for name, dataset in data.DATASETS.items():
        folder = data.directory() / name
        print(f"{name:10} {dataset.summary}\n{'':10} licence {dataset.licence}; {dataset.credit}")
        print(f"{'':10} in {folder}" if folder.exists() else f"{'':10} not fetched")


def data_fetch(name: Positional[str], source: Annotated[Path | None, arg(name="from")] = None) -> None:
    """Download, check and unpack a data set.

    Args:
        name: of a data set, as `genfast data list` prints it.
        source: a folder or a package's file to take the files from, instead of downloading.
    """
    from genfast import data

    print(data.fetch(name, source))


def data_check(name: Positional[str]) -> None:
    """Read all of a data set, and say what is in it.

    Args:
        name: of a data set, or a folder or zip file of pictures.
    """
    from genfast import data

    samples = data.open_samples(name)
    print(f"{name}: {len(samples)} samples of shape {tuple(samples.shape)}, digest {samples.digest[:16]}, classes:", *samples.classes)


def train(words: Sequence[str]) -> None:
    """Train by a recipe: genfast train RECIPE [options]. --list prints the recipes, RECIPE --help the options of one."""
    from genfast import recipes

    if words and words[0] in ("-h", "--help", "--list"):
        return print(recipes.overview("" if words[0] == "--list" else f"usage: genfast train RECIPE [options]\n\n{train.__doc__}\n\n"))
    recipes.find(name := words[0] if words else "")
    given = parse(recipes.experiment(name), words[1:], f"genfast train {name}")
    recipes.run(name, given)


def sample(
    model: Positional[Path | None] = None, out: Path = Path("samples.png"), seeds: str = "0-7", labels: str | None = None,
    device: str | None = None, options: SamplingOptions = SamplingOptions(),  # noqa: B008
) -> None:  # fmt: skip
    """Draw samples, a row a label, a column a seed.

    Args:
        model: a run's directory, or a file that training saved; the shipped Fashion-MNIST model when not given.
        out: a picture such as samples.png, samples.gif for an animation, or without an extension a folder with a file for each sample.
        seeds: seeds, such as 0-7 or 3,5,8-9.
        labels: names or numbers of classes, separated by commas; all when not given.
        device: where to run; cuda if torch sees one, else cpu, when not given.
    """
    from genfast import generate

    generate.to_files(model or generate.SHIPPED, out, seeds, labels, device, options)


def evaluate(run: Positional[Path]) -> None:
    """Measure a trained model against its data, and write the figures with their provenance beside it.

    Args:
        run: a run's directory.
    """
    from genfast import recipes

    print(json.dumps(recipes.evaluate(run)))


def bench(words: Sequence[str]) -> None:
    """Run the benchmarks, in a checkout; options are those of `python -m benchmarks.run`."""
    root = Path(__file__).resolve().parent.parent
    if not (root / "benchmarks" / "run.py").exists():
        raise RuntimeError("the benchmarks are not part of the installed package; run this in a checkout of the repository")
    sys.exit(subprocess.run([sys.executable, "-m", "benchmarks.run", *words], cwd=root).returncode)


def info(words: Sequence[str]) -> None:
    """What is installed and what it can do; --brief: one line."""
    from genfast import info

    sys.exit(info.main(words))


COMMANDS: dict[str, Callable[..., None]] = {
    "data list": data_list, "data fetch": data_fetch, "data check": data_check,
    "train": train, "sample": sample, "eval": evaluate, "explore": explore, "bench": bench, "info": info,
}  # fmt: skip


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status (`failure.guarded`); without ``words`` the process ends with it."""
    status = guarded(lambda: dispatch(COMMANDS, [*(sys.argv[1:] if words is None else words)], as_they_are=(train, bench, info)))
    return status if words is not None else sys.exit(status)
