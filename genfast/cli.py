"""The ``genfast`` command: data, train, sample, bench, info."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genfast.failure import Parser, guarded

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MOST_PICTURES = 10_000  # of one grid

# Heavy imports (torch) happen inside the commands, so that --help is instant.


def _data(arguments: argparse.Namespace) -> None:
    from genfast import data

    if arguments.action == "list":
        for name, dataset in data.DATASETS.items():
            folder = data.directory() / name
            print(f"{name:10} {dataset.summary}\n{'':10} licence {dataset.licence}; {dataset.credit}")
            print(f"{'':10} in {folder}" if folder.exists() else f"{'':10} not fetched")
    else:
        print(data.fetch(arguments.name, arguments.source))


def _run(arguments: argparse.Namespace) -> Any:
    from genfast.train import Run

    names = ("seed", "sample_every", "checkpoint_every", "validate_every", "max_minutes", "impl")
    return Run(arguments.out, **{name: value for name, value in vars(arguments).items() if name in names})


def _train_diffusion(arguments: argparse.Namespace) -> None:
    import torch

    from genfast import data
    from genfast.checks import check, whole
    from genfast.device import usable
    from genfast.models import UNet, UNetConfig
    from genfast.train import DiffusionTraining, train_diffusion

    given = vars(arguments)
    names = ("steps", "batch", "prediction", "noise", "min_snr", "label_dropout", "lr", "lr_schedule", "warmup", "ema", "autocast")
    options, run = DiffusionTraining(**{name: given[name] for name in names}), _run(arguments)  # before a data set is fetched
    device, classes = usable(arguments.device), data.dataset(arguments.data).classes
    config = UNetConfig(channels=tuple(arguments.channels), blocks=tuple(arguments.blocks), attention=tuple(map(bool, arguments.attention)),
                        num_classes=len(classes), time_scale=1000.0 if options.process.kind == "flow" else 1.0)  # fmt: skip
    data.fetch(arguments.data)
    images, labels = data.load(arguments.data)
    check({"--validation": whole(1, len(images) - 1)}, {"--validation": arguments.validation})
    samples, validation = data.ArraySamples(images, labels, classes).hold_out(arguments.validation)
    torch.manual_seed(arguments.seed)  # of the initial weights; the training draws are counter-based
    about = {"data": arguments.data, "classes": classes}
    _report(run, train_diffusion(UNet(config).to(device), samples, options, run, validation=validation, about=about))


def _report(run: Any, row: Any) -> None:
    print(json.dumps(row))
    if run.stopped:
        print(f"genfast: {run.stopped}", file=sys.stderr)


def _train_gan(arguments: argparse.Namespace) -> None:
    import numpy as np
    import torch

    from genfast import data
    from genfast.device import usable
    from genfast.models import FAMILIES
    from genfast.train import GANTraining, Objective, train_gan

    given = argparse.Namespace(**{**_GAN_DEFAULTS[arguments.model], **vars(arguments)})
    if len(given.lr) > 2:
        raise ValueError(f"--lr: got {len(given.lr)} numbers, supported: one for both networks, or the generator's and the discriminator's")
    given.lr = given.lr[0] if len(given.lr) == 1 else tuple(given.lr)
    objective = Objective(
        given.loss, r1=given.r1, r2=given.r2, gradient_penalty=given.gradient_penalty, center=given.center,
        path_length=given.path_length, path_shrink=given.path_shrink, d_every=given.d_every, g_every=given.g_every,
    )  # fmt: skip
    options, run = (
        GANTraining(given.steps, given.batch, objective, given.critic_steps, given.lr, tuple(given.betas), given.ema),
        _run(given),
    )
    device = usable(given.device)
    data.fetch(given.data)
    images, _ = data.load(given.data)
    size = images.shape[-1] if given.size is None else given.size
    border = _border(images, size)
    shape: dict[str, Any] = {"size": size, "image_channels": 1 if images.ndim == 3 else images.shape[1], "latent": given.latent}
    shape["body"] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[given.precision]
    if given.model == "dcgan":
        shape |= {"channels": given.channels, "discriminator_norm": not objective.penalises}
    else:
        shape["channel_base"] = given.channels * size
    family = FAMILIES[given.model]
    config = family.config(**shape)
    samples = data.ArraySamples(np.pad(images, [(0, 0)] * (images.ndim - 2) + [(border, border)] * 2))
    torch.manual_seed(given.seed)  # of the initial weights; the training draws are counter-based
    generator, discriminator = family.pair(config, given.impl)
    generator, discriminator = generator.to(device), discriminator.to(device)
    _report(run, train_gan(generator, discriminator, samples, options, run, capture=given.capture, about={"data": given.data}))


# What `train gan` takes where an option is not given, by model.
_GAN_DEFAULTS: dict[str, dict[str, Any]] = {
    "dcgan": {
        "latent": 100, "channels": 32, "loss": "logistic", "r1": 0.0, "r2": 0.0, "path_length": 0.0, "path_shrink": 1,
        "d_every": 1, "g_every": 1, "lr": [2e-4], "betas": [0.5, 0.999],
    },
    "stylegan2": {
        "latent": 512, "channels": 32, "loss": "logistic", "r1": 1.0, "r2": 0.0, "path_length": 2.0, "path_shrink": 2,
        "d_every": 16, "g_every": 4, "lr": [2e-3], "betas": [0.0, 0.99],
    },
    "r3gan": {
        "latent": 64, "channels": 32, "loss": "relativistic", "r1": 1.0, "r2": 1.0, "path_length": 0.0, "path_shrink": 1,
        "d_every": 1, "g_every": 1, "lr": [2e-4], "betas": [0.0, 0.99],
    },
}  # fmt: skip


def _border(images: NDArray[np.uint8], size: int) -> int:
    """How many zeros go around square images (..., H, H) on each side to make them (..., size, size)."""
    border: int = size - images.shape[-1]
    if border < 0 or border % 2:
        raise ValueError(f"--size: got {size}, supported: {images.shape[-1]} or more by an even number")
    return border // 2


def _sample(arguments: argparse.Namespace) -> None:
    from genfast import __version__
    from genfast.device import usable
    from genfast.generate import SHIPPED, generate, open_model
    from genfast.media import pictures
    from genfast.request import Request, SamplingOptions, every

    pictures.format_of(arguments.out)
    names = ("solver", "steps", "sigmas", "guidance_scale", "impl")
    options, device = SamplingOptions(**{name: getattr(arguments, name) for name in names}), usable(arguments.device)
    model = open_model(arguments.weights or SHIPPED, device, arguments.impl)
    if not model.classes and arguments.labels is not None:
        raise ValueError(f"--labels: got {arguments.labels!r}, supported: none, because this model has no classes")
    words = range(len(model.classes)) if arguments.labels is None else [_label(w, model.classes) for w in arguments.labels.split(",")]
    seeds = _numbers(arguments.seeds, MOST_PICTURES // max(1, len(words)))
    request = every(words, seeds, options) if model.classes else Request(seeds, None, options)
    rows = [model.classes[label] for label in words]
    files = [f"{seed:06d}" for seed in seeds]
    files = [f"{row.replace(' ', '-').lower()}-{file}" for row in rows for file in files] if rows else files
    provenance = {"genfast": __version__, "weights": str(model.path), "seeds": arguments.seeds, "labels": rows, **vars(options)}
    pictures.write(arguments.out, generate(model, request), len(seeds) if rows else min(8, len(seeds)), rows, files, provenance)
    print(arguments.out)


def _label(word: str, classes: Sequence[str]) -> int:
    names = [name.lower() for name in classes]
    if word.strip().lower() in names:
        return names.index(word.strip().lower())
    if word.strip().isdecimal() and int(word) < len(classes):
        return int(word)
    raise ValueError(f"--labels: got {word!r}, supported: {', '.join(f'{i} ({name})' for i, name in enumerate(classes)) or 'none'}")


def _numbers(text: str, most: int) -> list[int]:
    """ "0-7" or "3,5,8-9" as a list of at most ``most`` numbers."""
    ranges = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not (last.isdecimal() and int(last) >= int(first))) or int(last or first) >= 2**63:
            raise ValueError(f"--seeds: got {text!r}, supported: numbers below 2^63 and ranges such as 0-7 or 3,5,8-9")
        ranges.append(range(int(first), int(last if dash else first) + 1))
    if (count := sum(numbers.stop - numbers.start for numbers in ranges)) > most:
        raise ValueError(f"--seeds: got {count} of them, supported: at most {most} with so many labels")
    return [number for numbers in ranges for number in numbers]


def _bench(arguments: argparse.Namespace) -> None:
    root = Path(__file__).resolve().parent.parent
    if not (root / "benchmarks" / "run.py").exists():
        raise RuntimeError("the benchmarks are not part of the installed package; run this in a checkout of the repository")
    sys.exit(subprocess.run([sys.executable, "-m", "benchmarks.run", *arguments.passed_on], cwd=root).returncode)


def _info(arguments: argparse.Namespace) -> None:
    from genfast import info

    sys.exit(info.main(arguments.passed_on))


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        import genfast

        print(f"genfast {genfast.__version__}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="genfast", description="Fast generative models in PyTorch.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and end")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    data = commands.add_parser("data", help="fetch and list data sets").add_subparsers(required=True, dest="action", metavar="ACTION")
    data.add_parser("list", help="what there is").set_defaults(run=_data)
    fetch = data.add_parser("fetch", help="download, check and unpack a data set")
    fetch.add_argument("name")
    fetch.add_argument("--from", dest="source", metavar="DIR|FILE.deb", help="take the files from here instead of downloading")
    fetch.set_defaults(run=_data)

    formatter = argparse.ArgumentDefaultsHelpFormatter
    train = commands.add_parser("train", help="train a model").add_subparsers(required=True, metavar="FAMILY")
    diffusion = train.add_parser("diffusion", help="a class-conditional U-Net", formatter_class=formatter)
    add = diffusion.add_argument
    add("--data", default="fashion", help="name of a data set")
    add("--out", required=True, help="directory of everything written; an interrupted run there is continued")
    add("--steps", type=int, default=3000, help="optimizer steps")
    add("--batch", type=int, default=64, help="images a step")
    add("--seed", type=int, default=0, help="of the initial weights and of every draw")
    add("--validation", type=int, default=1000, help="held-out images")
    add("--channels", type=int, nargs="+", default=[32, 64, 96], help="of each level of the U-Net")
    add("--blocks", type=int, nargs="+", default=[1, 2, 1], help="residual blocks of each level")
    add("--attention", type=int, nargs="+", choices=[0, 1], default=[0, 0, 1], help="1: self-attention in this level")
    add("--prediction", choices=["epsilon", "v", "x0", "flow"], default="v", help="what the network returns")
    add("--noise", choices=["cosine", "linear", "scaled_linear", "flow"], help="noise process; that of the prediction when not given")
    add("--min-snr", type=float, help="gamma of min-SNR weighting (5 is usual); off when not given")
    add("--label-dropout", type=float, default=0.1, help="share of labels dropped, for guidance")
    add("--lr", type=float, default=1e-3, help="peak learning rate")
    add("--lr-schedule", choices=["cosine", "constant"], default="cosine")
    add("--warmup", type=int, default=200, help="steps of linear warm-up")
    add("--ema", type=float, default=0.05, help="relative width of the average of the weights")
    add("--autocast", choices=["bfloat16"], help="dtype of matrix products; float32 when not given")
    add("--impl", choices=["fused", "reference"], default="fused", help="of the noise; the bits are the same")
    add("--device", help="where to run; cuda if torch sees one, else cpu, when not given")
    add("--checkpoint-every", type=int, default=500, help="steps")
    add("--sample-every", type=int, default=0, help="steps between sample grids; 0: none")
    add("--max-minutes", type=float, default=float("inf"), help="save and end after so many minutes; the same command continues")
    diffusion.set_defaults(run=_train_diffusion)

    gan = train.add_parser("gan", help="a generator against a discriminator", formatter_class=formatter)
    add = gan.add_argument
    own: dict[str, Any] = {"default": argparse.SUPPRESS}  # the model's own default
    add("--model", choices=[*_GAN_DEFAULTS], default="dcgan", help="options without a default below have the model's own")
    add("--precision", choices=["fp32", "bf16", "fp16"], default="fp32", help="of the networks' bodies; parameters and Adam are fp32")
    add("--data", default="fashion", help="name of a data set")
    add("--out", required=True, help="directory of everything written; an interrupted run there is continued")
    add("--steps", type=int, default=3000, help="steps of the generator")
    add("--batch", type=int, default=64, help="images a step")
    add("--seed", type=int, default=0, help="of the initial weights and of every draw")
    add("--size", type=int, help="side of the images after a border of zeros, such as 32; that of the data when not given")
    add("--latent", type=int, **own, help="length of the generator's input")
    add("--channels", type=int, **own, help="of both networks at the full resolution (dcgan: half of it); they double as it halves")
    add("--loss", choices=["logistic", "hinge", "wgan", "lsgan", "relativistic"], **own)
    add("--r1", type=float, **own, help="gamma of R1, the penalty at real images")
    add("--r2", type=float, **own, help="gamma of R2, the penalty at generated images")
    add("--gradient-penalty", type=float, default=0.0, help="lambda of the penalty between the two (10 is usual with wgan)")
    add("--center", type=float, default=1.0, help="norm the gradient is pulled to between the two: 1 or 0")
    add("--path-length", type=float, **own, help="weight of path length regularisation (2 is usual)")
    add("--path-shrink", type=int, **own, help="path lengths of one in so many images of a step (2 is usual)")
    add("--d-every", type=int, **own, help="steps between penalties (16 is usual)")
    add("--g-every", type=int, **own, help="steps between path lengths (4 is usual)")
    add("--critic-steps", type=int, default=1, help="steps of the discriminator for one of the generator (5 is usual with wgan)")
    add("--lr", type=float, nargs="+", **own, help="learning rate of Adam, or the generator's and the discriminator's")
    add("--betas", type=float, nargs=2, **own, help="of Adam")
    add("--ema", type=float, default=0.05, help="relative width of the average of the weights")
    add("--capture", action="store_true", help="one CUDA graph a phase")
    add("--impl", choices=["fused", "reference"], default="fused", help="of the networks' operators and of the noise")
    add("--device", help="where to run; cuda if torch sees one, else cpu, when not given")
    add("--checkpoint-every", type=int, default=500, help="steps")
    add("--sample-every", type=int, default=0, help="steps between sample grids; 0: none")
    add("--max-minutes", type=float, default=float("inf"), help="save and end after so many minutes; the same command continues")
    gan.set_defaults(run=_train_gan)

    sample = commands.add_parser("sample", help="draw pictures: a row a label, a column a seed", formatter_class=formatter)
    add = sample.add_argument
    add("--weights", type=Path, help="what training saved, or the run's directory; the shipped Fashion-MNIST model when not given")
    add("--out", type=Path, default=Path("samples.png"), help="the picture to write, or a folder for a file of each")
    add("--labels", help="names or numbers of classes, comma-separated; all when not given")
    add("--seeds", default="0-7", help="seeds, such as 0-7 or 3,5,8-9")
    add("--solver", default="dpmpp_2m", help="a name in genfast.samplers.SOLVERS")
    add("--steps", type=int, default=20, help="steps of the solver")
    add("--sigmas", help="grid of the solver, such as karras; its own when not given")
    add("--guidance-scale", type=float, default=2.5, help="1: off")
    add("--impl", choices=["fused", "reference"], default="fused", help="of the solver step; the bits are the same")
    add("--device", help="where to run; cuda if torch sees one, else cpu, when not given")
    sample.set_defaults(run=_sample)

    commands.add_parser("bench", help="run the benchmarks, in a checkout", add_help=False).set_defaults(run=_bench)
    commands.add_parser("info", help="what is installed and what it can do", add_help=False).set_defaults(run=_info)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status (`failure.guarded`); without ``argv`` it is the process's, which ends with it."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.run not in (_bench, _info):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.passed_on = rest
    interrupted = f"interrupted; the same command continues the run in {arguments.out}" if arguments.run in _TRAINING else "interrupted"
    status = guarded(lambda: arguments.run(arguments), interrupted)
    if argv is None:
        sys.exit(status)
    return status


_TRAINING = (_train_diffusion, _train_gan)

if __name__ == "__main__":
    main()
