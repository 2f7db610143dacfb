"""What the owner of a device says about it, in one TOML file; importing this module imports no torch."""

from __future__ import annotations

import dataclasses
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flowerbed.errors import ConfigError, require, unknown_name

MEGABYTE = 10**6


@dataclass(frozen=True)
class DeviceDataParams:
    """``[data]``: where the device's own samples are; what is not listed here are options of the kind."""

    kind: str
    """images, npz, csv, parquet, or a class of your own, package.module:Class."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """``path`` and whatever else the kind takes; see ``flowerbed.clients.device_data``."""


@dataclass(frozen=True)
class Capabilities:
    """``[capabilities]``: what the server may know of the device when it decides whom it asks, and for how much."""

    ram_mb: int = 0
    """Memory in MB; 0 means what the system reports."""
    gpu: bool = False
    """Whether clients compute on a GPU."""
    speed: float = 1.0
    """How fast it trains, as a multiple of what the operator of the federation calls one."""
    bandwidth_mbit: float = 0.0
    """Upload bandwidth in Mbit/s; 0 means unknown, which counts as ample."""

    def __post_init__(self) -> None:
        _at_least(0, "capabilities", ram_mb=self.ram_mb, bandwidth_mbit=self.bandwidth_mbit)
        require(self.speed > 0, f"capabilities.speed is {self.speed}; give a number above 0.")

    @property
    def ram(self) -> int:
        """The memory in MB."""
        return self.ram_mb or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // MEGABYTE


@dataclass(frozen=True)
class Quotas:
    """``[quotas]``: what the device refuses to exceed, whatever the server asks; 0 means no limit."""

    message_mb: float = 0.0
    """Largest message that is accepted or sent, in MB."""
    download_mb_per_day: float = 0.0
    upload_mb_per_day: float = 0.0
    trainings_per_day: int = 0
    """Messages a day that ask for training."""

    def __post_init__(self) -> None:
        _at_least(0, "quotas", **dataclasses.asdict(self))


@dataclass(frozen=True)
class DeviceConfig:
    """One device: its number, its data, where it keeps its state, and what it may use.

    Relative paths count from the folder of the file.
    """

    data: DeviceDataParams
    folder: Path
    """The folder of the file."""
    client: int = -1
    """The device's number in the federation, from 0; -1 leaves it to the node configuration's ``partition-id``."""
    store: str = "store"
    """Folder for what must survive: the client's state, decoded data, quotas."""
    keep_rounds: int = 10
    """Versions of the client's state that are kept: a server that goes on from a checkpoint may be so far behind."""
    threads: int = 1
    """Torch threads."""
    memory_limit_mb: int = 0
    """Memory that a client process may use in MB; 0 means no limit."""
    device: str = "auto"
    """Where to compute: auto (a GPU where there is one), cpu or cuda."""
    capabilities: Capabilities = field(default_factory=Capabilities)
    quotas: Quotas = field(default_factory=Quotas)

    def __post_init__(self) -> None:
        _at_least(-1, "", client=self.client)
        _at_least(1, "", threads=self.threads, keep_rounds=self.keep_rounds)
        _at_least(0, "", memory_limit_mb=self.memory_limit_mb)
        require(
            self.device in ("auto", "cpu") or self.device.startswith("cuda"),
            f"device is '{self.device}'; choose auto, cpu or cuda.",
        )

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> DeviceConfig:
        """Read the TOML file; raises ``ConfigError`` naming the file and the first thing wrong in it."""
        path = Path(path).expanduser().absolute()
        try:
            plain = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
            raise ConfigError(f"The device's configuration {path} cannot be read: {reason}.") from error
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"The device's configuration {path} is no TOML: {error}.") from error
        try:
            return cls._of(plain, path.parent)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    @classmethod
    def _of(cls, plain: Mapping[str, Any], folder: Path) -> DeviceConfig:
        values = dict(plain)
        data = _table(values.pop("data", None), "data")
        if not isinstance(data.get("kind"), str):
            raise ConfigError(
                "[data] needs a kind: images, npz, csv, parquet, or your own package.module:Class; write for example "
                'kind = "images" and path = "pictures".'
            )
        kind = data.pop("kind")
        sections = {"capabilities": Capabilities, "quotas": Quotas}
        made = {
            name: _made(section, _table(values.pop(name, {}), name), name)
            for name, section in sections.items()
        }
        if "folder" in values:
            raise ConfigError(unknown_name("key", "folder", _names(cls)))
        return _made(cls, {**values, **made, "data": DeviceDataParams(kind, data), "folder": folder}, "")  # type: ignore[no-any-return]

    @property
    def store_folder(self) -> Path:
        """The folder of ``store``."""
        return self.folder / Path(self.store).expanduser()


def _table(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(
            f"The table [{name}] is missing." if value is None else f"'{name}' must be a table."
        )
    return dict(value)


def _names(section: type) -> list[str]:
    return [f.name for f in dataclasses.fields(section) if f.name != "folder"]


def _made(section: type, values: Mapping[str, Any], name: str) -> Any:
    types = {f.name: f.type for f in dataclasses.fields(section)}
    given = dict(values)
    for key, value in values.items():
        if key not in types:
            raise ConfigError(unknown_name(f"key in [{name}]" if name else "key", key, _names(section)))
        given[key] = _checked(f"{name}.{key}" if name else key, value, str(types[key]))
    return section(**given)


def _checked(key: str, value: Any, kind: str) -> Any:
    """Return a value of the annotated plain type; a whole number is as good as a fraction."""
    wanted = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}.get(kind)
    if wanted is not None and (not isinstance(value, wanted) or (isinstance(value, bool) and kind != "bool")):
        names = {
            "int": "a whole number",
            "float": "a number",
            "bool": "true or false",
            "str": "text in quotes",
        }
        raise ConfigError(f"{key} must be {names[kind]}, got {value!r}.")
    return float(value) if kind == "float" else value


def _at_least(least: int, section: str, **values: float) -> None:
    for key, value in values.items():
        name = f"{section}.{key}" if section else key
        require(value >= least, f"{name} is {value}; give {least} or more.")
