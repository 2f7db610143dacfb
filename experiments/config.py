"""The whole description of a simulation, as frozen dataclasses that know nothing of Hydra."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flowerbed.clients.cohort_params import CohortOptions
from flowerbed.clients.params import ENDS_WITH_THE_RUN, LocalParams
from flowerbed.clients.transform_params import ByzantineParams, PrivacyParams, SecureParams
from flowerbed.errors import ConfigError, require, unknown_name
from flowerbed.server.device_params import NONE, DeviceParams
from flowerbed.server.params import EvaluationParams, FederationParams, StopParams

# What a run is, as opposed to where and how it is computed: these sections alone decide the final model.
IDENTITY = (
    "seed",
    "strategy",
    "dataset",
    "data",
    "partition",
    "encoder",
    "model",
    "initial",
    "federation",
    "local",
    "defence",
    "privacy",
    "byzantine",
    "secure",
    "devices",
    "tampering",
    "evaluation",
    "stop",
)
# Within them, what does not: more rounds only go on, and data may lie anywhere.
NEUTRAL = (
    ("federation", "rounds"),
    ("initial", "weights"),
    ("data", "dir"),
    ("data", "cache"),
    ("data", "download"),
)


ENGINES = ("generic", "cohort", "auto")
TRACKERS = ("none", "wandb", "tensorboard")
WANDB_MODES = ("offline", "online", "disabled")
EXCHANGES = ("auto", "messages", "pooled")
VIEWS = ("server", "released")
Settings = dict[str, Any]
"""Sections by name, as ``Simulation.of`` takes them."""


@dataclass(frozen=True)
class Choice:
    """A registered thing by name, with its options."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, value: Choice | str | Mapping[str, Any]) -> Choice:
        """Read a choice from a name, or from a mapping with ``name`` and the options beside it."""
        if isinstance(value, Choice):
            return value
        if isinstance(value, str):
            return cls(value)
        options = dict(value)
        if "name" not in options:
            raise ConfigError(
                f"A choice needs a name, got {sorted(options)}; write {{'name': ..., option: ...}}."
            )
        return cls(options.pop("name"), options)

    def plain(self) -> dict[str, Any]:
        """Return the mapping that ``of`` reads."""
        return {"name": self.name, **self.options}


@dataclass(frozen=True)
class DataParams:
    """Where data comes from."""

    dir: str | None = None
    """Folder with data sets, before FLOWERBED_DATA and downloads."""
    cache: str | None = None
    """Folder for decoded sets; by default FLOWERBED_CACHE or the user's cache folder."""
    download: bool = True
    """Whether a missing set may be downloaded."""
    imbalance: float = 1.0
    """Largest over smallest class of the training set (exponential profile); 1 keeps it as it is."""
    labelled: float = 1.0
    """Share of every client's samples whose labels it sees, the same share of each class."""
    labels_per_class: int = 0
    """Labelled samples of each class that every client has, instead of a share; 0 means ``labelled`` decides."""
    labelled_classes: float = 1.0
    """Share of a client's classes that its labels come from, the same number of labels; below 1 they mismatch."""
    server_per_class: int = 0
    """Labelled samples of each class that the server keeps for itself; no client has them."""
    domain_skew: float = 0.0
    """Concentration of the Dirichlet share of each class that each domain keeps (label skew between domains; the other
    samples are dropped); 0 keeps all."""
    client_samples: int = 0
    """Random samples of the rest that all clients together share; 0 means all of them."""

    def __post_init__(self) -> None:
        require(0 <= self.labelled <= 1, f"data.labelled is {self.labelled}; give a share between 0 and 1.")
        require(
            self.labels_per_class >= 0,
            f"data.labels_per_class is {self.labels_per_class}; give 0 (off) or more.",
        )
        require(
            0 < self.labelled_classes <= 1,
            f"data.labelled_classes is {self.labelled_classes}; give a share above 0, at most 1.",
        )
        require(
            self.labelled_classes == 1 or self.labelled < 1 or self.labels_per_class > 0,
            f"data.labelled_classes is {self.labelled_classes} and every label is seen; set data.labelled below 1, or "
            "data.labels_per_class.",
        )
        require(
            self.server_per_class >= 0,
            f"data.server_per_class is {self.server_per_class}; give 0 (none) or more.",
        )
        require(self.domain_skew >= 0, f"data.domain_skew is {self.domain_skew}; give 0 (off) or more.")
        require(
            self.client_samples >= 0,
            f"data.client_samples is {self.client_samples}; give 0 (all) or more.",
        )
        require(self.imbalance >= 1, f"data.imbalance is {self.imbalance}; give 1 (balanced) or more.")


@dataclass(frozen=True)
class InitialParams:
    """Where the model starts, if not from random weights."""

    weights: str | None = None
    """A safetensors file with some or all tensors of the model by name, such as a run's model.safetensors; the
    others are drawn as always. None draws all."""
    part: str = "all"
    """all: every tensor of the file; backbone: all but the head, which is drawn (a model of another task)."""
    sha256: str = ""
    """Digest of that file; a run fills it in, and refuses another file under the same name."""

    def __post_init__(self) -> None:
        require(bool(self.weights) or not self.sha256, "initial.sha256 needs initial.weights=FILE.")
        require(self.part in ("all", "backbone"), f"initial.part is '{self.part}'; choose all or backbone.")


@dataclass(frozen=True)
class GridParams:
    """Where clients run."""

    name: str = "inprocess"
    """inprocess, or ray. A federation of one client always runs in process."""
    workers: int = 2
    """Ray actors."""
    address: str | None = None
    """Ray cluster: auto, or host:port; None starts a local one. On several machines the run directory, where
    clients keep their state, must lie on a file system that all of them see."""
    gpus_per_worker: float = 0.0
    """Share of a GPU that each actor reserves."""
    threads: int = 1
    """Torch threads of a client's computation. Another number may change the last bits."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu or cuda."""
    exchange: str = "auto"
    """How training replies come back: messages, one from each client; pooled, as sums that workers make; auto: as
    sums where the strategy needs no single reply. The model is the same in every bit."""

    engine: str = "generic"
    """How clients are computed: generic, one after another, the same bits everywhere; cohort, many at once, equal to
    a stated tolerance (see ``cohort``), an error where that is impossible; auto, cohort where it is possible."""

    def __post_init__(self) -> None:
        require(self.name in ("inprocess", "ray"), unknown_name("grid", self.name, ("inprocess", "ray")))
        require(self.engine in ENGINES, unknown_name("engine", self.engine, ENGINES))
        require(self.exchange in EXCHANGES, unknown_name("exchange", self.exchange, EXCHANGES))
        require(self.workers >= 1, f"grid.workers is {self.workers}; give at least 1.")
        require(self.gpus_per_worker >= 0, f"grid.gpus_per_worker is {self.gpus_per_worker}; give 0 or more.")
        require(self.threads >= 1, f"grid.threads is {self.threads}; give at least 1.")


@dataclass(frozen=True)
class RunParams:
    """The run directory."""

    dir: str | None = None
    """Where the run is kept; None keeps nothing (plain Python only)."""
    overwrite: bool = False
    """Replace a run that is already there."""
    checkpoint_every: int = 1
    """Rounds between checkpoints; 0 means only at the end."""
    keep: int = 2
    """Checkpoints kept."""
    progress: bool | None = None
    """Live display; None shows it on a terminal only."""
    figures: bool = True
    """Draw pictures at the end."""

    def __post_init__(self) -> None:
        require(
            self.checkpoint_every >= 0, f"run.checkpoint_every is {self.checkpoint_every}; give 0 or more."
        )
        require(self.keep >= 1, f"run.keep is {self.keep}; give at least 1.")


@dataclass(frozen=True)
class ObserveParams:
    """What is kept of the exchange with single clients, for attacks: in the run directory, under observations."""

    rounds: tuple[int, ...] = ()
    """Rounds whose exchanges are kept; () keeps none."""
    clients: tuple[int, ...] = ()
    """Clients that are observed; () means all that answer."""
    view: str = "server"
    """server: what the server sees, one exchange with every client, or the mean of a cohort with secure.enabled;
    released: the model that a round ends with, which all that take part in the next one see."""

    def __post_init__(self) -> None:
        require(self.view in VIEWS, unknown_name("view", self.view, VIEWS))
        object.__setattr__(self, "rounds", tuple(self.rounds))
        object.__setattr__(self, "clients", tuple(self.clients))
        require(
            all(round_ >= 1 for round_ in self.rounds),
            f"observe.rounds is {list(self.rounds)}; rounds count from 1.",
        )
        require(
            all(client >= 0 for client in self.clients),
            f"observe.clients is {list(self.clients)}; clients count from 0.",
        )
        require(bool(self.rounds) or not self.clients, "observe.clients needs observe.rounds.")


@dataclass(frozen=True)
class TrackingParams:
    """Experiment tracking beside the run directory."""

    name: str = "none"
    """none, wandb or tensorboard."""
    project: str = "flowerbed"
    """wandb's project."""
    mode: str | None = None
    """wandb's mode: offline, online (needs a key) or disabled; None means WANDB_MODE, else offline."""

    def __post_init__(self) -> None:
        require(self.name in TRACKERS, unknown_name("tracker", self.name, TRACKERS))
        require(
            self.mode is None or self.mode in WANDB_MODES,
            unknown_name("tracking.mode", str(self.mode), WANDB_MODES),
        )


@dataclass(frozen=True)
class Simulation:
    """One run, described completely."""

    strategy: Choice = Choice("fedavg")
    dataset: Choice = Choice("digits")
    partition: Choice = Choice("iid")
    encoder: Choice = Choice("none")
    model: Choice = Choice("auto")
    seed: int = 0
    initial: InitialParams = field(default_factory=InitialParams)
    federation: FederationParams = field(default_factory=FederationParams)
    local: LocalParams = field(default_factory=LocalParams)
    defence: Choice = Choice("none")
    privacy: PrivacyParams = field(default_factory=PrivacyParams)
    byzantine: ByzantineParams = field(default_factory=ByzantineParams)
    secure: SecureParams = field(default_factory=SecureParams)
    devices: DeviceParams = field(default_factory=DeviceParams)
    tampering: Choice = Choice("none")
    evaluation: EvaluationParams = field(default_factory=EvaluationParams)
    stop: StopParams = field(default_factory=StopParams)
    data: DataParams = field(default_factory=DataParams)
    grid: GridParams = field(default_factory=GridParams)
    cohort: CohortOptions = field(default_factory=CohortOptions)
    observe: ObserveParams = field(default_factory=ObserveParams)
    run: RunParams = field(default_factory=RunParams)
    tracking: TrackingParams = field(default_factory=TrackingParams)

    def __post_init__(self) -> None:
        require(self.seed >= 0, f"seed is {self.seed}; give 0 or more.")
        require(
            not self.secure.enabled or self.devices.compression == NONE,
            "secure.enabled masks every number of an update, so that none can be left out: set "
            "devices.compression=none (secure.bits says how many bits a number takes).",
        )

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Simulation:
        """Build from nested plain values; every unknown key is a ``ConfigError`` that lists the valid ones."""
        sections = {f.name: f for f in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        for key, value in settings.items():
            if key not in sections:
                raise ConfigError(unknown_name("setting", key, sections))
            values[key] = _section(key, value)
        return cls(**values)

    def plain(self) -> dict[str, Any]:
        """Return the nested plain values that ``of`` reads; this is config.yaml."""
        result: dict[str, Any] = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Choice):
                result[f.name] = value.plain()
            elif dataclasses.is_dataclass(value) and not isinstance(value, type):
                result[f.name] = dataclasses.asdict(value)
            else:
                result[f.name] = value
        return result

    @property
    def identity(self) -> str:
        """Hash of everything that decides the final model, except the number of rounds."""
        plain = {key: value for key, value in self.plain().items() if key in IDENTITY}
        for section, key in NEUTRAL:
            plain[section].pop(key)
        if (
            self.local.schedule in ENDS_WITH_THE_RUN
            or self.strategy.options.get("server_schedule") == "cosine"
        ):
            # Such a schedule ends with the run, so here the number of rounds decides every step.
            plain["federation"]["rounds"] = self.federation.rounds
        # What is off decides nothing, and leaves the runs of before it existed what they were.
        for section, key in (("initial", "sha256"), ("evaluation", "measures"), ("evaluation", "sharded")):
            if not plain[section][key]:
                plain[section].pop(key)
        if self.initial.part == "all":
            plain["initial"].pop("part")
        if self.devices == DeviceParams():
            plain.pop("devices")
        if self.local.schedule != "multistep":
            plain["local"].pop("milestones")
        if self.defence.name == "none":
            plain.pop("defence")
        if self.tampering.name == "none":
            plain.pop("tampering")
        else:
            # A tampered round trains nothing, so which ones are decides the model.
            plain["tampering"] |= {"rounds": self.observe.rounds, "clients": self.observe.clients}
        if not self.local.replacement:
            plain["local"].pop("replacement")
        for key in ("beta2", "eps"):
            if getattr(self.local, key) == getattr(LocalParams(), key):
                plain["local"].pop(key)
        plain = {name: section for name, section in plain.items() if name != "initial" or section}
        return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:16]


SECTIONS: dict[str, type] = {
    "initial": InitialParams,
    "federation": FederationParams,
    "local": LocalParams,
    "privacy": PrivacyParams,
    "byzantine": ByzantineParams,
    "secure": SecureParams,
    "devices": DeviceParams,
    "evaluation": EvaluationParams,
    "stop": StopParams,
    "data": DataParams,
    "grid": GridParams,
    "cohort": CohortOptions,
    "observe": ObserveParams,
    "run": RunParams,
    "tracking": TrackingParams,
}
CHOICES = ("strategy", "dataset", "partition", "encoder", "model", "defence", "tampering")


def _section(key: str, value: Any) -> Any:
    if key in CHOICES:
        return Choice.of(value)
    section = SECTIONS.get(key)
    if section is None or isinstance(value, section):
        return value
    if isinstance(value, str) and key in ("grid", "tracking"):
        value = {"name": value}
    if not isinstance(value, Mapping):
        raise ConfigError(f"'{key}' holds several settings, got {value!r}; write {key}={{...}}.")
    return build(section, value, key)


def build(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
    """Return ``cls(**values)``; an unknown or missing key is a ``ConfigError`` that lists the valid ones."""
    known = [f.name for f in dataclasses.fields(cls)]
    for name in values:
        if name not in known:
            raise ConfigError(unknown_name(f"key in {prefix}", name, known))
    try:
        return cls(**values)
    except TypeError as error:
        raise ConfigError(f"{prefix}: {error}.") from error


def merged(*layers: Mapping[str, Any]) -> Settings:
    """Return sections laid over each other, later ones over earlier ones.

    A mapping goes into the section that is there; one that names something else (``name``) replaces it.
    """
    result: Settings = {}
    for layer in layers:
        for section, value in layer.items():
            before = result.get(section)
            if isinstance(before, str) and isinstance(value, Mapping):
                before = {"name": before}
            if isinstance(before, Mapping) and isinstance(value, Mapping) and "name" not in value:
                result[section] = {**before, **value}
            else:
                result[section] = value
    return result
