"""From command-line overrides to a checked ``Simulation``: composed by Hydra, explained by us.

Hydra's own errors say neither which keys exist nor which is near, and come after a sweep's first jobs. So
every command is composed here once before Hydra runs it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import BooleanNode, DictConfig, FloatNode, IntegerNode, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from flowerbed.errors import ConfigError, unknown_name
from flowerbed.experiments import hydra_schema
from flowerbed.experiments.config import CHOICES, Simulation
from flowerbed.experiments.options import registry
from flowerbed.experiments.parts import build_strategy
from flowerbed.experiments.run_directory import load_simulation

CONF = "flowerbed.experiments.conf"
WANTED = {IntegerNode: "a whole number", FloatNode: "a number", BooleanNode: "true or false"}


def compose_simulations(
    overrides: Sequence[str],
    *,
    config_dir: str | None = None,
    config_name: str = "config",
    sweep: bool = False,
) -> list[Simulation]:
    """Compose and check what the overrides ask for; raises ``ConfigError`` with one clear message.

    Of a sweep, every value of every override is composed at least once, though not every combination.
    """
    parsed = parse(overrides)
    for override in parsed:
        if override.is_sweep_override() and not sweep:
            raise ConfigError(
                f"'{override.input_line}' gives several values. To run each of them add --multirun (-m); "
                f"a list is written {override.key_or_group}=[a,b]."
            )
        if override.is_delete() and not override.key_or_group.startswith("hydra"):
            raise ConfigError(f"'{override.input_line}': a setting cannot be taken away; give it a value.")
    import_from_current_directory()
    hydra_schema.register(_chosen(parsed))
    search = [f"hydra.searchpath=[file://{Path(config_dir).absolute()}]"] if config_dir else []
    if config_dir and not Path(config_dir).is_dir():
        raise ConfigError(f"--config-dir {config_dir} is no folder.")
    simulations = []
    with initialize_config_module(CONF, version_base="1.3"):
        for job in one_value_each(parsed):
            config = _compose(config_name, [*search, *job])
            simulations.append(checked(config))
    return simulations


def compose_resumed(directory: str | Path, overrides: Sequence[str]) -> Simulation:
    """Return the stored configuration of a run with some settings changed, checked like a new one."""
    stored = load_simulation(directory).plain()
    config = OmegaConf.merge(OmegaConf.structured(hydra_schema.root_schema()), stored)
    OmegaConf.set_struct(config, True)
    for override in parse(overrides):
        if override.is_sweep_override() or override.package or override.is_delete():
            raise ConfigError(f"'{override.input_line}' cannot be used with resume; write key=value.")
        key, value = override.key_or_group, override.value()
        if key in (*hydra_schema.NAMED, *CHOICES) and isinstance(value, str):
            key = f"{key}.name"
        try:
            OmegaConf.update(config, key, value)
        except OmegaConfBaseException as error:
            raise ConfigError(_explained(error, override.input_line or key)) from error
    assert isinstance(config, DictConfig)
    return checked(config)


def parse(overrides: Sequence[str]) -> list[Override]:
    """Parse overrides in Hydra's grammar."""
    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except OverrideParseException as error:
        raise ConfigError(
            f"'{error.override}' is no setting; write key=value, for example seed=1."
        ) from error


def whole_numbers(text: str, option: str) -> list[int]:
    """Return the numbers of a list such as 0,1,2; raises ``ConfigError`` naming the option."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(
            f"{option}: '{text}' is no list of whole numbers; give for example 0,1,2."
        ) from error


def one_value_each(parsed: Sequence[Override]) -> Iterator[list[str]]:
    """Yield override lists without sweeps: the first values together, then each further value alone."""
    choices: list[list[str]] = []
    for override in parsed:
        if not override.is_sweep_override():
            choices.append([str(override.input_line)])
        elif elements := _elements(override):
            choices.append(elements)
    first = [values[0] for values in choices]
    yield first
    for position, values in enumerate(choices):
        for value in values[1:]:
            yield [*first[:position], value, *first[position + 1 :]]


def checked(config: DictConfig) -> Simulation:
    """Return the simulation of a composed configuration, its strategy's parameters checked as well."""
    try:
        settings = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key} must be given: {error.full_key}=VALUE.") from error
    except OmegaConfBaseException as error:
        raise ConfigError(_first_line(error)) from error
    assert isinstance(settings, dict)
    simulation = Simulation.of({str(key): value for key, value in settings.items() if key != "hydra"})
    build_strategy(simulation.strategy)
    for kind in ("dataset", "partition", "encoder"):
        choice = getattr(simulation, kind)
        if choice.name in registry(kind):
            # These are dataclasses that check their own values, long before any data is read.
            registry(kind).get(choice.name)(**choice.options)
    return simulation


def import_from_current_directory() -> None:
    """Let import paths name the user's own modules in the current directory.

    At the end of the path: a folder there must not hide an installed package of the same name.
    """
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)


def _compose(config_name: str, overrides: list[str]) -> DictConfig:
    try:
        return compose(config_name, overrides=overrides)
    except MissingConfigException as error:
        raise ConfigError(_unknown_option(error)) from error
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explained(error, "")) from error


def _chosen(parsed: Sequence[Override]) -> dict[str, list[str]]:
    """Return the names asked for by kind that no registry lists but that can be looked up."""
    chosen: dict[str, list[str]] = {kind: [] for kind in CHOICES}
    for override in parsed:
        kind = override.key_or_group
        if kind not in CHOICES:
            continue
        names = [value for value in _values(override) if isinstance(value, str)]
        chosen[kind] += [name for name in names if ":" in name or name in registry(kind).names()]
    return chosen


def _values(override: Override) -> list[Any]:
    """Return the value of an override, or each of a sweep, without the grammar's quotes and escapes."""
    if not override.is_sweep_override():
        return [override.value()]
    return [element.value() for text in _elements(override) for element in parse([text])]


def _elements(override: Override) -> list[str]:
    """Return an override for each value of a sweep; [] where only its sweeper knows the values.

    That is an interval, from which a sweeper draws, or a glob on names, all of which exist.
    """
    if not override.is_discrete_sweep() or override.value_type is ValueType.GLOB_CHOICE_SWEEP:
        return []
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def _unknown_option(error: MissingConfigException) -> str:
    group, _, name = (error.missing_cfg_file or "").partition("/")
    if group == "hydra":
        group, _, name = (error.missing_cfg_file or "").rpartition("/")
    if not name:
        return f"There is no configuration '{error.missing_cfg_file}'; see --config-dir and --config-name."
    known = set(error.options or ())
    if group in CHOICES:
        known |= set(registry(group).names())
    text = unknown_name(group, name, known)
    if group in CHOICES:
        text += f" Your own {group} is named by import path, {group}=package.module:Name."
    return text


def _explained(error: BaseException, where: str) -> str:
    """Return one message for what Hydra and OmegaConf say in two exceptions and several lines."""
    # What is wrong inside a configuration file reaches us as context only.
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__ or error.__context__
    if not isinstance(cause, OmegaConfBaseException):
        return _first_line(error)
    if str(error).startswith("In '"):
        return f"{_first_line(error).split(':')[0]}: {_explained(cause, where)}"
    key = str(cause.full_key or cause.key)
    section = key.rpartition(".")[0]
    if isinstance(cause, ConfigKeyError | ConfigAttributeError) and isinstance(cause.parent_node, DictConfig):
        known = [str(name) for name in cause.parent_node if name != "hydra"]
        return unknown_name(f"key in {section}" if section else "setting", str(cause.key), known)
    if isinstance(cause, ValidationError):
        wanted = WANTED.get(type(cause.child_node))
        if wanted is not None:
            return f"{key} must be {wanted}, got {cause.value!r}."
        if isinstance(cause.child_node, DictConfig):
            keys = ", ".join(str(name) for name in cause.child_node)
            return f"'{key}' holds several settings, got {cause.value!r}; set them one by one: {keys}."
    return f"{where or key}: {_first_line(cause)}."


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]
