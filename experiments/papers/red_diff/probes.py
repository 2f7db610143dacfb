"""What the reproduction of RED-diff runs on, and what it measures."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from flowerbed.experiments.papers.red_diff import RESTORED, TASKS
from flowerbed.experiments.reproduction.finished import Finished


def analyse(runs: Mapping[str, Finished]) -> dict[str, dict[str, float]]:
    """Return what a classifier recognises in restored images, and by how much RED-diff leads.

    ``recognised`` is a share. ``margin`` is RED-diff's PSNR less the better of DPS and PiGDM; ``second-margin``, of an
    arm on the task ``random``, is the second best of the three tasks' margins.
    """
    net = runs["judge"].model
    found: dict[str, dict[str, float]] = {}
    for arm, run in runs.items():
        if arm == "judge":
            continue
        kept = run.client()[RESTORED]
        with torch.no_grad():
            found[arm] = {
                "recognised": float((net(kept["images"]).argmax(1) == kept["labels"]).double().mean())
            }
    for prior in PRIORS:
        margins = {
            task: runs[f"{prior}-red-{task}"].values["train:psnr"]
            - max(runs[f"{prior}-{other}-{task}"].values["train:psnr"] for other in ("dps", "pigdm"))
            for task in TASKS
        }
        for task, margin in margins.items():
            found[f"{prior}-red-{task}"]["margin"] = margin
        found[f"{prior}-red-random"]["second-margin"] = sorted(margins.values())[-2]
    return found


PRIORS = ("exact", "unet")
