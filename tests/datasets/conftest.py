"""No test of this room touches the network, the user's cache or the user's data folder."""

from __future__ import annotations

import urllib.request
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def sealed_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLOWERBED_DATA", raising=False)
    monkeypatch.setenv("FLOWERBED_CACHE", str(tmp_path / "cache"))
    real = urllib.request.urlopen

    def only_files(url: str, **options: Any) -> Any:
        if not url.startswith("file:"):
            raise OSError("no network in tests")
        return real(url, **options)

    monkeypatch.setattr(urllib.request, "urlopen", only_files)
