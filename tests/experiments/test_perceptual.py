"""Feature distances: the formula against plain loops, order under growing distortions, and LPIPS from files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

from flowerbed.datasets.augment import PIXELS
from flowerbed.errors import ConfigError
from flowerbed.experiments.leakage import perceptual, scoring
from flowerbed.experiments.leakage.truth import Truth
from flowerbed.strategies.attacks.observation import Reconstruction


def digits(count: int = 12) -> Tensor:
    """Return handwritten digits, 32x32."""
    small = torch.tensor(load_digits().images[:count], dtype=torch.float32)[:, None] / 16
    return F.interpolate(small, size=(32, 32), mode="bilinear")


def noisy(x: Tensor, strength: float) -> Tensor:
    return x + strength * 0.4 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))


def blurred(x: Tensor, strength: float) -> Tensor:
    places = torch.arange(-8, 9, dtype=torch.float32)
    row = torch.exp(-(places**2) / (2 * (3 * strength) ** 2))
    row = row / row.sum()
    wide = F.conv2d(F.pad(x, (8, 8, 0, 0), mode="replicate"), row.view(1, 1, 1, -1))
    return F.conv2d(F.pad(wide, (0, 0, 8, 8), mode="replicate"), row.view(1, 1, -1, 1))


def shifted(x: Tensor, strength: float) -> Tensor:
    return torch.roll(x, round(8 * strength), 3)


def hidden(x: Tensor, strength: float) -> Tensor:
    found = x.clone()
    found[..., : round(32 * strength), :] = 0.5
    return found


@pytest.mark.parametrize("distort", [noisy, blurred, shifted, hidden])
def test_it_grows_with_distortion(distort: Callable[[Tensor, float], Tensor]) -> None:
    x, distance = digits(), perceptual.random_features()
    values = [float(distance(distort(x, s), x).mean()) for s in (0.125, 0.25, 0.5, 0.75)]
    assert 0 < values[0] < values[1] < values[2] < values[3]


def test_structure_counts_for_more_than_brightness() -> None:
    """At one squared error, which cannot tell the two apart."""
    x, distance = digits(), perceptual.random_features()
    grain = noisy(x, 0.25) - x
    size = grain.square().mean((1, 2, 3), keepdim=True).sqrt()
    assert float(distance(x + grain, x).mean()) > 10 * float(distance(x + size, x).mean())


def test_it_is_a_distance_of_images_of_any_channels() -> None:
    a, b = digits(4), digits(8)[4:]
    distance = perceptual.random_features()
    assert float(distance(a, a).abs().max()) == 0
    torch.testing.assert_close(distance(a, b), distance(b, a))
    torch.testing.assert_close(distance(a.expand(-1, 3, -1, -1), b.expand(-1, 3, -1, -1)), distance(a, b))
    torch.testing.assert_close(distance(a, b)[1:2], distance(a[1:2], b[1:2]))
    again = perceptual.random_features()
    assert torch.equal(distance(a, b), again(a, b)), "the same network everywhere"


def files(folder: Path) -> list[Path]:
    """Write random weights in the layouts of AlexNet and of LPIPS's heads."""
    rng = torch.Generator().manual_seed(0)
    sizes = ((0, 64, 3, 11), (3, 192, 64, 5), (6, 384, 192, 3), (8, 256, 384, 3), (10, 256, 256, 3))
    body = {}
    for place, after, before, size in sizes:
        body[f"features.{place}.weight"] = torch.randn(after, before, size, size, generator=rng) * 0.02
        body[f"features.{place}.bias"] = torch.randn(after, generator=rng) * 0.1
    heads = {f"lin{i}.model.1.weight": torch.rand(1, s[1], 1, 1, generator=rng) for i, s in enumerate(sizes)}
    torch.save(body, folder / "alexnet.pth")
    save_file(heads, folder / "heads.safetensors")
    return [folder / "alexnet.pth", folder / "heads.safetensors"]


def test_lpips_is_its_formula(tmp_path: Path) -> None:
    paths = files(tmp_path)
    body = torch.load(paths[0], weights_only=True)
    distance = perceptual.distances(paths)["lpips"]
    a, b = digits(2), digits(4)[2:]
    net = torch.nn.Sequential()
    layers: list[torch.nn.Module] = [
        torch.nn.Conv2d(3, 64, 11, 4, 2),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(3, 2),
        torch.nn.Conv2d(64, 192, 5, padding=2),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(3, 2),
        torch.nn.Conv2d(192, 384, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(384, 256, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(256, 256, 3, padding=1),
        torch.nn.ReLU(),
    ]
    for place, layer in enumerate(layers):
        net.add_module(str(place), layer)
    net.load_state_dict({n.removeprefix("features."): v for n, v in body.items()})
    head = distance.weights

    def maps(x: Tensor) -> list[Tensor]:
        x = (2 * x.expand(-1, 3, -1, -1) - 1) - torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)
        x, found = x / torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1), []
        for place, layer in enumerate(net):
            x = layer(x)
            if place in (1, 4, 7, 9, 11):
                found.append(x.detach())
        return found

    for sample in range(2):
        expected = 0.0
        for f, g, w in zip(maps(a[sample : sample + 1]), maps(b[sample : sample + 1]), head, strict=True):
            height, width = f.shape[2:]
            for i in range(height):
                for j in range(width):
                    u, v = f[0, :, i, j], g[0, :, i, j]
                    gap = u / (u.norm() + 1e-10) - v / (v.norm() + 1e-10)
                    expected += float((w * gap**2).sum()) / (height * width)
        assert float(distance(a, b)[sample]) == pytest.approx(expected, rel=1e-4)


def test_wrong_files_are_named(tmp_path: Path) -> None:
    paths = files(tmp_path)
    with pytest.raises(ConfigError, match=r"lacks 'features\.0\.weight'"):
        perceptual.distances([paths[1], paths[0]])
    with pytest.raises(ConfigError, match="needs two files"):
        perceptual.distances(paths[:1])
    with pytest.raises(ConfigError, match="cannot be read"):
        perceptual.distances([tmp_path / "nowhere.pth", paths[1]])


def test_scores_have_it() -> None:
    x = digits(2)
    truth = Truth(x, torch.tensor([0, 1]), torch.tensor([0, 1]))
    found = Reconstruction(noisy(x, 0.25), truth.y, 0.0)
    marks = scoring.score(found, truth, PIXELS, distances=perceptual.distances())
    assert all(image["rfd"] > 0 for image in marks.images)
    assert "rfd" in scoring.ERRORS
