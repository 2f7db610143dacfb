"""A data set whose labels are not to be predicted, for methods that learn without them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from flowerbed.datasets.dataset import Dataset
from flowerbed.datasets.files import Found, Search
from flowerbed.datasets.source import DataSource
from flowerbed.errors import ConfigError


@dataclass(frozen=True)
class Unlabelled:
    """Another set as it is, with task ``measured``: measures judge a model. The labels are there for them, to probe."""

    of: str = "fashion_mnist"
    """The other set, by its own name."""

    def locate(self, search: Search) -> Found:
        """Return the files of the other set."""
        return self._source().locate(replace(search, name=self.of))

    def read(self, found: Found) -> Dataset:
        """Decode them."""
        return replace(self._source().read(found), task="measured")

    def _source(self) -> DataSource:
        # Here, not above: the table of data sets is made of modules like this one.
        from flowerbed.datasets.sources import DATASETS

        source = DATASETS.get(self.of)()
        if isinstance(source, Dataset | Unlabelled):
            raise ConfigError(f"dataset.of={self.of} is no data set of files; choose one by its own name.")
        return source
