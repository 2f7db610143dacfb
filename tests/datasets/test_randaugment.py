"""Strong augmentation: every operation against Pillow or a slow twin, one image at a time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from flowerbed.datasets import image_ops
from flowerbed.datasets.augment import AUGMENTATIONS, POOL, Scale, cutout, flip_shift, randaugment, shift
from flowerbed.errors import ConfigError

LEVEL = 1 / 255
SHAPES = ((3, 32, 32), (1, 28, 28), (1, 8, 8))
Pillow = Callable[[Image.Image, float], Image.Image]


def pictures(shape: tuple[int, ...], count: int = 4, seed: int = 0) -> Tensor:
    """Return smooth random images with exactly 256 levels, so that Pillow sees the same numbers."""
    noise = torch.rand(count, shape[0], 4, 4, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(noise, shape[1:], mode="bilinear")
    return (smooth * 255).round() / 255


def to_pillow(image: Tensor) -> Image.Image:
    array = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(array[:, :, 0] if len(image) == 1 else array)


def from_pillow(image: Image.Image) -> Tensor:
    array = np.asarray(image, dtype=np.float32) / 255
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())


# Grey images have no colour; Pillow's own definition needs RGB there.
LIKE_PILLOW: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Pillow, float, float]] = {
    "brightness": (image_ops.brightness, lambda i, v: ImageEnhance.Brightness(i).enhance(v), 0.4, 1.01),
    "color": (image_ops.color, lambda i, v: ImageEnhance.Color(i).enhance(v), 0.4, 2.01),
    "contrast": (image_ops.contrast, lambda i, v: ImageEnhance.Contrast(i).enhance(v), 0.4, 2.01),
    "sharpness": (image_ops.sharpness, lambda i, v: ImageEnhance.Sharpness(i).enhance(v), 0.4, 2.01),
    "posterize": (image_ops.posterize, lambda i, v: ImageOps.posterize(i, int(v)), 4, 0.01),
    "solarize": (image_ops.solarize, lambda i, v: ImageOps.solarize(i, int(v * 256)), 0.5, 0.01),
    "autocontrast": (
        lambda p, _: image_ops.autocontrast(p),
        lambda i, _: ImageOps.autocontrast(i),
        0,
        1.01,
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", LIKE_PILLOW)
def test_agrees_with_pillow_up_to_its_rounding(name: str, shape: tuple[int, ...]) -> None:
    ours, theirs, value, levels = LIKE_PILLOW[name]
    batch = pictures(shape)
    result = ours(batch, torch.full((len(batch),), float(value)))
    for image, expected in zip(result, batch, strict=True):
        reference = from_pillow(theirs(to_pillow(expected), value))
        assert float((image - reference).abs().max()) <= levels * LEVEL


def slow_equalize(channel: Tensor) -> Tensor:
    levels = (channel * 255).round().long()
    brightest = int(levels.max())
    outside = int((levels < brightest).sum())
    result = channel.clone()
    if outside:
        for row in range(len(channel)):
            for column in range(channel.shape[1]):
                result[row, column] = int((levels < levels[row, column]).sum()) / outside
    return result


def test_equalize_counts_the_pixels_below() -> None:
    batch = pictures((2, 6, 5))
    batch[0, 1] = 0.25  # a constant channel stays
    result = image_ops.equalize(batch)
    for image, before in zip(result, batch, strict=True):
        for channel, source in zip(image, before, strict=True):
            torch.testing.assert_close(channel, slow_equalize(source))


def test_equalize_is_pillows_for_large_pictures() -> None:
    batch = pictures((1, 96, 96), count=2)
    for image, before in zip(image_ops.equalize(batch), batch, strict=True):
        # Pillow counts in steps of a 255th of the pixels, rounded down, hence a tilt of a few levels.
        assert float((image - from_pillow(ImageOps.equalize(to_pillow(before)))).abs().max()) < 10 * LEVEL


@pytest.mark.parametrize("shape", SHAPES)
def test_geometry(shape: tuple[int, ...]) -> None:
    """Whole pixels move exactly; a turn by 90 degrees is one; strength zero changes nothing."""
    batch = pictures(shape, count=2)
    height, width = shape[1:]
    quarter = torch.full((2,), 0.25)
    left = image_ops.translate_x(batch, quarter)
    torch.testing.assert_close(left[..., : width - width // 4], batch[..., width // 4 :])
    assert not left[..., width - width // 4 :].any()
    down = image_ops.translate_y(batch, -quarter)
    torch.testing.assert_close(down[..., height // 4 :, :], batch[..., : height - height // 4, :])
    turned = image_ops.rotate(batch, torch.tensor([90.0, -90.0]))
    torch.testing.assert_close(turned[0], batch[0].rot90(1, (1, 2)), atol=1e-5, rtol=0)
    torch.testing.assert_close(turned[1], batch[1].rot90(-1, (1, 2)), atol=1e-5, rtol=0)
    for same in (image_ops.rotate, image_ops.shear_x, image_ops.shear_y, image_ops.translate_x):
        torch.testing.assert_close(same(batch, torch.zeros(2)), batch, atol=1e-5, rtol=0)


def test_shear_moves_rows_in_proportion_to_their_distance_from_the_middle() -> None:
    batch = pictures((1, 9, 17), count=1)
    sheared = image_ops.shear_x(batch, torch.tensor([1.0]))
    for row in range(9):
        by = row - 4
        expected = torch.zeros(17)
        for column in range(17):
            if 0 <= column + by < 17:
                expected[column] = batch[0, 0, row, column + by]
        torch.testing.assert_close(sheared[0, 0, row], expected, atol=1e-5, rtol=0)
    turned = image_ops.shear_y(batch.transpose(2, 3), torch.tensor([1.0]))
    torch.testing.assert_close(turned, sheared.transpose(2, 3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_operation_keeps_shape_and_range_and_treats_images_apart(shape: tuple[int, ...]) -> None:
    batch = pictures(shape, count=6)
    for operation in POOL:
        strengths = operation.start + torch.linspace(0.1, 1, 6) * operation.span
        together = operation.apply(batch, strengths)
        assert together.shape == batch.shape
        assert float(together.min()) > -1e-5
        assert float(together.max()) < 1 + 1e-5
        for i in range(6):
            torch.testing.assert_close(
                together[i], operation.apply(batch[i : i + 1], strengths[i : i + 1])[0]
            )


@settings(max_examples=15, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    seed=st.integers(0, 2**32),
    share=st.floats(0.1, 1.0),
)
def test_cutout_against_the_slow_twin(shape: tuple[int, ...], seed: int, share: float) -> None:
    scale = Scale((0.25,), (0.5,))
    batch = scale.values(pictures(shape, seed=seed % 1000))
    result = cutout(batch, torch.Generator().manual_seed(seed), share, scale=scale)
    generator = torch.Generator().manual_seed(seed)
    side = round(share * min(shape[1:]))
    rows, columns = (torch.randint(n, (len(batch),), generator=generator).tolist() for n in shape[1:])
    for image, before, row, column in zip(result, batch, rows, columns, strict=True):
        expected = before.clone()
        for i in range(row - side // 2, row - side // 2 + side):
            for j in range(column - side // 2, column - side // 2 + side):
                if 0 <= i < shape[1] and 0 <= j < shape[2]:
                    expected[:, i, j] = (0.5 - 0.25) / 0.5
        assert torch.equal(image, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_randaugment_against_the_slow_twin(shape: tuple[int, ...]) -> None:
    mean, std = tuple([0.3, 0.5, 0.2][: shape[0]]), tuple([0.5, 0.2, 0.3][: shape[0]])
    scale = Scale(mean, std)
    pixels = pictures(shape, count=64)
    result = randaugment(scale.values(pixels), torch.Generator().manual_seed(3), n=2, m=7, scale=scale)
    generator = torch.Generator().manual_seed(3)

    def draw(high: int) -> list[int]:
        return torch.randint(high, (64,), generator=generator).tolist()

    for _ in range(2):
        chosen, levels, signs, coins = draw(len(POOL)), draw(7), draw(2), draw(2)
        assert set(levels) == set(range(7))
        for i in range(64):
            if coins[i]:
                operation = POOL[chosen[i]]
                strength = operation.start + (levels[i] + 1) / 10 * operation.span
                if operation.signed and not signs[i]:
                    strength = -strength
                pixels[i] = operation.apply(pixels[i : i + 1], torch.tensor([strength]))[0].clamp(0, 1)
    back = result * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
    # Where a value lies on a border between two levels, rounding may decide differently.
    assert float(((back - pixels).abs() > 1e-4).float().mean()) < 0.01


def test_most_of_a_small_picture_survives() -> None:
    """The ranges suit 8 and 32 pixels: hardly any picture is blanked (with 224-pixel ranges many are)."""
    for shape in SHAPES:
        batch = pictures(shape, count=1000)
        result = randaugment(batch, torch.Generator().manual_seed(0))
        blank = result.flatten(1).std(1) < 0.02
        assert float(blank.float().mean()) < 0.03


@pytest.mark.parametrize("shape", SHAPES)
def test_shift_reads_the_mirrored_edge(shape: tuple[int, ...]) -> None:
    batch = pictures(shape, count=8)
    reach = round(shape[1] / 8)
    generator = torch.Generator().manual_seed(1)
    tops, lefts = (torch.randint(2 * reach + 1, (8,), generator=generator).tolist() for _ in range(2))
    result = shift(batch, torch.Generator().manual_seed(1))

    def mirrored(place: int, length: int) -> int:
        return -place if place < 0 else 2 * (length - 1) - place if place >= length else place

    for image, before, top, left in zip(result, batch, tops, lefts, strict=True):
        rows = [mirrored(i + top - reach, shape[1]) for i in range(shape[1])]
        columns = [mirrored(j + left - reach, shape[2]) for j in range(shape[2])]
        assert torch.equal(image, before[:, rows][:, :, columns])
    generator = torch.Generator().manual_seed(2)
    flips = torch.randint(2, (8,), generator=generator).tolist()
    mirrors = torch.stack([b.flip(-1) if f else b for b, f in zip(batch, flips, strict=True)])
    moved = flip_shift(batch, torch.Generator().manual_seed(2))
    tops, lefts = (torch.randint(2 * reach + 1, (8,), generator=generator).tolist() for _ in range(2))
    for image, before, top, left in zip(moved, mirrors, tops, lefts, strict=True):
        rows = [mirrored(i + top - reach, shape[1]) for i in range(shape[1])]
        columns = [mirrored(j + left - reach, shape[2]) for j in range(shape[2])]
        assert torch.equal(image, before[:, rows][:, :, columns])


@pytest.mark.parametrize("name", ["shift", "flip_shift", "cutout", "randaugment", "randaugment_cutout"])
def test_registered_and_reproducible(name: str) -> None:
    augment = AUGMENTATIONS.get(name)
    scale = Scale((0.5,), (0.25,))
    batch = scale.values(pictures((3, 16, 16), count=16))
    before = batch.clone()
    first = augment(batch, torch.Generator().manual_seed(0), scale=scale)
    assert torch.equal(first, augment(batch, torch.Generator().manual_seed(0), scale=scale))
    assert not torch.equal(first, augment(batch, torch.Generator().manual_seed(1), scale=scale))
    assert torch.equal(batch, before)
    assert first.dtype == batch.dtype
    with pytest.raises(ConfigError, match="B, C, H, W"):
        augment(torch.zeros(2, 3), torch.Generator(), scale=scale)


def test_randaugment_refuses_raw_bytes() -> None:
    with pytest.raises(ConfigError, match="float images"):
        randaugment(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.Generator())
