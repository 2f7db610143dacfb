"""The command ``flowerbed check``: the house contract of strategies, run on one of them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import yaml

from flowerbed.errors import ConfigError, FlowerbedError, unknown_name
from flowerbed.experiments.composition import import_from_current_directory
from flowerbed.experiments.config import CHOICES, SECTIONS
from flowerbed.experiments.conformance import CHECKS, Case, check_ray_equals_in_process
from flowerbed.experiments.failure import FAILED, first_line
from flowerbed.experiments.parts import build_strategy

EPILOG = """\
OPTION=VALUE is an option of the strategy; SECTION.KEY=VALUE any setting of simulate, for a strategy that needs
another model, cohort or data:
  flowerbed check fedprox mu=0.1
  flowerbed check my_package.my_module:MyStrategy model.name=resnet8 model.norm=bn --skip one_client_is_central

Exit codes: 0 all passed, 1 a check failed, 2 it could not start as asked.
"""
NOT_FOR_ALL = ("one_client_is_central",)
"""Checks of what holds only without drift terms, server momentum and the like."""


@dataclass(frozen=True)
class Outcome:
    """What one check said."""

    check: str
    promise: str
    """The sentence that it checks."""
    status: str
    """passed, failed or skipped."""
    reason: str = ""


def run_checks(
    case: Case,
    checks: Sequence[Callable[[Case], None]] = CHECKS,
    skip: Sequence[str] = (),
    tell: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Run the checks one after the other, also after one has failed; ``tell`` hears of each as it ends."""
    outcomes = []
    for check in checks:
        outcomes.append(_outcome(check, case, skip))
        tell(outcomes[-1])
    return outcomes


def check(arguments: Sequence[str], as_json: bool = False) -> int:
    """Check what the command line ``arguments`` names; return the exit code."""
    asked = _parser().parse_intermixed_args(list(arguments))
    import_from_current_directory()
    case = case_of(asked.strategy, asked.settings)
    checks = (*CHECKS, check_ray_equals_in_process) if asked.ray else CHECKS
    skip = [name.removeprefix("check_") for name in asked.skip]
    known = [_name(c) for c in checks]
    for name in skip:
        if name not in known:
            raise ConfigError(unknown_name("check", name, known))
    outcomes = run_checks(case, checks, skip)
    if as_json:
        print(json.dumps({"strategy": case.strategy, "checks": [asdict(o) for o in outcomes]}))
    else:
        _show(case, outcomes)
    return FAILED if any(o.status == "failed" for o in outcomes) else 0


def case_of(strategy: str, settings: Sequence[str]) -> Case:
    """Return the case that the command line describes; raises ``ConfigError`` if it cannot be built."""
    options: dict[str, Any] = {}
    sections: dict[str, dict[str, Any]] = {}
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"'{text}' is no setting; write option=value, for example mu=0.1.")
        section, _, rest = key.partition(".")
        plain = yaml.safe_load(value)
        if section == "strategy" and rest:
            options[rest] = plain
        elif section in (*SECTIONS, *CHOICES):
            sections.setdefault(section, {})[rest or "name"] = plain
        else:
            options[key] = plain
    case = Case(strategy, options, sections)
    build_strategy(case.simulation().strategy)
    return case


def _outcome(check: Callable[[Case], None], case: Case, skip: Sequence[str]) -> Outcome:
    name, promise = _name(check), " ".join((check.__doc__ or "").split())
    if name in skip:
        return Outcome(name, promise, "skipped")
    try:
        check(case)
    except ConfigError:
        # The case cannot be run as it was asked for; that says nothing about the strategy.
        raise
    except (AssertionError, FlowerbedError) as error:
        hint = f" (some methods do not promise this: --skip {name})" if name in NOT_FOR_ALL else ""
        return Outcome(name, promise, "failed", first_line(error) + hint)
    except Exception as error:  # noqa: BLE001 - what a strategy raises is the answer
        return Outcome(name, promise, "failed", f"{type(error).__name__}: {first_line(error)}")
    return Outcome(name, promise, "passed")


def _name(check: Callable[[Case], None]) -> str:
    return check.__name__.removeprefix("check_")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flowerbed check",
        description="Check that a strategy keeps the contract of the platform.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("strategy", metavar="STRATEGY", help="a name, or package.module:Class")
    parser.add_argument("settings", nargs="*", metavar="OPTION=VALUE")
    parser.add_argument(
        "--skip", action="append", default=[], metavar="CHECK", help="leave a check out; may be repeated"
    )
    parser.add_argument("--ray", action="store_true", help="also compare with two Ray actors (half a minute)")
    parser.add_argument("--json", action="store_true", help="print the outcomes as JSON")
    return parser


def _show(case: Case, outcomes: Sequence[Outcome]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    colours: Mapping[str, str] = {"passed": "green", "failed": "red", "skipped": "yellow"}
    table = Table(title=f"strategy {escape(case.strategy)}", title_justify="left", header_style="bold")
    for name in ("check", "outcome", "promise"):
        table.add_column(name, overflow="fold")
    for o in outcomes:
        colour = colours[o.status]
        said = (
            f"{escape(o.promise)}\n[{colour}]{escape(o.reason)}[/{colour}]" if o.reason else escape(o.promise)
        )
        table.add_row(o.check, f"[{colour}]{o.status}[/{colour}]", said)
    Console().print(table)
