"""Attack what was observed of a run, and score it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowerbed.clients.app import choose_device
from flowerbed.datasets.augment import Scale
from flowerbed.datasets.dataset import Dataset
from flowerbed.errors import ConfigError, require, unknown_name
from flowerbed.experiments import run_directory
from flowerbed.experiments.config import Choice, Simulation
from flowerbed.experiments.leakage import perceptual, scoring, text_scoring
from flowerbed.experiments.leakage.truth import Truth, truth_of, truth_of_all
from flowerbed.experiments.parts import Parts, build_parts
from flowerbed.experiments.transforms import OBSERVATIONS, build_defence, view_of
from flowerbed.strategies.attacks.analytic import ReadOut
from flowerbed.strategies.attacks.descents import Descent, Watch
from flowerbed.strategies.attacks.fishing import Fishing
from flowerbed.strategies.attacks.generative import Latent, Prior
from flowerbed.strategies.attacks.inversion import Inversion
from flowerbed.strategies.attacks.objectives import SCALE_FREE
from flowerbed.strategies.attacks.observation import Observation, Reconstruction, SideInfo
from flowerbed.strategies.attacks.observer import RELEASED, stems
from flowerbed.strategies.attacks.presets import ATTACKS, GENERATIVE, STAGED, TEXT, Attack
from flowerbed.strategies.attacks.priors import TotalVariation
from flowerbed.strategies.attacks.text import Tokens

GRANTS = ("labels", "surrogate")
"""What a threat model may grant beside what every client publishes: true labels; the test images as public data."""


PIXEL_OPTIONS = {"joint": "labels", "boxed": "boxed", "encoded": "encoded", "bottleneck": "bottleneck"}
"""Options of a search among pixels, by what its space calls them."""


@dataclass(frozen=True)
class Victim:
    """One observation with what came of it."""

    observation: Observation
    truth: Truth
    found: Reconstruction
    score: scoring.Score


@dataclass(frozen=True)
class Attacked:
    """An attack on several victims of a run."""

    attack: Attack
    directory: Path
    victims: Sequence[Victim]
    scale: Scale
    nulls: Mapping[str, Sequence[float]]
    seed: int
    granted: tuple[str, ...]
    defence: Choice
    adaptive: bool
    """Whether the attacker knew of the defence."""
    vocabulary: tuple[str, ...] = ()
    """The tokens by number, where samples are text."""

    def summary(self) -> dict[str, scoring.Summary]:
        """Return every figure over all victims' samples, and the null models' PSNR."""
        images = [image for victim in self.victims for image in victim.score.images]
        found = {
            name: scoring.summarised(
                [i[name] for i in images], self.seed, larger_leaks=name not in scoring.ERRORS
            )
            for name in images[0]
        }
        found["labels"] = scoring.summarised([v.score.labels for v in self.victims], self.seed)
        return found | {
            f"null: {name}": scoring.summarised(values, self.seed) for name, values in self.nulls.items()
        }


def composed(name: str, options: Mapping[str, Any], prior: Prior | None = None) -> Attack:
    """Return a preset with some of its constants replaced.

    ``options``: those of ``Inversion`` (restarts, rule, objective, chunk, group, imitation, update_noise, floor,
    last_stage), of ``Descent`` (steps, lr, sign, schedule, ...; a list has one for each stage), ``tv``, the weight of
    its total variation, ``stages`` and ``radii`` of GIFD, and of a search among pixels ``joint`` (labels are searched
    for as well), ``boxed``, ``encoded`` and ``bottleneck``. Raises ``ConfigError`` for others.
    """
    attack = ATTACKS.get(name)(prior)
    if isinstance(attack, Fishing):
        search = composed(attack.search.name, options)
        assert isinstance(search, Inversion)
        return replace(attack, search=search)
    if not isinstance(attack, Inversion):
        for key in options:
            known = ("rule",) if isinstance(attack, ReadOut) else ()
            require(key in known, unknown_name(f"option of attack '{name}'", key, known))
        return replace(attack, **options)
    own = (
        "objective",
        "objective_scale",
        "group",
        "rule",
        "restarts",
        "chunk",
        "imitation",
        "update_noise",
        "floor",
        "last_stage",
    )
    moving = tuple(f.name for f in fields(Descent))
    inside = ("stages", "radii", "kl") if isinstance(attack.space, Latent) else tuple(PIXEL_OPTIONS)
    if isinstance(attack.space, Tokens):
        inside = ("stages", "tries", "language")
    for key, value in options.items():
        if key in own:
            attack = replace(attack, **{key: value})
        elif key in inside:
            changed = {PIXEL_OPTIONS.get(key, key): value}
            attack = replace(attack, space=replace(attack.space, **changed))  # type: ignore[type-var]
        elif key in moving:
            attack = replace(attack, descents=_moved(attack.descents, key, value))
        elif key == "tv":
            others = tuple(p for p in attack.priors if not isinstance(p, TotalVariation))
            before = [p for p in attack.priors if isinstance(p, TotalVariation)]
            term = replace(before[0], weight=value) if before else TotalVariation(value)
            attack = replace(attack, priors=(term, *others))
        else:
            raise ConfigError(unknown_name(f"option of attack '{name}'", key, (*own, *moving, *inside, "tv")))
    return attack


def known_of(simulation: Simulation) -> dict[str, Any]:
    """Return what an attacker sets who knows how the run protects its clients: the defence, and user-level privacy."""
    found = dict(build_defence(simulation.defence).known(simulation.local))
    privacy = simulation.privacy
    if privacy.mode == "local":
        found = {"imitation": "clip", "update_noise": privacy.noise * privacy.clip, **found}
    elif privacy.mode == "central" and view_of(simulation) == RELEASED:
        # The deviation of a mean over the cohort, where nobody drops out and the clip norm stays.
        found = {"update_noise": privacy.noise * privacy.clip / simulation.federation.wanted, **found}
    return found


def useful(name: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the options ``known`` that make a difference to the attack of that name, as it is published."""
    if name in GENERATIVE:
        blind, joint, inside = GENERATIVE[name] in SCALE_FREE, False, frozenset[str]()
    else:
        attack = ATTACKS.get(name)(None)
        if not isinstance(attack, Inversion):
            return {}
        blind, joint = attack.objective in SCALE_FREE, attack.joint
        inside = frozenset() if isinstance(attack.space, Tokens) else frozenset(PIXEL_OPTIONS)
    return {
        key: value
        for key, value in known.items()
        if not (value == "clip" and blind)
        and not (key == "joint" and joint)
        and (key in inside or key not in PIXEL_OPTIONS)
        and (key not in ("floor", "update_noise") or name in STAGED)
    }


def _moved(descents: tuple[Descent, ...], key: str, value: Any) -> tuple[Descent, ...]:
    """Return the descents with a setting replaced: one value for all stages, or a list with one for each."""
    if not isinstance(value, list):
        return tuple(replace(descent, **{key: value}) for descent in descents)
    longer = [descents[min(place, len(descents) - 1)] for place in range(max(len(value), len(descents)))]
    values = [value[min(place, len(value) - 1)] for place in range(len(longer))]
    return tuple(replace(d, **{key: one}) for d, one in zip(longer, values, strict=True))


def attack_run(
    directory: str | Path,
    name: str = "ig",
    options: Mapping[str, Any] | None = None,
    *,
    clients: Collection[int] | None = None,
    rounds: Collection[int] | None = None,
    grant: Collection[str] = (),
    adaptive: bool = False,
    normalisation: str = "eval",
    device: str = "auto",
    lpips: Collection[Path] = (),
    watch: Watch | None = None,
) -> Attacked:
    """Attack the observations of a run and score what was found.

    ``name`` and ``options`` are those of ``composed``; the option ``prior`` names the file of a generator. An
    ``adaptive`` attacker knows the run's defence and repeats it on its candidates as far as it can; an oblivious one
    does not. ``lpips``: the two files of ``perceptual.lpips``. Raises ``ConfigError`` where nothing was observed, an
    attack is not possible, or data is neither images nor text.
    """
    directory = Path(directory)
    simulation = run_directory.load_simulation(directory)
    chosen = [
        observation
        for stem in stems(directory / OBSERVATIONS)
        if _wanted(observation := Observation.load(stem), clients, rounds)
    ]
    require(
        bool(chosen),
        f"{directory} holds no observation of these clients and rounds; run it with observe.rounds=[1].",
    )
    for granted in grant:
        require(granted in GRANTS, unknown_name("grant", granted, GRANTS))
    parts, where = build_parts(simulation), choose_device(device)
    text = parts.dataset.task == "next-token"
    require(
        text or len(parts.dataset.input_shape) == 3,
        f"Reconstructions of '{parts.dataset.name}' cannot be scored: its inputs are neither images nor text.",
    )
    scale = Scale(parts.dataset.mean, parts.dataset.std)
    side = SideInfo(
        local=simulation.local,
        rounds=simulation.federation.rounds,
        scale=scale,
        normalisation=normalisation,
        surrogate=_surrogate(parts.dataset) if "surrogate" in grant else None,
    )
    asked = dict(options or {})
    prior = None
    if (path := asked.pop("prior", None)) is not None:
        prior = Prior.load(path, parts.dataset.input_shape, parts.dataset.num_classes, scale, where)
    known = useful(name, known_of(parts.simulation)) if adaptive else {}
    attack = composed(name, {**known, **asked}, prior)
    require(
        text == (name in TEXT),
        f"The attack '{name}' is for {'text' if name in TEXT else 'images'}, and '{parts.dataset.name}' is not; "
        f"for text there are {', '.join(sorted(TEXT))}.",
    )
    truths = [
        truth_of_all(parts, o.members, o.round) if o.members else truth_of(parts, o.client, o.round)
        for o in chosen
    ]
    sides = [replace(side, labels=truth.y) if "labels" in grant else side for truth in truths]
    found = attack.run(list(zip(chosen, sides, strict=True)), seed=simulation.seed, device=where, watch=watch)
    pool = None if text else pool_of(parts)
    distances = perceptual.distances(lpips)
    victims: list[Victim] = []
    references: dict[str, list[float]] = {}
    for observation, truth, made in zip(chosen, truths, found, strict=True):
        if pool is None:
            marks = text_scoring.score(made, truth)
            nulls = text_scoring.nulls(truth, parts.dataset.train.inputs, simulation.seed)
        else:
            marks = scoring.score(made, truth, scale, pool, observation.module(), distances)
            nulls = scoring.nulls(truth, scale, pool, simulation.seed)
        victims.append(Victim(observation, truth, made, marks))
        for null, values in nulls.items():
            references.setdefault(null, []).extend(values)
    return Attacked(
        attack,
        directory,
        victims,
        scale,
        references,
        simulation.seed,
        tuple(grant),
        parts.simulation.defence,
        adaptive,
        parts.dataset.classes if text else (),
    )


def _wanted(
    observation: Observation, clients: Collection[int] | None, rounds: Collection[int] | None
) -> bool:
    # Of a cohort no single client can be chosen.
    chosen = clients is None or bool(observation.members) or observation.client in clients
    return chosen and (rounds is None or observation.round in rounds)


def _surrogate(dataset: Dataset, most: int = 256) -> Tensor:
    return dataset.prepare(dataset.test.inputs[:most])


def pool_of(parts: Parts) -> scoring.Pool:
    """Return all training images as pixels."""
    data = parts.dataset
    scale = Scale(data.mean, data.std)
    pixels = torch.cat([scale.pixels(data.prepare(part)) for part in torch.split(data.train.inputs, 4096)])
    return scoring.Pool(pixels, data.train.labels, torch.arange(len(data.train)))
