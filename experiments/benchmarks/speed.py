"""How fast client steps are: flowerbed beside a bare loop, pfl-research and Flower, in one run.

See ``workload`` for the work, ``race`` for how times are compared, ``variants`` for what of flowerbed runs. All
contestants use one thread a worker. Compared is CPU time over all processes of a contestant, system time
included; wall time is shown beside it. The first rounds are left out: this is the steady state.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from flowerbed.errors import ConfigError, require
from flowerbed.experiments.benchmarks import accounting, machine, report
from flowerbed.experiments.benchmarks.competitors import flowerbed_side, plain
from flowerbed.experiments.benchmarks.items import ITEMS, Place, on_ray, workload_settings
from flowerbed.experiments.benchmarks.race import WARM_ROUNDS, Entry, race, scratch
from flowerbed.experiments.benchmarks.report import Bar, Document
from flowerbed.experiments.benchmarks.variants import VARIANTS, Variant
from flowerbed.experiments.benchmarks.workload import MODELS, SHAPES, RaceModel, Work, prepare

BARE, AVERAGING, PFL, FLOWER = "bare", "averaging", "pfl", "Flower"
RIVALS = (BARE, AVERAGING, PFL, FLOWER)
REFERENCES = (BARE, PFL, FLOWER)
BARS = (
    Bar("linear", "cohort", "logistic regression, cohort engine", {BARE: 6, PFL: 10, FLOWER: 60}),
    Bar("mlp", "cohort", "MLP 159k, cohort engine", {BARE: 2, PFL: 3, FLOWER: 20}),
    Bar("pfl_cnn", "generic fast", "CNN 1.6M, generic engine", {BARE: 1.2, PFL: 1.1, FLOWER: 2.2}),
    Bar("pfl_cnn", "cohort", "CNN 1.6M, cohort engine float32", {BARE: 1.45, PFL: 1.35, FLOWER: 3}),
    Bar("pfl_cnn", "generic bf16", "CNN 1.6M, bfloat16, generic engine", {BARE: 1.7, PFL: 1.6, FLOWER: 3.5}),
    Bar("pfl_cnn", "cohort bf16", "CNN 1.6M, bfloat16, cohort engine", {BARE: 1.7, PFL: 1.6, FLOWER: 3.5}),
    Bar(
        "pfl_cnn", "ray messages", "CNN 1.6M, Flower messages on Ray", {BARE: 1 / 1.35, PFL: 0.8, FLOWER: 1.5}
    ),
)
GPU_BARS = (
    Bar("mlp", "cohort", "MLP 159k, cohort engine, GPU", {BARE: 10}),
    Bar("pfl_cnn", "cohort", "CNN 1.6M, cohort engine, GPU", {BARE: 10}),
)
SMOKE = Work(users=20, samples=20, cohort=3)
INSTALL_PFL = (
    "pip install --target DIR pfl, then give --pfl DIR (its pins need not fit those of this project)"
)


def method(work: Work, turns: int, source: str) -> str:
    """Return how the figures were made, for the head of the report."""
    return f"""\
{work.users:,} users with {work.samples} images each ({source}), {work.cohort} users a round, one local epoch, \
batch {work.batch}, SGD with learning rate {work.lr:g}: {work.steps} client steps a round, no evaluation. Inputs \
are float32: grey 28x28 (the mean of the colours, cropped in the middle) for the linear model, the MLP and the CNN \
of LEAF, 3x32x32 for the other two.

Each contestant is a process of its own with one thread a worker; all of them live at once and train in turns, in \
an order that rotates ({turns} turns each, after two rounds that are thrown away). CPU is the time of all processes \
of a contestant, user and system. "x" is how many times faster: the median over the turns of the ratio of the costs \
of a round, with its 95 % interval from order statistics.

- `bare`: one model, slices, `torch.optim.SGD`, the weights put back before each client; no federation.
- `averaging`: the same with the mean of the clients' models as the next one.
- `pfl`: pfl-research through its public interface. `Flower`: `run_simulation` with stock FedAvg and a lean client.
""" + "\n".join(f"- `{variant.name}`: flowerbed, {variant.note}." for variant in VARIANTS)


def entries_of(
    model: RaceModel, folder: Path, work: Work, options: argparse.Namespace
) -> tuple[list[Entry], dict[str, str]]:
    """Return who takes part on ``model``, and the others with the reason why they do not."""
    common = {"folder": str(folder), "model": model.name, "device": options.device}
    entries = [Entry(kind, {"kind": kind, **common}) for kind in (BARE, AVERAGING)]
    absent: dict[str, str] = {}
    if options.pfl is None and importlib.util.find_spec("pfl") is None:
        absent[PFL] = f"pfl is not installed; {INSTALL_PFL}"
    else:
        path = None if options.pfl is None else str(options.pfl.absolute())
        entries.append(Entry(PFL, {"kind": "pfl", **common}, path))
    if options.device == "cuda":
        absent[FLOWER] = "left out on a GPU"
    else:
        entries.append(Entry(FLOWER, {"kind": "flower", "tree": True, "workers": options.workers, **common}))
    settings = workload_settings(folder, work, model, options.device)
    for variant in VARIANTS:
        reason = variant.missing() or (
            "left out on a GPU" if variant.ray and options.device == "cuda" else ""
        )
        if reason:
            absent[variant.name] = reason
        else:
            entries.append(_entry(variant, settings, folder, model, options))
    if options.contestants:
        entries = [entry for entry in entries if entry.name in options.contestants]
        absent = {name: reason for name, reason in absent.items() if name in options.contestants}
    return entries, absent


def _entry(
    variant: Variant, settings: dict[str, Any], folder: Path, model: RaceModel, options: argparse.Namespace
) -> Entry:
    if variant.ray:
        settings = on_ray(settings, folder, options.workers, f"{variant.name}-{model.name}")
    merged = flowerbed_side.merged(settings, variant.settings)
    specification = {"kind": "flowerbed", "settings": merged, "tree": variant.ray, "device": options.device}
    return Entry(variant.name, specification)


def profiles(
    document: Document, model: RaceModel, bars: Sequence[Bar], entries: Sequence[Entry], quantity: str
) -> dict[str, str]:
    """Return where the time of those contestants goes that miss a bar on ``model``, by name.

    By Python's profiler, which makes short calls look longer than they are; contestants on Ray have none.
    """
    found = {}
    for bar in bars:
        lines = report.verdicts(document, [bar], quantity)[: len(bar.wanted)]
        if bar.model != model.name or all(line.verdict != report.MISSED for line in lines):
            continue
        for entry in entries:
            if entry.name == bar.contestant and not entry.specification.get("tree"):
                profiled = Entry(entry.name, {**entry.specification, "profile": WARM_ROUNDS}, entry.path)
                (result,) = race([profiled], turns=1, say=_say)
                found[entry.name] = str(result.facts.get("profile", result.failure))
    return found


def step_flops(model: RaceModel, batch: int) -> float:
    """Return the FLOPs of a step: matrix products and convolutions, forward and backward, a multiply-add being 2."""
    net = plain.build(model.name).to("meta")
    inputs = torch.empty(batch, *SHAPES[model.view], device="meta")
    labels = torch.zeros(batch, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(net(inputs), labels).backward()  # type: ignore[no-untyped-call]
    return float(counter.get_total_flops())


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="flowerbed bench speed", description=(__doc__ or "").split("\n")[0])
    names = [*RIVALS, *(variant.name for variant in VARIANTS)]
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument(
        "--contestants", nargs="+", choices=names, help="only these; by default all there are"
    )
    parser.add_argument(
        "--items", nargs="*", choices=list(ITEMS), default=list(ITEMS), help="further figures"
    )
    parser.add_argument("--turns", type=int, default=15, help="turns of each contestant (default 15)")
    parser.add_argument("--least", type=float, default=1.0, metavar="S", help="seconds of a turn (default 1)")
    parser.add_argument("--data", choices=("cifar10", "synthetic"), default="cifar10")
    parser.add_argument("--data-dir", help="folder with data sets; by default FLOWERBED_DATA", metavar="DIR")
    parser.add_argument("--pfl", type=Path, metavar="DIR", help=f"where pfl is: {INSTALL_PFL}")
    parser.add_argument("--workers", type=int, default=2, help="Ray actors (default 2)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on noise: does everything run?")
    parser.add_argument("--profile", action="store_true", help="add a profile of each that misses a bar")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write FILE.json and FILE.md as sections finish"
    )
    parser.add_argument(
        "--store", action="store_true", help="write docs/benchmarks/speed.json and .md instead"
    )
    parser.add_argument(
        "--keep", action="store_true", help="keep the sections there that are not measured now"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of the report")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line; the exit status is 1 if a bar is missed."""
    options = parse(argv)
    accounting.require_proc()
    require(not (options.smoke and options.store), "--smoke measures nothing that is worth a --store.")
    require(options.turns >= 1, f"--turns is {options.turns}; give at least 1.")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda needs a GPU that torch sees; there is none.")
    if options.pfl is not None and not (options.pfl / "pfl").is_dir():
        raise ConfigError(f"There is no package pfl in {options.pfl}; {INSTALL_PFL}.")
    gpu = options.device == "cuda"
    out = report.stored("speed-gpu" if gpu else "speed") if options.store else options.out
    source = "synthetic" if options.smoke else options.data
    work = SMOKE if options.smoke else Work()
    turns, least = (2, 0.0) if options.smoke else (options.turns, options.least)
    document = report.read(out) if out is not None and options.keep else {}
    # The CPU mostly waits for a GPU, so there it is the wall clock that counts.
    bars, quantity = (GPU_BARS, "wall") if gpu else (BARS, "cpu")
    text = ""

    def add(key: str, section: Document) -> None:
        nonlocal text
        document[key] = section
        lines = report.verdicts(document, bars, quantity)
        text = report.markdown("Speed", method(work, turns, source), document, lines)
        if out is not None:
            report.write(out, document, text)

    with scratch() as name:
        folder = Path(name)
        _say(f"preparing {source}")
        prepare(folder, work, source, options.data_dir)
        peak = machine.matmul_flops(options.device) if options.models else 0.0
        for model in map(MODELS.__getitem__, options.models):
            stamp = machine.stamp(options.device, None if options.pfl is None else str(options.pfl))
            entries, absent = entries_of(model, folder, work, options)
            _say(f"{model.title}: {', '.join(entry.name for entry in entries)}")
            watch = machine.watch_gpu if gpu else None
            results = race(entries, turns=turns, least=least, watch=watch, say=_say)
            section = report.model_section(
                model.title,
                stamp,
                results,
                REFERENCES,
                steps=work.steps,
                flops=step_flops(model, work.batch),
                peak=peak,
                absent=absent,
            )
            key = f"model {model.name}"
            add(key, section)
            if options.profile:
                section["profiles"] = profiles({key: section}, model, bars, entries, quantity)
                add(key, section)
        place = Place(folder, work, turns, least, options.smoke, _say)
        for key in () if gpu else options.items:
            _say(f"item {key}")
            stamp = machine.stamp(options.device)
            for item in ITEMS[key](place):
                add(f"item {item.key}", report.item_section(item, stamp))
    print(json.dumps(document, indent=1) if options.json else text)
    lines = report.verdicts(document, bars, quantity)
    return int(any(line.verdict == report.MISSED for line in lines))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
