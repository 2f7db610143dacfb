"""GIFD: A Generative Gradient Inversion Method with Feature Domain Optimization.

Fang, Chen, Wang, Wang and Xia, ICCV 2023, arXiv 2308.04699; code ffhibnese/GIFD_Gradient_Inversion_Attack. A server
that sees one client's gradient g* and has a generator G = G_N o ... o G_0 searches the latent code z, then opens G and
searches the feature maps h_1, h_2, ..., each stage from where the last one ended, within an l1 ball of its start,

    min over h_k of  1 - cos(T(grad CE(x(h_k), y)), g*) + 1e-4 TV(x) + 1e-6 |x|,    x(h) = G_N o ... o G_k (h),

and reports the image of the stage with the least cosine distance. T repeats the client's defence. The attack itself is
the preset ``gifd`` (``flowerbed.strategies.attacks``); here are its competitors, its controls and what is claimed.

An arm is a federation of one round: every client makes one step on one image (or four) that no prior has seen, behind
its defence, and the server keeps what it received. What is measured is an attack on the first clients, all at once.

Fair to all: the same clients, model, noise and starting code; labels restored, never given; one start; as many
gradients of the victims' model (``budget``), spread evenly over the stages of GIFD and a quarter to z for GIAS; one
schedule of learning rates for all that descend. Options that matter, four candidates each (IG's total variation,
GIAS's rate, GIFD's rate and last layer K), are chosen on further clients, of other images. Restart and stage are chosen
by what the server sees. Every seed has its own prior, victims' model and images.

Null models: the mean of the class, the nearest of the prior's training images and the best of ``budget`` samples of the
prior (both chosen by the truth, which no attacker can).

Departures: the victims' model is small and has no batch norm, images have 28x28 pixels, the prior has 159,441
parameters (BigGAN's feature maps are 100 times larger, and so are the published radii). The spherical step on z, which
the released code does not run either, is left out; the reported image is that of the chosen restart, which there it
is not.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from flowerbed.datasets.augment import Scale
from flowerbed.errors import require
from flowerbed.experiments.leakage import fitness, report
from flowerbed.experiments.leakage.attacking import Attacked, attack_run
from flowerbed.experiments.leakage.scoring import Pool
from flowerbed.experiments.reproduction import figures
from flowerbed.experiments.reproduction.claims import Claim, mean, metric
from flowerbed.experiments.reproduction.engine import Reproduction
from flowerbed.experiments.reproduction.finished import Finished
from flowerbed.experiments.reproduction.paper import Paper
from flowerbed.strategies.attacks.generative import Prior
from flowerbed.strategies.attacks.presets import ATTACKS
from flowerbed.strategies.fedavg import FedAvg, FedAvgParams

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PRIOR = "prior"
"""The arm that trains the generator."""
FOLDER = "attack"
"""Of a run's directory, for what was found."""
FITTED = 16
"""Images of the range test."""
MANY = 200
"""Samples of a class whose variety is measured."""
DEFENCES = ("prune", "noise", "clip", "soteria")


@dataclass(frozen=True)
class CuriousParams(FedAvgParams):
    """FedAvg, and what its server does with what it receives. The clients never get to know of it."""

    attack: str = "gifd"
    """The attack, by name."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Its options, as ``flowerbed attack`` takes them, without ``steps``."""
    tune: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Values of further options, of which those of the best mean PSNR on the clients ``tuned_on`` are taken."""
    prior: str = ""
    """The file of a generator."""
    budget: int = 400
    """Gradients of the victims' model for each victim."""
    adaptive: bool = True
    """Whether the server knows of the defence and repeats it."""
    victims: int = 20
    """Clients that are attacked: the first ones."""
    tuned_on: int = 8
    """Clients that options are chosen on: those that follow."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ATTACKS.get(self.attack)
        for name in ("budget", "victims", "tuned_on"):
            require(getattr(self, name) >= 1, f"strategy.{name} is {getattr(self, name)}; give at least 1.")
        for name, values in self.tune.items():
            require(bool(values), f"strategy.tune.{name} has no values to choose from.")

    def candidates(self) -> Iterator[dict[str, Any]]:
        """Yield the options of every combination of values to choose from."""
        for values in itertools.product(*self.tune.values()):
            options = {**self.options, **dict(zip(self.tune, values, strict=True))}
            yield {"restarts": 1, **options, "steps": steps(self.attack, self.budget, options)}


class Curious(FedAvg):
    """FedAvg. Its server is honest: what it finds out changes nothing."""

    Params = CuriousParams
    params: CuriousParams


def steps(attack: str, budget: int, options: Mapping[str, Any]) -> int | list[int]:
    """Return the steps of each stage so that all together compute ``budget`` gradients for one victim."""
    if attack == "gifd":
        return budget // (1 + int(options["stages"]))
    if attack == "gias":
        return [budget // 4, budget - budget // 4]
    if attack == "ggl":
        return max(1, budget // int(options["population"]))
    return budget


def measure(finished: Finished) -> dict[str, float]:
    """Return how fit the prior is, or what the server found out about its first clients."""
    if finished.arm == PRIOR:
        return fitness_of(finished)
    params = CuriousParams(**finished.simulation.strategy.options)
    tuning = range(params.victims, params.victims + params.tuned_on)
    tried = list(params.candidates())
    options = tried[0]
    if len(tried) > 1:
        options = max(tried, key=lambda one: psnr_of(attacked(finished, params, one, tuning)))
    made = attacked(finished, params, options, range(params.victims))
    report.write(made, finished.directory / FOLDER, options)
    summary = made.summary()
    found = {name: summary[name].mean for name in ("psnr", "ssim", "labels", "top-1", "top-10")}
    found |= {
        "psnr-worst": summary["psnr"].worst,
        "distance": sum(v.found.cost for v in made.victims) / len(made.victims),
        "evaluations": sum(v.found.evaluations for v in made.victims) / len(made.victims),
        **{f"chosen-{name}": _last(options[name]) for name in params.tune},
    }
    return found | (nulls(finished, params, made) if params.attack == "latent" else {})


def _last(value: Any) -> float:
    """Return an option as a number: that of the last stage, where there is one for each."""
    return float(value[-1] if isinstance(value, list) else value)


def attacked(
    finished: Finished, params: CuriousParams, options: Mapping[str, Any], clients: Sequence[int]
) -> Attacked:
    """Return the attack on some clients of the run."""
    given = {**options, "prior": params.prior} if params.prior else options
    return attack_run(
        finished.directory, params.attack, given, clients=clients, adaptive=params.adaptive,
        device=finished.simulation.grid.device,
    )  # fmt: skip


def psnr_of(made: Attacked) -> float:
    """Return the mean PSNR over all images."""
    return made.summary()["psnr"].mean


def nulls(finished: Finished, params: CuriousParams, made: Attacked) -> dict[str, float]:
    """Return the mean PSNR of what needs no gradient, over the victims' images.

    The public images are the data set's test split: those that the prior of the same set was trained on.
    """
    data = finished.dataset
    pixels = torch.cat([made.scale.pixels(data.prepare(p)) for p in torch.split(data.test.inputs, 4096)])
    public = Pool(pixels, data.test.labels, torch.arange(len(data.test)))
    prior = Prior.load(params.prior, data.input_shape, data.num_classes, made.scale, torch.device("cpu"))
    x = torch.cat([v.truth.x for v in made.victims])
    y = torch.cat([v.truth.y for v in made.victims])
    found = fitness.null_scores(made.scale.pixels(x), y, public)
    found["best sample"] = fitness.best_sample(prior, x, y, params.budget, finished.seed)
    return {f"null-{name.replace(' ', '-')}": float(value.mean()) for name, value in found.items()}


def fitness_of(finished: Finished) -> dict[str, float]:
    """Return the range test on unseen images and the variety of samples beside that of the data."""
    data = finished.dataset
    scale = Scale(data.mean, data.std)
    prior = Prior.load(
        finished.directory / "model.safetensors",
        data.input_shape,
        data.num_classes,
        scale,
        torch.device("cpu"),
    )
    x, y = data.prepare(data.test.inputs[:FITTED]), data.test.labels[:FITTED]
    stages = fitness.reach(prior, x, y, seed=finished.seed).mean(1)
    found = {f"range-{'z' if k == 0 else f'h{k}'}": float(value) for k, value in enumerate(stages)}
    pixels = scale.pixels(data.prepare(data.test.inputs))
    classes = range(data.num_classes)
    made = [fitness.variety(fitness.samples(prior, c, MANY, finished.seed)) for c in classes]
    real = [fitness.variety(pixels[data.test.labels == c]) for c in classes]
    return {
        **found,
        "variety": sum(made) / len(made),
        "variety-least": min(made),
        "variety-data": sum(real) / len(real),
    }


def analyse(runs: Mapping[str, Finished]) -> dict[str, dict[str, float]]:
    """Return for every GIFD arm on how many of the same images it is nearer than each competitor, as shares."""
    found: dict[str, dict[str, float]] = {}
    for arm in runs:
        setting, dash, attack = arm.rpartition("-")
        if not dash or attack != "gifd":
            continue
        own = images(runs[arm])
        for other in ("latent", "ig", "gias"):
            if f"{setting}-{other}" in runs:
                theirs = images(runs[f"{setting}-{other}"])
                wins = sum(a > b for a, b in zip(own, theirs, strict=True)) / len(own)
                found.setdefault(arm, {})[f"wins-over-{other}"] = wins
    return found


def images(finished: Finished) -> list[float]:
    """Return the PSNR of every image, by client."""
    told = json.loads((finished.directory / FOLDER / "attack.json").read_text())
    return [image["psnr"] for victim in told["victims"] for image in victim["images"]]


METHODS = {"IG": "ig", "latent code": "latent", "GIAS": "gias", "GIFD": "gifd"}
SETTINGS = {
    "95 % pruned": "prune",
    "noise": "noise",
    "clipped": "clip",
    "Soteria": "soteria",
    "batch of 4": "batch",
    "other images than the prior's": "ood",
}


def figure(made: Reproduction) -> Figure:
    """Return the PSNR by method in every setting."""
    drawn, axes = figures.canvas(3, 2, 3.8, 2.1)
    for axis, (title, setting) in zip(axes, SETTINGS.items(), strict=True):
        further = {"GGL": "prune-ggl"} if setting == "prune" else {}
        arms = {name: f"{setting}-{attack}" for name, attack in METHODS.items()}
        figures.arms_by_place(axis, made, "psnr", {**further, **arms})
        axis.set_title(title, fontsize=9)
        figures.finish(axis, "PSNR in dB", "")
    return drawn


psnr = metric("psnr")
PAPER = Paper(
    slug="gifd",
    claims=(
        Claim(
            "range",
            "Feature maps of the opened generator reach images that the latent code does not.",
            (
                metric("range-h2")[PRIOR] >= metric("range-z")[PRIOR] + 6,
                metric("variety")[PRIOR] >= 0.3 * metric("variety-data")[PRIOR],
            ),
        ),
        Claim(
            "prior",
            "The prior is worth something: its latent code alone beats the mean image of the class.",
            psnr["prune-latent"] >= metric("null-class-mean")["prune-latent"] + 1,
        ),
        Claim(
            "feature domain",
            "On gradients of which 95 % are pruned, GIFD beats the search of the latent code and that of pixels by "
            "2 dB, with as many gradients, and on two images of three (p < 0.01 on 60 by a sign test).",
            (
                psnr["prune-gifd"] >= psnr["prune-latent"] + 2,
                psnr["prune-gifd"] >= psnr["prune-ig"] + 2,
                metric("wins-over-latent")["prune-gifd"] >= 2 / 3,
                metric("wins-over-ig")["prune-gifd"] >= 2 / 3,
            ),
        ),
        Claim(
            "gradient-free",
            "It beats the gradient-free search of the latent code (GGL) by 2 dB.",
            psnr["prune-gifd"] >= psnr["prune-ggl"] + 2,
        ),
        Claim(
            "GIAS",
            "It beats GIAS, which searches the generator's weights.",
            psnr["prune-gifd"] >= psnr["prune-gias"],
        ),
        Claim(
            "four defences",
            "Against pruning, noise, clipping and Soteria it beats every competitor.",
            tuple(
                psnr[f"{defence}-gifd"] >= psnr[f"{defence}-{other}"]
                for defence in DEFENCES
                for other in ("latent", "ig", "gias")
            ),
            mechanism=mean(psnr[f"{defence}-gifd"] for defence in DEFENCES)
            >= mean(psnr[f"{defence}-latent"] for defence in DEFENCES),
        ),
        Claim(
            "batch",
            "It beats every competitor on gradients of four images.",
            tuple(psnr["batch-gifd"] >= psnr[f"batch-{other}"] for other in ("latent", "ig", "gias")),
        ),
        Claim(
            "out of distribution",
            "On images of another kind than the prior's it beats every competitor, and the latent code by more than "
            "within the distribution.",
            (
                *(psnr["ood-gifd"] >= psnr[f"ood-{other}"] for other in ("latent", "ig", "gias")),
                psnr["ood-gifd"] - psnr["ood-latent"] >= psnr["prune-gifd"] - psnr["prune-latent"],
            ),
        ),
        Claim(
            "l1 ball",
            "The l1 ball helps, on pruned gradients and on noisy ones.",
            (
                psnr["prune-gifd-all"] >= psnr["prune-gifd-free"],
                psnr["noise-gifd-least"] >= psnr["noise-gifd-free"],
            ),
        ),
        Claim(
            "stage choice",
            "The stage of the least distance is a better choice than always the last one.",
            psnr["prune-gifd-all"] >= psnr["prune-gifd-last"],
        ),
        Claim(
            "imitation",
            "Repeating the defence on candidates is worth 1 dB.",
            psnr["prune-gifd-all"] >= psnr["prune-gifd-oblivious"] + 1,
        ),
        Claim(
            "discrepancy",
            "Under noise, stopping at the distance that the noise explains beats the least distance.",
            psnr["noise-gifd-all"] >= psnr["noise-gifd-least"],
        ),
    ),
    measure=measure,
    analyse=analyse,
    figure=figure,
    uses=(
        "flowerbed.strategies.gan",
        "flowerbed.strategies.attacks.generative",
        "flowerbed.strategies.attacks.inversion",
        "flowerbed.models.generators",
        "flowerbed.experiments.leakage.fitness",
        "flowerbed.datasets.swapped",
    ),
)
