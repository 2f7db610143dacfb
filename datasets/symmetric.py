"""An image set whose pixels are prepared to lie in [-1, 1], as diffusion models take them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from flowerbed.datasets.dataset import Dataset, Task
from flowerbed.datasets.files import Found, Search
from flowerbed.datasets.source import DataSource
from flowerbed.errors import ConfigError, require


@dataclass(frozen=True)
class Symmetric:
    """The images of another set with mean and standard deviation 0.5."""

    of: str = "digits"
    """The image set."""
    task: Task = "measured"
    """measured, for models that predict no label; or classification."""

    def __post_init__(self) -> None:
        require(
            self.task in ("measured", "classification"),
            f"dataset.task is '{self.task}'; choose measured or classification.",
        )

    def locate(self, search: Search) -> Found:
        """Return the files of the underlying set."""
        return self._source().locate(replace(search, name=self.of))

    def read(self, found: Found) -> Dataset:
        """Decode them; raises ``ConfigError`` for what is not images."""
        plain = self._source().read(found)
        if len(plain.input_shape) != 3:
            raise ConfigError(f"dataset.of={self.of} has no images; choose an image set.")
        return replace(plain, name=f"symmetric {plain.name}", mean=(0.5,), std=(0.5,), task=self.task)

    def _source(self) -> DataSource:
        # Here, not above: the table of data sets may come to name this one.
        from flowerbed.datasets.sources import DATASETS

        source = DATASETS.get(self.of)()
        if isinstance(source, Dataset | Symmetric):
            raise ConfigError(
                f"dataset.of={self.of} cannot be used here; choose an image set by its own name."
            )
        return source
