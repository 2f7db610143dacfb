"""What an attack left, as files: JSON, Markdown, and a gallery of originals beside reconstructions.

``pairs.safetensors`` holds the gallery's images: for every victim ``original-round-R-client-K`` and
``found-round-R-client-K``, uint8 ``(B, C, H, W)``, the i-th of one beside the i-th of the other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from flowerbed.experiments.leakage import text_scoring
from flowerbed.experiments.leakage.attacking import Attacked, Victim
from flowerbed.experiments.leakage.scoring import Summary
from flowerbed.experiments.run_directory import git_commit, versions
from flowerbed.storage import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 24
"""Images in a gallery, at most."""
ACROSS = 8
PAIRS = "pairs.safetensors"
ORIGINAL, FOUND = "original", "found"


def write(made: Attacked, folder: Path, options: Mapping[str, Any]) -> list[Path]:
    """Write attack.json, attack.md, a gallery and the files of tensors into ``folder``; return the files.

    The gallery is a picture, gallery.png, with its pairs of images in pairs.safetensors, or of text gallery.txt.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shown = ("gallery.txt",) if made.vocabulary else ("gallery.png", PAIRS)
    files = [folder / name for name in ("attack.json", "attack.md", "reconstructions.safetensors", *shown)]
    atomic_write(files[0], (json.dumps(plain(made, options), indent=1) + "\n").encode())
    atomic_write(files[1], markdown(made).encode())
    tensors = {
        f"{kind}-round-{v.observation.round}-client-{v.observation.client}": value.contiguous()
        for v in made.victims
        for kind, value in (("x", v.found.x), ("labels", v.found.labels))
    }
    atomic_write(files[2], save(tensors))
    if made.vocabulary:
        texts = [text_scoring.pairs(v.found, v.truth, v.score.order, made.vocabulary) for v in made.victims]
        atomic_write(files[3], "\n".join(texts).encode())
    else:
        gallery(made).savefig(files[3])
        atomic_write(files[4], save(_pairs(made)))
    return files


def place_of(victim: Mapping[str, Any]) -> str:
    """Return the end of a victim's names in the files of tensors, from its entry in attack.json."""
    return f"round-{victim['round']}-client-{victim['client']}"


def _pairs(made: Attacked) -> dict[str, Tensor]:
    """Return every victim's originals, and the reconstructions that belong to them, as bytes."""
    pairs = {}
    for v in made.victims:
        end = place_of({"round": v.observation.round, "client": v.observation.client})
        for kind, x in ((ORIGINAL, v.truth.x), (FOUND, v.found.x[list(v.score.order)])):
            pixels = made.scale.pixels(x).mul(255).round().to(torch.uint8)
            pairs[f"{kind}-{end}"] = pixels.contiguous()
    return pairs


def plain(made: Attacked, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything that was found but the images."""
    return {
        "attack": made.attack.name,
        "options": dict(options),
        "run": str(made.directory),
        "granted": list(made.granted),
        "defence": made.defence.plain(),
        "adaptive": made.adaptive,
        "seed": made.seed,
        "summary": {name: asdict(value) for name, value in made.summary().items()},
        "victims": [_victim(victim) for victim in made.victims],
        "git_commit": git_commit(),
        "versions": versions(),
    }


def _victim(victim: Victim) -> dict[str, Any]:
    found = victim.found
    return {
        "client": victim.observation.client,
        "round": victim.observation.round,
        "cost": found.cost,
        "evaluations": found.evaluations,
        "seconds": round(found.seconds, 3),
        "labels": {
            "found": found.labels.tolist(),
            "true": victim.truth.y.tolist(),
            "accuracy": victim.score.labels,
        },
        "images": [dict(image) for image in victim.score.images],
        "curve": list(found.curve),
        **found.found,
    }


def rows(made: Attacked) -> list[tuple[str, str, str, str]]:
    """Return the summary as text: what, mean, interval, worst."""
    return [(name, *_texts(value)) for name, value in made.summary().items()]


def _texts(value: Summary) -> tuple[str, str, str]:
    return f"{value.mean:.4g}", f"{value.low:.4g} to {value.high:.4g}", f"{value.worst:.4g}"


def markdown(made: Attacked) -> str:
    """Return the report."""
    samples = sum(len(v.truth.y) for v in made.victims)
    spent = sum(v.found.evaluations for v in made.victims)
    seconds = sum(v.found.seconds for v in made.victims)
    granted = f" Granted: {', '.join(made.granted)}." if made.granted else ""
    parts = [
        f"# Attack '{made.attack.name}'",
        f"Defence: {made.defence.name}; the attacker {'knows' if made.adaptive else 'does not know'} of it.",
        f"{len(made.victims)} updates of {samples} samples; {spent:,} gradients, {seconds:.1f} s.{granted}",
        "Worst is the sample that leaked most. A null model uses no gradient: an attack below it shows nothing.",
        "\n".join(
            [
                "| figure | mean | 95 % interval | worst |",
                "|---|---:|---|---:|",
                *(f"| {' | '.join(row)} |" for row in rows(made)),
            ]
        ),
    ]
    return "\n\n".join(parts) + "\n"


def gallery(made: Attacked) -> Figure:
    """Return originals above reconstructions, with their PSNR; the samples that leaked most come first."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [
        (made.scale.pixels(v.truth.x[i : i + 1])[0], made.scale.pixels(v.found.x[j : j + 1])[0], image)
        for v in made.victims
        for i, (j, image) in enumerate(zip(v.score.order, v.score.images, strict=True))
    ]
    shown.sort(key=lambda entry: -entry[2]["psnr"])
    shown = shown[:SHOWN]
    across = min(ACROSS, len(shown))
    down = -(-len(shown) // across)
    figure = Figure(figsize=(1.25 * across + 0.5, 2.75 * down + 0.3), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2 * down, across, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for place, (true, found, image) in enumerate(shown):
        row, column = divmod(place, across)
        for below, picture in enumerate((true, found)):
            axis = axes[2 * row + below, column]
            pixels = picture.permute(1, 2, 0).numpy()
            axis.imshow(np.squeeze(pixels), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes[2 * row, column].set_title("original", fontsize=7)
        axes[2 * row + 1, column].set_title(f"{image['psnr']:.1f} dB", fontsize=7)
    return figure
