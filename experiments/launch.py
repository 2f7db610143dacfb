"""The commands that run something: ``simulate`` on Hydra, and ``resume``."""

from __future__ import annotations

import contextlib
import json
import math
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from flowerbed.errors import ConfigError, FlowerbedError
from flowerbed.experiments import report
from flowerbed.experiments.composition import checked, compose_resumed, compose_simulations, parse
from flowerbed.experiments.config import Simulation
from flowerbed.experiments.failure import FAILED, INTERRUPTED, describe, exit_code
from flowerbed.experiments.hydra_schema import NAMED
from flowerbed.experiments.progress import Lines, wants_live
from flowerbed.experiments.simulation import run_simulation
from flowerbed.experiments.usage import simulate_help


def simulate(arguments: Sequence[str], as_json: bool = False) -> int:
    """Run what the Hydra command line ``arguments`` asks for; return the exit code.

    With ``attack=NAME`` (and ``attack.KEY=VALUE``) among them, the clients of the run are attacked once it is over.
    """
    attack = [text for text in arguments if text.startswith(("attack=", "attack."))]
    if attack:
        return _attacked([text for text in arguments if text not in attack], attack, as_json)
    parser = get_args_parser()
    parser.prog = "flowerbed simulate"
    flags = parser.parse_args(list(arguments))
    if flags.help:
        print(simulate_help(_choices(flags.overrides)))
        return 0
    if flags.hydra_help or flags.info or flags.shell_completion:
        _hand_over(arguments, _nothing)
        return 0
    simulations = compose_simulations(
        flags.overrides,
        config_dir=flags.config_dir,
        config_name=flags.config_name or "config",
        sweep=flags.multirun,
    )
    if flags.cfg:
        _hand_over(arguments, _nothing)
        return 0
    if flags.multirun:
        return _sweep(arguments, simulations, as_json)
    directory = _directory(simulations[0])
    codes: list[int] = []

    def job(config: DictConfig) -> float:
        codes.append(_run(checked(config), directory, as_json))
        return math.nan

    try:
        _hand_over([*arguments, _override("hydra.run.dir", directory)], job)
    finally:
        _remove_if_empty(directory)
    return codes[0]


def _attacked(arguments: Sequence[str], attack: Sequence[str], as_json: bool) -> int:
    """Run, observed in its first round unless other rounds are asked for, and attack what was observed."""
    from flowerbed.experiments.leakage import command
    from flowerbed.strategies.attacks.presets import TAMPERINGS

    # A name or an option that does not exist shall not cost a run.
    command.check(attack)
    asked = [text.partition("=")[0] for text in arguments]
    further = [] if "observe.rounds" in asked else ["observe.rounds=[1]"]
    tampering = TAMPERINGS.get(command.read(attack)[0])
    if tampering is not None and "tampering" not in asked:
        further.append(f"tampering={tampering}")
    # In front of all settings, so that tampering.KEY=VALUE finds what it sets; flags may stand before them.
    first = next((i for i, text in enumerate(arguments) if "=" in text and text[0] != "-"), len(arguments))
    arguments = [*arguments[:first], *further, *arguments[first:]]
    flags = get_args_parser().parse_args(list(arguments))
    if flags.multirun:
        raise ConfigError(
            "attack= follows a single run; attack a sweep with flowerbed attack matrix=FILE.yaml."
        )
    (simulation,) = compose_simulations(
        flags.overrides, config_dir=flags.config_dir, config_name=flags.config_name or "config"
    )
    directory = _directory(simulation)
    code = simulate([*arguments, _override("run.dir", directory)], as_json)
    return code or command.main([str(directory), *attack], as_json)


def resume(directory: Path, overrides: Sequence[str], as_json: bool = False) -> int:
    """Go on with the run in ``directory``; return the exit code."""
    return _run(compose_resumed(directory, overrides), directory, as_json, resume=True)


def _sweep(arguments: Sequence[str], simulations: Sequence[Simulation], as_json: bool) -> int:
    directories = {simulation.run.dir for simulation in simulations}
    if len(directories) > 1:
        raise ConfigError("run.dir names the folder of the whole sweep; give it one value.")
    folder = _directory(simulations[0], sweep=True)
    (folder / report.JOBS).unlink(missing_ok=True)

    def job(config: DictConfig) -> float:
        return _sweep_job(config, folder, as_json)

    interrupted = False
    try:
        _hand_over([*arguments, _override("hydra.sweep.dir", folder)], job)
    except KeyboardInterrupt:
        interrupted = True
    jobs = report.read_jobs(folder)
    print(json.dumps([asdict(j) for j in jobs]) if as_json else f"\n{report.jobs_table(jobs)}")
    if interrupted:
        return INTERRUPTED
    return 0 if jobs and all(j.status in report.GOOD for j in jobs) else FAILED


def _sweep_job(config: DictConfig, folder: Path, as_json: bool) -> float:
    """Run one job of a sweep, in whatever process Hydra's launcher put it; its failure is in the table.

    Returns the final accuracy (NaN without one), which is what an optimising sweeper maximises.
    """
    state = HydraConfig.get()
    directory = _relative(Path(state.runtime.output_dir))
    overrides = [str(text) for text in state.overrides.task if not text.startswith("run.dir=")]
    if not as_json:
        print(f"\njob {state.job.num}: {' '.join(overrides)}", flush=True)
    reason: str | None = None
    try:
        run_simulation(_at(checked(config), directory), callbacks=_lines(config.run.progress, as_json))
    except KeyboardInterrupt:
        reason = "interrupted"
        raise
    except FlowerbedError as error:
        reason = str(error)
        print(describe(error), file=sys.stderr)
    except Exception as error:  # noqa: BLE001 - the next job of a sweep may work
        reason = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    finally:
        done = report.Job.of(state.job.num, overrides, directory, reason)
        report.write_job(folder, done)
    return math.nan if done.accuracy is None or reason else done.accuracy


def _run(simulation: Simulation, directory: Path, as_json: bool, resume: bool = False) -> int:
    """Run one simulation in ``directory`` and say how it ended; returns the exit code."""
    if not as_json:
        print(f"{'resuming' if resume else 'running'} in {directory}", flush=True)
    failure: BaseException | None = None
    before = _stamp(directory)
    try:
        callbacks = _lines(simulation.run.progress, as_json)
        run_simulation(_at(simulation, directory), callbacks=callbacks, resume=resume)
    except FlowerbedError as error:
        failure = error
        print(describe(error), file=sys.stderr)
    except KeyboardInterrupt as error:
        failure = error
    except Exception as error:  # noqa: BLE001 - shown whole, then counted as failed
        failure = error
        traceback.print_exc()
    if _stamp(directory) != before:
        summary = report.read_summary(directory)
        if as_json:
            print(json.dumps({"directory": str(directory), **summary}))
        else:
            print(report.ending(directory, summary))
    return exit_code(failure) if failure is not None else 0


def _stamp(directory: Path) -> int:
    """Return when the summary was written: a run that was refused has left another run's alone."""
    path = directory / "summary.json"
    return path.stat().st_mtime_ns if path.exists() else 0


def _lines(progress: bool | None, as_json: bool) -> tuple[Lines, ...]:
    silent = as_json or progress is False or wants_live(progress)
    return () if silent else (Lines(lambda text: print(text, flush=True)),)


def _at(simulation: Simulation, directory: Path) -> Simulation:
    plain = simulation.plain()
    return Simulation.of({**plain, "run": {**plain["run"], "dir": str(directory)}})


def _directory(simulation: Simulation, sweep: bool = False) -> Path:
    """Return the folder for this command, made now so that two commands never share a default one."""
    if simulation.run.dir is not None:
        directory = Path(simulation.run.dir)
        directory.mkdir(parents=True, exist_ok=True)
        return directory
    now = datetime.now()
    options = simulation.strategy.options
    strategy = (
        options.get("flower", "flower") if simulation.strategy.name == "flower" else simulation.strategy.name
    )
    names = [re.sub(r"[^\w.]+", "-", name).strip("-.") for name in (strategy, simulation.dataset.name)]
    if sweep:
        base = Path("multirun") / f"{now:%Y-%m-%d}" / f"{now:%H-%M-%S}"
    else:
        base = Path("runs") / f"{now:%Y-%m-%d}" / f"{now:%H-%M-%S}-{'-'.join(names)}"
    base.parent.mkdir(parents=True, exist_ok=True)
    for number in range(1, 1000):
        directory = base if number == 1 else base.with_name(f"{base.name}-{number}")
        try:
            directory.mkdir()
            return directory
        except FileExistsError:
            continue
    raise ConfigError(f"{base} and its next 999 names are taken; give run.dir.")


def _remove_if_empty(directory: Path) -> None:
    with contextlib.suppress(OSError):
        directory.rmdir()


def _relative(path: Path) -> Path:
    """Return the path as a person would type it from here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _override(key: str, path: Path) -> str:
    quoted = str(path).replace("\\", "\\\\").replace("'", "\\'")
    return f"{key}='{quoted}'"


def _choices(overrides: Sequence[str]) -> Mapping[str, str]:
    """Return what group overrides choose, for the help."""
    kinds = ("strategy", "dataset", "partition", "model", *NAMED)
    return {o.key_or_group: str(o.value()) for o in parse(overrides) if o.key_or_group in kinds}


def _nothing(config: DictConfig) -> None:
    """Stand for the job where Hydra only prints."""


def _hand_over(arguments: Sequence[str], job: Any) -> None:
    """Let Hydra run ``job`` as its main function on these arguments."""
    with _argv(["flowerbed simulate", *arguments]):
        hydra.main(version_base="1.3", config_path="conf", config_name="config")(job)()


@contextlib.contextmanager
def _argv(arguments: Sequence[str]) -> Iterator[None]:
    before = sys.argv
    sys.argv = list(arguments)
    try:
        yield
    finally:
        sys.argv = before
