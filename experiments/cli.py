"""The ``flowerbed`` command. Importing this module is cheap; what a command needs it imports itself."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from flowerbed import __version__
from flowerbed.errors import ConfigError, FlowerbedError, unknown_name

EPILOG = """\
examples:
  flowerbed simulate                                train on scikit-learn's digits, in this process
  flowerbed simulate --help                         every group and key, with defaults
  flowerbed simulate dataset=cifar10 partition=dirichlet partition.alpha=0.3 \\
      model=resnet8 model.norm=gn federation.clients=100 federation.cohort=10 \\
      grid=ray grid.workers=4 run.dir=runs/cifar    100 clients on four Ray actors
  flowerbed simulate -m seed=0,1,2                  a sweep
  flowerbed resume runs/cifar federation.rounds=80  go on after the newest checkpoint
  flowerbed show runs/cifar                         what came out
  flowerbed diff runs/a runs/b                      which settings and results differ
  flowerbed watch                                   follow all of them in the browser, on this machine
  flowerbed list models 'resnet*'                   what there is to choose
  flowerbed compare strategy=fedavg,fedprox seeds=0,1,2    mean, interval, rank and paired tests
  flowerbed explain grid.engine=auto model=mlp      which exchange, engine and kernel would be used, and why
  flowerbed check my_package:MyStrategy             does my own strategy keep the contract
  flowerbed reproduce ps-kd                         a paper: its arms, seeds, claims and verdicts
  flowerbed attack runs/watched attack=ig           what single clients gave away, see flowerbed attack --help
  flowerbed deploy init fed --address HOST          a federation of real devices, see flowerbed deploy --help
  flowerbed papers                                  every paper, and what its record says
  flowerbed export runs/cifar --format onnx         the trained model for other programs, with a model card
  flowerbed report runs/cifar                       one HTML file to look at, also for sweeps, attacks and papers

FLOWERBED_DATA names a folder with data sets, FLOWERBED_TRACEBACK=1 shows where an error comes from.
Exit codes: 0 success, 1 a run failed, 2 it could not start as asked, 130 interrupted.
"""
LISTS = ("models", "strategies", "datasets", "partitions", "encoders", "defences", "tamperings")
BENCHMARKS = ("overhead", "speed", "scale", "attack", "fleet", "deployment")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (by default the process's); return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if argv is None and "_ARGCOMPLETE" in os.environ:
        from flowerbed.experiments.completion import answer

        answer(_parser())
    as_json = "--json" in arguments
    # Wherever it stands: argparse would take no pattern after it, and Hydra does not know it.
    arguments = [text for text in arguments if text != "--json"]
    try:
        # What follows these is Hydra's grammar, or the command's own.
        if arguments[:1] == ["simulate"]:
            from flowerbed.experiments.launch import simulate

            return simulate(arguments[1:], as_json)
        if arguments[:1] == ["bench"]:
            return _bench(arguments[1:], as_json)
        if arguments[:1] == ["compare"]:
            from flowerbed.experiments.compare_command import compare

            return compare(arguments[1:], as_json)
        if arguments[:1] == ["explain"]:
            from flowerbed.experiments.explain import explain

            return explain(arguments[1:], as_json)
        if arguments[:1] == ["check"]:
            from flowerbed.experiments.check import check

            return check(arguments[1:], as_json)
        if arguments[:1] == ["reproduce"]:
            from flowerbed.experiments.reproduction import command

            return command.main(arguments[1:], as_json)
        if arguments[:1] == ["attack"]:
            from flowerbed.experiments.leakage import command as attack

            return attack.main(arguments[1:], as_json)
        if arguments[:1] == ["deploy"]:
            from flowerbed.experiments.deploy import command as deploy

            return deploy.main(arguments[1:], as_json)
        if arguments[:1] == ["papers"]:
            from flowerbed.experiments.reproduction import papers_command

            return papers_command.main(arguments[1:], as_json)
        if arguments[:1] == ["diff"]:
            from flowerbed.experiments import diff

            return diff.main(arguments[1:], as_json)
        if arguments[:1] == ["completion"]:
            from flowerbed.experiments import completion

            return completion.main(arguments[1:], as_json)
        if arguments[:1] == ["sync"]:
            from flowerbed.experiments import sync

            return sync.main(arguments[1:], as_json)
        if arguments[:1] == ["watch"]:
            from flowerbed.experiments.watch import command as watch

            return watch.main(arguments[1:], as_json)
        if arguments[:1] == ["report"]:
            from flowerbed.experiments.reports import command as report

            return report.main(arguments[1:], as_json)
        return _dispatch(_parser().parse_args(arguments), as_json)
    except FlowerbedError as error:
        from flowerbed.experiments.failure import describe, exit_code

        print(describe(error), file=sys.stderr)
        return exit_code(error)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader (head, less) has seen enough; without this Python complains once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flowerbed",
        description="Federated-learning simulation.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"flowerbed {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands.add_parser(
        "simulate", add_help=False, help="run a federation, or a sweep of them: simulate [KEY=VALUE ...] [-m]"
    )
    resume = commands.add_parser("resume", help="go on with a run after its newest checkpoint")
    resume.add_argument("directory", type=Path, metavar="DIR")
    resume.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="what changes, e.g. federation.rounds=80"
    )
    listing = commands.add_parser(
        "list", help="list models, strategies, datasets, partitions, encoders, defences or tamperings"
    )
    listing.add_argument("kind", choices=LISTS)
    listing.add_argument(
        "pattern", nargs="?", default="*", help="glob on the names, e.g. 'resnet*' or 'timm:*'"
    )
    show = commands.add_parser("show", help="show one screen about a run, a sweep, or other results")
    show.add_argument("directory", type=Path, metavar="DIR")
    export = commands.add_parser("export", help="write a run's global model for other programs, with a card")
    export.add_argument("directory", type=Path, metavar="RUN")
    export.add_argument(
        "--format",
        default="safetensors",
        metavar="NAME[,NAME]",
        help="safetensors (weights), pt2 (torch.export), torchscript, onnx (default: %(default)s)",
    )
    export.add_argument("--out", type=Path, metavar="DIR", help="where the files go (RUN/export)")
    export.add_argument("--compact", action="store_true", help="take out the channels that are exactly zero")
    commands.add_parser(
        "diff", add_help=False, help="say which settings and results of two runs or sweeps differ: diff A B"
    )
    commands.add_parser(
        "compare",
        add_help=False,
        help="run methods x seeds and compare them: compare strategy=A,B seeds=0,1,2",
    )
    commands.add_parser(
        "explain",
        add_help=False,
        help="say how a run would be computed, and why: explain [KEY=VALUE ...]",
    )
    commands.add_parser(
        "check", add_help=False, help="check a strategy against the platform's contract: check STRATEGY"
    )
    commands.add_parser(
        "reproduce",
        add_help=False,
        help="run a paper's arms and judge its claims: reproduce SLUG [KEY=VALUE ...]",
    )
    commands.add_parser(
        "attack",
        add_help=False,
        help="attack what a run's server saw of single clients: attack RUN [KEY=VALUE ...]",
    )
    commands.add_parser(
        "deploy",
        add_help=False,
        help="run a federation on real devices: deploy init|server|register|node|run|status ... DIR",
    )
    commands.add_parser("papers", add_help=False, help="show how the reproduction of every paper stands")
    commands.add_parser(
        "watch", add_help=False, help="follow runs in a page on this machine: watch [DIR ...]"
    )
    commands.add_parser("sync", add_help=False, help="send what was tracked offline to wandb: sync DIR ...")
    commands.add_parser(
        "completion", add_help=False, help="teach a shell to complete flowerbed: completion bash|zsh|fish"
    )
    commands.add_parser(
        "report",
        add_help=False,
        help="write runs, sweeps, attacks or papers as one HTML file: report DIR ...",
    )
    commands.add_parser(
        "bench",
        add_help=False,
        help="run a benchmark: bench overhead|speed|scale|attack|fleet|deployment [--help]",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text, with any command")
    return parser


def _dispatch(asked: argparse.Namespace, as_json: bool) -> int:
    if asked.command == "resume":
        from flowerbed.experiments.launch import resume

        return resume(asked.directory, asked.overrides, as_json)
    if asked.command == "list":
        return _list(asked.kind, asked.pattern, as_json)
    if asked.command == "export":
        return _export(asked.directory, asked.format.split(","), asked.out, asked.compact, as_json)
    return _show(asked.directory, as_json)


def _list(plural: str, pattern: str, as_json: bool) -> int:
    from flowerbed.experiments import listing

    kind = listing.PLURALS[plural]
    found = listing.things(kind, pattern)
    print(json.dumps(listing.plain(found), indent=1) if as_json else listing.text(kind, found))
    return 0


def _export(run: Path, formats: Sequence[str], out: Path | None, compact: bool, as_json: bool) -> int:
    from flowerbed.experiments import export
    from flowerbed.experiments.composition import import_from_current_directory

    import_from_current_directory()
    made = export.export_run(run, formats, out, compact=compact)
    if as_json:
        print(json.dumps(export.as_json(made)))
        return 0
    for name, difference in made.differences.items():
        print(f"{name}: differs from the model by {difference:.2g} at most, on {export.CHECKED} test samples")
    print(f"files: {', '.join(map(str, made.files))}")
    return 0


def _show(directory: Path, as_json: bool) -> int:
    from dataclasses import asdict

    from flowerbed.experiments import report, saved
    from flowerbed.experiments.text import table

    names = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
    kind = saved.kind_of(names)
    if kind in saved.RESULT_FILES:
        content = saved.read_object(directory / saved.RESULT_FILES[kind])
        print(json.dumps(content, indent=1) if as_json else saved.screen(kind, directory, content))
    elif kind == saved.SWEEP:
        jobs = report.read_jobs(directory)
        print(json.dumps([asdict(job) for job in jobs], indent=1) if as_json else report.jobs_table(jobs))
    elif kind is None and (found := saved.overview(directory)):
        print(json.dumps(found) if as_json else table([("kind", "name", "what"), *found], header=True))
    else:
        summary = report.read_summary(directory)
        print(json.dumps(summary, indent=1) if as_json else report.screen(directory, summary))
    return 0


def _bench(arguments: list[str], as_json: bool) -> int:
    import importlib

    name = arguments[0] if arguments else ""
    if name not in BENCHMARKS:
        raise ConfigError(f"{unknown_name('benchmark', name, BENCHMARKS)} Use: flowerbed bench NAME [--help]")
    benchmark = importlib.import_module(f"flowerbed.experiments.benchmarks.{name}")
    return int(benchmark.main([*arguments[1:], *(["--json"] if as_json else [])]) or 0)


if __name__ == "__main__":
    sys.exit(main())
