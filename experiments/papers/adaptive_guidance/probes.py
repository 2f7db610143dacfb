"""What the reproduction of adaptive guidance runs on, and what it measures."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from flowerbed.experiments.generation import frechet
from flowerbed.experiments.papers.adaptive_guidance import SAMPLES
from flowerbed.experiments.reproduction.finished import Finished


def analyse(runs: Mapping[str, Finished]) -> dict[str, dict[str, float]]:
    """Return, for every arm that sampled, how far its images are from full guidance with the same model and noise.

    ``mse`` to it, ``control-mse`` of as many guided steps at the start; ``judged`` is the classifier's accuracy on the
    labels asked for, ``frechet`` the distance of its features to those of the test images.
    """
    judge = runs["judge"]
    net, data = judge.model, judge.dataset
    with torch.no_grad():
        real = net.features(data.prepare(data.test.inputs))  # type: ignore[operator]
    kept = {
        arm: run.client()[SAMPLES] for arm, run in runs.items() if "policy" in run.simulation.strategy.options
    }
    found = {}
    for arm, samples in kept.items():
        reference = kept[arm.partition("-")[0] + "-cfg"]["images"]
        with torch.no_grad():
            features = net.features(samples["images"])  # type: ignore[operator]
            guess = net.head(features).argmax(1)  # type: ignore[operator]
        found[arm] = {
            "mse": float(((samples["images"] - reference) ** 2).double().mean()),
            "judged": float((guess == samples["labels"]).double().mean()),
            "frechet": frechet(features, real),
        }
        if "control" in samples:
            found[arm]["control-mse"] = float(((samples["control"] - reference) ** 2).double().mean())
            found[arm]["control-nfe"] = float(samples["control calls"].double().mean())
    return found
