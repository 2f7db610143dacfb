"""What a paper is made of: arms, claims, and the few functions that are its own.

The numbers of a paper are its *protocol*, ``experiments/conf/paper/<slug>.yaml``::

    settings:                  # sections of a simulation that all arms share
      dataset: fashion_mnist
      local: {lr: 0.1}
    arms:                      # what is compared; an arm is a set of overrides, nothing else
      ce:
        about: cross entropy, the baseline
      "kd-{alpha}":            # one arm for each value
        about: the method
        for: {alpha: [0.5, 0.8]}
        strategy: {name: ":PsKd", alpha: "{alpha}"}
      long:                    # at these scales only; no claim can name it
        scales: [smoke, full]
      student:                 # starts from what another arm delivered, with the same seed
        initial: {weights: "{model:ce}"}
    scales:                    # overrides again; `arms` is for those whose name matches the glob
      smoke: {seeds: [0], federation: {rounds: 2}}
      quick: {seeds: [0, 1, 2], federation: {rounds: 30}, arms: {"kd-*": {local: {lr: 0.05}}}}
      full: {...}

Later ones win: settings, arm, scale, the scale's own for the arm, the command line. ``":PsKd"`` is a name in the
paper's module, ``".probes:conv3"`` one in a module of its package. ``{seed}`` is the seed of the run, ``{model:ARM}``
the model file of another arm, ``{model:ARM@0}`` that of a given seed, ``{model:SLUG/ARM}`` that of another paper.
Unless it says otherwise a paper is one client that always takes part and keeps its optimizer: the same as a central
run.
"""

from __future__ import annotations

import difflib
import fnmatch
import importlib
import itertools
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from flowerbed.errors import ConfigError, require, unknown_name
from flowerbed.experiments.config import Settings, Simulation, merged
from flowerbed.experiments.reproduction.catalogue import catalogue
from flowerbed.experiments.reproduction.claims import Claim
from flowerbed.registry import import_attribute
from flowerbed.storage import Tensors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from flowerbed.experiments.reproduction.engine import Reproduction
    from flowerbed.experiments.reproduction.finished import Finished

PACKAGE = "flowerbed.experiments.papers"
FOLDER = Path(__file__).parent.parent / "papers"
CONF = Path(__file__).parent.parent / "conf" / "paper"
SCALES = ("smoke", "quick", "full")
ONE_CLIENT: Settings = {
    "federation": {"clients": 1},
    "local": {"persist": True},
    "evaluation": {"last": 1},
    "run": {"keep": 1, "progress": False, "figures": False},
}
"""What every paper begins with: the degenerate federation, judged by its last model. A reproduction draws its own
pictures."""
PLACEHOLDER = re.compile(r"\{([\w:@/.-]+)\}")
MODEL_OF = "model:"
OWN_NAME = re.compile(r"(\.[A-Za-z_]\w*)?:[A-Za-z_]\w*")
"""A name of the paper's own module, or of a module of its package."""
CLAIMS = "claims"
"""The module of a paper's package that says PAPER."""
ASIDE = (CLAIMS, "central", "figure")
"""Modules of a paper's package that no result comes from."""

Measure = Callable[["Finished"], Mapping[str, float]]
"""Metrics of one run, made once it is over."""
Analysis = Callable[[Mapping[str, "Finished"]], Mapping[str, Mapping[str, float]]]
"""All runs of one seed by arm, to further metrics by arm and name."""
Central = Callable[[Simulation], Tensors]
"""What the description of an arm gives in a plain loop without any federation: the final model's state dict."""


@dataclass(frozen=True)
class Paper:
    """One paper. All but slug and claims is optional."""

    slug: str
    claims: Sequence[Claim]
    measure: Measure | None = None
    """Metrics that need more than the delivered model (its history, its clients' state); for the others name a
    function in ``evaluation.measures``."""
    analyse: Analysis | None = None
    """Metrics that need several arms."""
    figure: Callable[[Reproduction], Figure] | None = None
    """The paper's own picture."""
    central: Mapping[str, Central] = field(default_factory=dict)
    """Plain twins of arms, by arm: conformance compares them bit for bit."""
    protocol: Path | None = None
    """Where the numbers are, if not in conf/paper/<slug>.yaml."""
    uses: Sequence[str] = ()
    """Further modules that the result stands and falls with, for example ``flowerbed.models.sparsity``."""
    address: str = ""
    """What ``load_paper`` finds it by in any process, ``package.module:ATTRIBUTE``; filled in when it is loaded."""

    @property
    def module(self) -> str:
        """The module or package that holds the paper."""
        return self.address.partition(":")[0].removesuffix(f".{CLAIMS}")

    def sources(self) -> list[str]:
        """Return the modules that its results come from: its own but ``ASIDE``, and what it uses."""
        own = importlib.import_module(self.module)
        parts = sorted(part.name for part in pkgutil.iter_modules(getattr(own, "__path__", ())))
        return [self.module, *(f"{self.module}.{part}" for part in parts if part not in ASIDE), *self.uses]

    @property
    def title(self) -> str:
        """Its title in the catalogue, or the slug."""
        entry = catalogue().get(self.slug)
        return entry.title if entry else self.slug


@dataclass(frozen=True)
class Arm:
    """One line of a comparison at one scale: overrides, with placeholders yet to be filled."""

    name: str
    about: str
    settings: Settings

    def references(self) -> set[str]:
        """Return the models of other arms that it asks for: ``[slug/]arm[@seed]``."""
        texts = (t for value in _leaves(self.settings) for t in PLACEHOLDER.findall(value))
        return {text.removeprefix(MODEL_OF) for text in texts if text.startswith(MODEL_OF)}

    def filled(self, seed: int, models: Mapping[str, str]) -> Settings:
        """Return the settings with every placeholder replaced; ``models`` are files by reference."""
        names: dict[str, Any] = {"seed": seed, **{MODEL_OF + name: path for name, path in models.items()}}
        filled: Settings = _filled(self.settings, names)
        return {**filled, "seed": seed}

    def simulation(self, seed: int, models: Mapping[str, str]) -> Simulation:
        """Return the arm as a run."""
        try:
            return Simulation.of(self.filled(seed, models))
        except ConfigError as error:
            raise ConfigError(f"arm '{self.name}': {error}") from error


@dataclass(frozen=True)
class Scale:
    """A paper at one size."""

    paper: Paper
    name: str
    seeds: tuple[int, ...]
    arms: Mapping[str, Arm]


def built() -> list[str]:
    """Return the slugs of the papers that have a module, sorted."""
    modules = (part.name for part in pkgutil.iter_modules([str(FOLDER)]))
    return sorted(name.replace("_", "-") for name in modules if not name.startswith("_"))


def load_paper(name: str) -> Paper:
    """Return the paper called ``name``: a slug, or ``package.module:ATTRIBUTE``; raises ``ConfigError``."""
    if ":" in name:
        address = name
        found: Any = import_attribute(name, "paper")
    else:
        if name not in built():
            if name in catalogue():
                raise ConfigError(f"The paper '{name}' has no module yet. There are: {', '.join(built())}.")
            near = difflib.get_close_matches(name, catalogue(), n=5, cutoff=0.4)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            raise ConfigError(f"Unknown paper '{name}'.{hint} All of them: flowerbed papers.")
        module = f"{PACKAGE}.{name.replace('-', '_')}"
        if hasattr(importlib.import_module(module), "__path__"):
            module += f".{CLAIMS}"
        address = f"{module}:PAPER"
        found = getattr(importlib.import_module(module), "PAPER", None)
    require(isinstance(found, Paper), f"{address} is no Paper; write PAPER = Paper(...) there.")
    # Not dataclasses.replace: papers are compared by what they say, and this is only where they lie.
    object.__setattr__(found, "address", address)
    assert isinstance(found, Paper)
    return found


def load_scale(paper: Paper, name: str, overrides: Settings | None = None) -> Scale:
    """Read a paper's protocol at one scale, checked as far as that goes without data.

    Raises ``ConfigError`` for what cannot work: an unknown section, an arm that is nowhere, a claim on one.
    """
    path = paper.protocol or CONF / f"{paper.slug}.yaml"
    require(path.exists(), f"The protocol of '{paper.slug}' is missing: {path}.")
    protocol = yaml.safe_load(path.read_text())
    known(f"key of {path.name}", protocol, ("settings", "arms", "scales"))
    known(f"scale of {path.name}", protocol["scales"], SCALES)
    if name not in protocol["scales"]:
        raise ConfigError(unknown_name(f"scale of '{paper.slug}'", name, protocol["scales"]))
    scale = dict(protocol["scales"][name] or {})
    seeds, by_arm = tuple(scale.pop("seeds", (0, 1, 2))), scale.pop("arms", {})
    arms = {}
    for arm, own in _expanded(protocol["arms"]):
        at = own.pop("scales", SCALES)
        for one in at:
            require(one in SCALES, f"{path.name}, arm '{arm}': {unknown_name('scale', one, SCALES)}")
        if name not in at:
            continue
        special = [value for glob, value in by_arm.items() if fnmatch.fnmatchcase(arm, glob)]
        about = str(own.pop("about", ""))
        common = protocol.get("settings", {})
        settings = merged(ONE_CLIENT, common, own, scale, *special, overrides or {})
        arms[arm] = Arm(arm, about, _located(settings, paper.module))
    unused = [glob for glob in by_arm if not fnmatch.filter(arms, glob)]
    require(not unused, f"{path.name}: no arm is called {unused} (scale {name}).")
    for claim in paper.claims:
        for _, arm in sorted(claim.needs()):
            require(arm in arms, f"The claim '{claim.name}': {unknown_name('arm', arm, arms)}")
    found = Scale(paper, name, seeds, arms)
    for one in arms.values():
        one.simulation(seeds[0], dict.fromkeys(one.references(), "model"))
    return found


def known(kind: str, given: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raise ``ConfigError`` for the first key of ``given`` that is none of ``names``."""
    for key in given:
        if key not in names:
            raise ConfigError(unknown_name(kind, key, names))


def _expanded(arms: Mapping[str, Any]) -> Iterator[tuple[str, Settings]]:
    """Yield every arm with its own settings; one with ``for`` stands for an arm for each combination of values."""
    for name, own in arms.items():
        settings = dict(own or {})
        axes = settings.pop("for", {})
        for values in itertools.product(*axes.values()):
            chosen = dict(zip(axes, values, strict=True))
            yield str(_filled(name, chosen, whole=False)), _filled(settings, chosen)


def _filled(value: Any, names: Mapping[str, Any], whole: bool = True) -> Any:
    """Return ``value`` with the placeholders of ``names`` replaced, keeping the type where one is the whole text."""
    if isinstance(value, Mapping):
        return {key: _filled(one, names) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_filled(one, names) for one in value]
    if not isinstance(value, str):
        return value
    if whole and value[1:-1] in names and PLACEHOLDER.fullmatch(value):
        return names[value[1:-1]]
    return PLACEHOLDER.sub(lambda found: str(names.get(found[1], found[0])), value)


def _located(value: Any, module: str) -> Any:
    """Return ``value`` with every ":Name" and ".part:Name" as an import path into the paper's module."""
    if isinstance(value, Mapping):
        return {key: _located(one, module) for key, one in value.items()}
    if isinstance(value, list):
        return [_located(one, module) for one in value]
    return module + value if isinstance(value, str) and OWN_NAME.fullmatch(value) else value


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping | list):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _leaves(one)
    elif isinstance(value, str):
        yield value
