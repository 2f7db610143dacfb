"""The seam between a data set's origin and the platform."""

from __future__ import annotations

from typing import Protocol

from flowerbed.datasets.dataset import Dataset
from flowerbed.datasets.files import Found, Search


class DataSource(Protocol):
    """Something that finds the files of one data set and decodes them.

    A source is a frozen dataclass whose fields are the options that a user may give, validated in
    ``__post_init__``. Options, form and files identify the decoded copy on disk, so ``read`` must depend
    on nothing else.
    """

    def locate(self, search: Search) -> Found:
        """Return the files to read; raises ``DataError`` with a remedy if there are none."""
        ...

    def read(self, found: Found) -> Dataset:
        """Decode the files that ``locate`` returned."""
        ...
