"""How fast gradients are inverted: flowerbed beside breaching (Geiping et al.), in one run.

Both sides attack the same gradients of the same model with Inverting Gradients: cosine, total variation, the sign of
Adam's gradient, as many iterations and restarts, labels given. Each is a process of its own with one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from flowerbed import seeds
from flowerbed.datasets.augment import Scale
from flowerbed.datasets.dataset import Dataset
from flowerbed.datasets.sources import load_dataset
from flowerbed.errors import ConfigError, RunError, require
from flowerbed.experiments.benchmarks import machine, report
from flowerbed.experiments.benchmarks.competitors import inversion_side
from flowerbed.experiments.benchmarks.report import Item
from flowerbed.experiments.leakage import scoring
from flowerbed.models.base import ModelSpec

OURS, RIVAL = "flowerbed", "breaching"
FASTER = 3.0
"""How many times less CPU an image shall cost than with breaching."""


def method(asked: argparse.Namespace) -> str:
    """Return how the figures were made."""
    return f"""\
{asked.victims} victims x {asked.restarts} restarts x {asked.iterations} iterations; one test image of {asked.dataset} \
each, model {asked.model} as it is drawn, eval mode, TV {asked.tv:g}, labels given. CPU is user and system time of the \
attacks alone: imports and preparation are left out. The restart that is reported is that of least cosine distance."""


def prepare(asked: argparse.Namespace, dataset: Dataset, folder: Path) -> tuple[Tensor, Scale]:
    """Write the work into ``folder``; return the true pixels ``(N, C, H, W)`` and how inputs relate to them."""
    require(
        len(dataset.input_shape) == 3, f"--dataset {dataset.name} has no images; choose one such as cifar10."
    )
    rng = seeds.torch_rng(asked.seed, "bench attack victims")
    require(
        asked.victims <= len(dataset.test),
        f"--victims {asked.victims} are more than {len(dataset.test)} images.",
    )
    rows = torch.randperm(len(dataset.test), generator=rng)[: asked.victims]
    x, y = dataset.prepare(dataset.test.inputs[rows]), dataset.test.labels[rows]
    options = json.loads(asked.options)
    spec = ModelSpec(asked.model, dataset.input_shape, dataset.num_classes, options)
    model = spec.build(asked.seed).eval()
    parameters = dict(model.named_parameters())
    gradients: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for one, label in zip(x, y, strict=True):
        loss = F.cross_entropy(model(one[None]), label[None])
        for name, value in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
            gradients[name].append(value)
    tensors = {f"{inversion_side.STATE}{n}": v.detach().clone() for n, v in model.state_dict().items()}
    tensors |= {f"{inversion_side.GRADIENT}{n}": torch.stack(v) for n, v in gradients.items()}
    save_file({**tensors, "labels": y.contiguous()}, folder / "work.safetensors")
    work = {
        "model": spec.name,
        "shape": spec.input_shape,
        "classes": spec.num_classes,
        "options": options,
        "mean": dataset.mean,
        "std": dataset.std,
        "path": [] if asked.breaching is None else asked.breaching.split(os.pathsep),
        **{name: getattr(asked, name) for name in ("iterations", "restarts", "tv", "seed", "chunk")},
    }
    (folder / "work.json").write_text(json.dumps(work))
    scale = Scale(dataset.mean, dataset.std)
    return scale.pixels(x), scale


def measured(folder: Path, side: str, true: Tensor, scale: Scale) -> dict[str, float]:
    """Run one side and return what it cost and found; raises ``RunError`` with the end of its output if it fails."""
    command = [sys.executable, "-m", inversion_side.__name__, str(folder), side]
    made = subprocess.run(command, check=False, capture_output=True, text=True)
    if made.returncode:
        tail = "\n".join(made.stderr.strip().splitlines()[-3:])
        raise RunError(f"The process of {side} ended with {made.returncode}: {tail}")
    cost: dict[str, float] = json.loads(made.stdout.strip().splitlines()[-1])
    found = load_file(folder / f"{side}.safetensors")["x"]
    psnr = scoring.psnr(scale.pixels(found), true)
    images = len(true)
    return {
        "cpu_per_image": cost["cpu"] / images,
        "wall_per_image": cost["wall"] / images,
        "gradients_per_cpu_second": cost["evaluations"] / cost["cpu"],
        "evaluations": cost["evaluations"],
        "psnr": float(psnr.mean()),
        "psnr_worst": float(psnr.max()),
    }


def items(found: Mapping[str, Mapping[str, float]], colour: float) -> list[Item]:
    """Return the figures; those that compare are held against their bars, where there is something to compare."""
    ours, rival = found[OURS], found.get(RIVAL)
    note = "give --breaching DIR, a checkout of JonasGeiping/breaching"
    ratio = gap = None
    if rival is not None:
        ratio, gap = rival["cpu_per_image"] / ours["cpu_per_image"], ours["psnr"] - rival["psnr"]
        note = ""
    made = [
        Item("ratio", f"times less CPU an image than {RIVAL}", ratio, bar=FASTER, at_most=False, note=note),
        Item("psnr", f"PSNR above that of {RIVAL}, dB", gap, bar=0.0, at_most=False, note=note),
        Item("null", "PSNR of an image's own mean colour, dB", colour),
    ]
    for side, figures in found.items():
        for name, value in figures.items():
            made.append(Item(f"{side} {name}", f"{side}: {name.replace('_', ' ')}", value))
    return made


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="flowerbed bench attack", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--breaching",
        metavar="DIR",
        help=f"a checkout of JonasGeiping/breaching, perhaps with {os.pathsep}DIR of folders with what it imports",
    )
    parser.add_argument("--dataset", default="cifar10", help="three channels, for breaching (%(default)s)")
    parser.add_argument("--model", default="dlg_lenet", help="%(default)s")
    parser.add_argument("--options", default="{}", metavar="JSON", help="of the model")
    parser.add_argument("--victims", type=int, default=16, help="%(default)s")
    parser.add_argument("--restarts", type=int, default=4, help="%(default)s")
    parser.add_argument("--iterations", type=int, default=1000, help="%(default)s")
    parser.add_argument("--tv", type=float, default=0.01, help="weight of the total variation (%(default)s)")
    parser.add_argument("--chunk", type=int, default=0, help="rows computed at a time by flowerbed, 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write FILE.json and FILE.md")
    parser.add_argument(
        "--store", action="store_true", help="write docs/benchmarks/attack.json and .md instead"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of the report")
    asked = parser.parse_args(argv)
    for name in ("victims", "restarts", "iterations"):
        require(getattr(asked, name) >= 1, f"--{name} is {getattr(asked, name)}; give at least 1.")
    if (
        asked.breaching is not None
        and not (Path(asked.breaching.split(os.pathsep)[0]) / "breaching").is_dir()
    ):
        raise ConfigError(f"--breaching {asked.breaching}: there is no folder 'breaching' in it.")
    return asked


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line; the exit status is 1 if a bar is missed."""
    asked = parse(argv)
    stamp = machine.stamp("cpu")
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        true, scale = prepare(asked, load_dataset(asked.dataset), folder)
        for side in (OURS, RIVAL) if asked.breaching else (OURS,):
            print(f"{side}: attacking", file=sys.stderr, flush=True)
            found[side] = measured(folder, side, true, scale)
    flat = true.mean((2, 3), keepdim=True).expand_as(true)
    document: report.Document = {
        f"item {item.key}": report.item_section(item, stamp)
        for item in items(found, float(scoring.psnr(true, flat).mean()))
    }
    lines = report.verdicts(document, ())
    text = report.markdown("Inversion of gradients", method(asked), document, lines)
    out = report.stored("attack") if asked.store else asked.out
    if out is not None:
        report.write(out, document, text)
    print(json.dumps(document, indent=1) if asked.json else text)
    return int(any(line.verdict == report.MISSED for line in lines))


if __name__ == "__main__":
    raise SystemExit(main())
