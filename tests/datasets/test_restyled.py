"""Four domains of one image set, and the partition that leaves no client without a class."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from flowerbed.datasets.partitions import partition
from flowerbed.datasets.restyled import DOMAINS, _blurred
from flowerbed.datasets.sources import load_dataset
from flowerbed.datasets.subsets import domain_skew
from flowerbed.errors import ConfigError
from flowerbed.experiments.config import Simulation
from flowerbed.experiments.simulation import simulate


def test_every_image_is_in_one_style() -> None:
    plain, styled = load_dataset("digits"), load_dataset("restyled", of="digits")
    domain, x = styled.train.extras["domain"], plain.train.inputs
    assert styled.domains == DOMAINS
    counts = torch.bincount(domain)
    assert int(counts.max() - counts.min()) <= 1
    made = styled.train.inputs
    assert torch.equal(made[domain == 0], x[domain == 0])
    assert torch.equal(made[domain == 1], 255 - x[domain == 1])
    turned = x[domain == 2].transpose(2, 3).flip(2)
    assert torch.equal(made[domain == 2], turned)
    assert torch.equal(styled.train.labels, plain.train.labels)
    assert torch.equal(load_dataset("restyled", of="digits").train.inputs, made)


def test_the_blur_is_a_mean_and_the_noise_has_its_size() -> None:
    images = torch.full((4, 1, 32, 32), 128, dtype=torch.uint8)
    error = (_blurred(images, "train").double() - 128) / 255
    assert float(error.std()) == pytest.approx(0.1, rel=0.05)
    assert abs(float(error.mean())) < 0.01


@pytest.mark.parametrize("of", ["restyled", "toys:quadratics"])
def test_what_cannot_be_restyled_is_refused(of: str) -> None:
    with pytest.raises(ConfigError, match=f"dataset.of={of} cannot be restyled"):
        load_dataset("restyled", of=of)


def test_accuracy_is_reported_for_every_domain() -> None:
    result = simulate(
        dataset={"name": "restyled", "of": "digits"}, partition="domain", model="linear",
        federation={"clients": 4, "rounds": 2}, grid={"device": "cpu"},
    )  # fmt: skip
    found = result.final()
    each = [found[f"accuracy-domain-{name}"] for name in DOMAINS]
    assert found["accuracy-domains-mean"] == pytest.approx(np.mean(each))
    assert found["accuracy-domains-std"] == pytest.approx(np.std(each))
    sizes = torch.bincount(load_dataset("restyled", of="digits").test.extras["domain"]).tolist()
    hits = sum(a * n for a, n in zip(each, sizes, strict=True))
    assert found["accuracy"] == pytest.approx(hits / sum(sizes))


def test_the_floor_of_the_dirichlet_partition() -> None:
    labels = np.tile(np.arange(5), 200)
    found = partition("dirichlet_floor", labels, 8, 0, alpha=0.02, floor=3)
    counts = found.class_counts(labels, 5)
    assert counts.min() >= 3
    assert counts.sum() == 1000
    assert (counts == 3).mean() > 0.4, "beyond the floor it is as skewed as alpha says"
    with pytest.raises(ConfigError, match="needs 1608 samples of class 0"):
        partition("dirichlet_floor", labels, 8, 0, floor=201)
    with pytest.raises(ConfigError, match="finite alpha"):
        partition("dirichlet_floor", labels, 8, 0, alpha=0.0)


def test_clients_can_share_a_part_of_the_samples() -> None:
    from flowerbed.experiments.parts import build_parts

    settings: dict[str, Any] = {"federation": {"clients": 3}, "grid": {"device": "cpu"}}
    parts = build_parts(Simulation.of({**settings, "data": {"client_samples": 90, "server_per_class": 4}}))
    assert parts.train.sizes.sum() == 90
    server = parts.strategy.setting.server.samples  # type: ignore[union-attr]
    assert not set(server) & set(parts.train.samples)
    with pytest.raises(ConfigError, match="more than the 1437 samples"):
        build_parts(Simulation.of({**settings, "data": {"client_samples": 2000}}))


def test_the_domain_skew_is_that_of_office_home_lds() -> None:
    """Every kept share is a floor of the drawn one; shares of a class add up to one over the domains."""
    labels, domains = np.repeat(np.arange(3), 400), np.tile(np.arange(4), 300)
    kept = domain_skew(labels, domains, np.arange(1200), 0.1, 0)
    counts = np.zeros((3, 4), dtype=np.int64)
    np.add.at(counts, (labels[kept], domains[kept]), 1)
    assert (np.diff(kept) > 0).all()
    # Each cell has 100 samples: the floors of shares that sum to 100 miss at most one a domain.
    assert ((counts.sum(1) > 96) & (counts.sum(1) <= 100)).all()
    assert (counts == 0).any()
    assert not np.array_equal(kept, domain_skew(labels, domains, np.arange(1200), 0.1, 1))
    part = domain_skew(labels, domains, np.arange(600), 5.0, 0)
    assert part.max() < 600
    with pytest.raises(ConfigError, match="above 0"):
        domain_skew(labels, domains, np.arange(9), -1.0, 0)
    with pytest.raises(ConfigError, match="leaves none"):
        domain_skew(labels, domains, np.arange(4), 0.1, 0)


def test_a_run_under_domain_skew() -> None:
    result = simulate(
        dataset={"name": "restyled", "of": "digits"}, partition="domain", model="linear", data={"domain_skew": 0.3},
        strategy={"name": "ggeur", "T": 30, "centre": "domains"}, federation={"clients": 4, "rounds": 1},
        grid={"device": "cpu"},
    )  # fmt: skip
    # Domains without a class of their own have it from the others' prototypes.
    assert next(r for r in result.history if r.phase == "train").metrics["num-examples"] == 4 * 10 * 30
    with pytest.raises(ConfigError, match="with domains"):
        simulate(data={"domain_skew": 0.3})
