"""Mini-shapes: small pictures of one object in front of a wall, every combination of six known factors. Our own set.

For methods about factors of variation, in place of the rendered sets of the literature (Shapes3D and its kin): drawn by
the formulas below, so that nothing is downloaded and every value of every factor is known.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from flowerbed.datasets.dataset import Dataset, Split, Task
from flowerbed.datasets.files import Found, Search
from flowerbed.errors import require
from flowerbed.seeds import numpy_rng

FACTORS = {"floor": 8, "object": 8, "wall": 6, "size": 4, "shape": 3, "x": 5}
"""The factors and how many values each has; floor, object and wall are hues."""
EXTRA = "factors"
"""Extra of both splits: the factors' values, int64 ``(N, 6)``, in the order of ``FACTORS``."""
SHAPES = ("square", "disc", "triangle")
HORIZON, CENTRE = 0.64, 0.52
"""Height of the line between wall and floor and of the object's centre, as shares of the side from above."""
RADII, PLACES = np.linspace(0.13, 0.25, FACTORS["size"]), np.linspace(0.26, 0.74, FACTORS["x"])
FINE = 4
"""Points a pixel is averaged over, in each direction."""
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class MiniShapes:
    """All 23,040 pictures ``(3, side, side)``, in one fixed random order of which the last ``test`` are the test split.

    Pixels go to a model as they are, in [0, 1] (mean 0, standard deviation 1). Both splits have the extra ``factors``.
    """

    side: int = 32
    """Pixels of a side."""
    test: int = 3040
    """Pictures of the test split."""
    label: str = "shape"
    """The factor that is the label, by which clients can be made to differ."""
    predicted: bool = False
    """Whether the label is to be predicted; else measures judge (``Dataset.task``)."""

    def __post_init__(self) -> None:
        total = int(np.prod(list(FACTORS.values())))
        require(self.side >= 8, f"dataset.side is {self.side}; give at least 8 pixels.")
        require(
            0 < self.test < total, f"dataset.test is {self.test}; give at least 1 and less than all {total}."
        )
        require(
            self.label in FACTORS, f"dataset.label is '{self.label}'; choose one of {', '.join(FACTORS)}."
        )

    def locate(self, search: Search) -> Found:
        """Return no files: the pictures are drawn."""
        return Found("formulas")

    def read(self, found: Found) -> Dataset:
        """Draw them."""
        images = torch.from_numpy(draw(self.side))
        factors = torch.cartesian_prod(*(torch.arange(n) for n in FACTORS.values()))
        order = torch.from_numpy(numpy_rng(0, "datasets.mini_shapes.split").permutation(len(images)))
        classes = tuple(f"{self.label} {value}" for value in range(FACTORS[self.label]))
        column = list(FACTORS).index(self.label)
        train, test = (
            Split(
                images[rows],
                factors[rows, column],
                {EXTRA: factors[rows]},
            )
            for rows in (order[: -self.test], order[-self.test :])
        )
        task: Task = "classification" if self.predicted else "measured"
        return Dataset("mini_shapes", train, test, classes, mean=(0.0,), std=(1.0,), task=task)


def draw(side: int) -> npt.NDArray[np.uint8]:
    """Return every picture, ``(23040, 3, side, side)``, in the order of the factors' values, the last fastest."""
    floors, objects = hues(FACTORS["floor"], 0.55, 0.75), hues(FACTORS["object"], 0.95, 0.95)
    walls = hues(FACTORS["wall"], 0.3, 0.95)
    below = (np.arange(side) + 0.5 > HORIZON * side)[:, None]
    behind = np.where(
        below, floors[:, None, :, None, None], walls[None, :, :, None, None]
    )  # (floor, wall, 3, side, 1)
    shape = tuple(FACTORS.values())
    images = np.empty((*shape, 3, side, side), dtype=np.uint8)
    for size, radius in enumerate(RADII):
        for kind in range(len(SHAPES)):
            for place, x in enumerate(PLACES):
                cover = covered(kind, radius, x, side)
                picture = cover * objects[None, :, None, :, None, None] + (1 - cover) * behind[:, None]
                images[:, :, :, size, kind, place] = np.rint(255 * picture)
    return images.reshape(-1, 3, side, side)


def covered(kind: int, radius: float, x: float, side: int) -> Array:
    """Return the share of each pixel ``(side, side)`` that the object covers; the three shapes have equal areas."""
    at = (np.arange(side * FINE) + 0.5) / (side * FINE)
    across, down = np.abs(at[None, :] - x), at[:, None] - CENTRE
    if kind == 0:
        inside = np.maximum(across, np.abs(down)) <= radius * np.sqrt(np.pi) / 2
    elif kind == 1:
        inside = across**2 + down**2 <= radius**2
    else:
        # Equilateral, its centroid at the centre; h is two thirds of its height.
        h = 2 * radius * np.sqrt(np.pi / np.sqrt(27.0))
        inside = (down <= h / 2) & (np.sqrt(3.0) * across <= down + h)
    blocks: Array = inside.reshape(side, FINE, side, FINE).mean((1, 3))
    return blocks


def hues(count: int, saturation: float, value: float) -> Array:
    """Return ``count`` colours ``(count, 3)`` in [0, 1], evenly round the colour circle."""
    return np.array([colorsys.hsv_to_rgb(k / count, saturation, value) for k in range(count)])
