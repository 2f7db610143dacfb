"""The model card of an exported model: what it is, what it was made from and what the run measured, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from flowerbed import __version__
from flowerbed.datasets.dataset import Dataset
from flowerbed.experiments.options import thing
from flowerbed.experiments.parts import Parts

MOST_CLASSES = 100
"""More classes than this are not listed."""
USE = {
    "model.safetensors": """\
from safetensors.torch import load_file
state = load_file("model.safetensors")
""",
    "model.pt2": """\
import torch
model = torch.export.load("model.pt2").module()
""",
    "model.ts": """\
import torch
model = torch.jit.load("model.ts")
""",
    "model.onnx": """\
import onnxruntime
model = onnxruntime.InferenceSession("model.onnx")
""",
}
"""How each file is loaded, without flowerbed."""

PLACES = (("data", ("dir", "cache")), ("run", ("dir",)), ("grid", ("address",)), ("initial", ("weights",)))
RESULTS = "As the run stored them, on the test split of its data. *final* is the last evaluation; no round was chosen."
LIMITS = (
    "One run with one seed, in simulation. The figures say nothing about other data, and nothing about what the "
    "weights give away of the clients' samples unless *privacy* stands above."
)
LICENCE = "None is given here. Choose one that the terms of the data allow, and say so in this section."


def facts(parts: Parts) -> dict[str, Any]:
    """Return what a program needs to use the model, as JSON values; this is config.json."""
    dataset, spec = parts.dataset, parts.spec.model
    return {
        "model": spec.name,
        "options": dict(spec.options),
        "input_shape": list(dataset.input_shape),
        "input_type": str(dataset.test.inputs.dtype).removeprefix("torch."),
        "scale": 255 if _is_image(dataset) else 1,
        "mean": list(dataset.mean),
        "std": list(dataset.std),
        "classes": list(dataset.classes),
        "task": dataset.task,
        "flowerbed": __version__,
    }


def text(parts: Parts, summary: Mapping[str, Any], trained: int, left: int, files: Sequence[str]) -> str:
    """Return the card.

    ``summary`` is the run's, which ``trained`` that many parameters; the files have those that are ``left``. ``files``
    are the names of the models beside the card.
    """
    simulation, dataset = parts.simulation, parts.dataset
    federation, local = simulation.federation, simulation.local
    strategy = thing("strategy", simulation.strategy.name)
    budget = f"{local.steps} steps" if local.steps else f"{local.epochs} epochs"
    sizes = parts.train.sizes
    title = f"{parts.spec.model.name} on {dataset.name} by {simulation.strategy.name}"
    about = (
        f"The global model of a simulated federation: {federation.clients} clients, {summary['rounds']} rounds. "
        f"Written by flowerbed {__version__}; the run ended as *{summary['status']}*."
    )
    versions = ", ".join(f"{name} {version}" for name, version in summary.get("versions", {}).items())
    made_with = f"`{summary.get('config_hash', simulation.identity)}` at commit `{summary.get('git_commit')}`"
    parts_of_card = [
        "---\nlibrary_name: pytorch\ntags:\n- federated-learning\n- flowerbed\n---",
        f"# {title}",
        about,
        "## Use",
        _input(dataset),
        *(f"`{name}`{_what(name)}:\n\n```python\n{USE[name]}```" for name in files),
        "## Data",
        _table(
            ("data set", simulation.dataset.name),
            ("samples", f"{len(dataset.train)} to train on, {len(dataset.test)} to test on"),
            ("partition", _options(simulation.partition.plain())),
            ("clients", f"{len(sizes)}, with {min(sizes)} to {max(sizes)} samples each"),
            ("encoder", "" if simulation.encoder.name == "none" else _options(simulation.encoder.plain())),
            ("classes", _classes(dataset)),
        ),
        "## Method",
        _table(
            ("strategy", f"{simulation.strategy.name}: {strategy.summary}"),
            ("model", f"{_options(simulation.model.plain())}, {trained:,} parameters"),
            (
                "taken out",
                f"channels that are exactly zero; {left:,} parameters are left" if left < trained else "",
            ),
            ("a round", f"{federation.wanted} clients, {budget} of {local.batch_size} samples"),
            ("defence", "" if simulation.defence.name == "none" else _options(simulation.defence.plain())),
            ("privacy", "" if simulation.privacy.mode == "none" else _options(simulation.plain()["privacy"])),
            ("seed", str(simulation.seed)),
        ),
        "## Results",
        RESULTS,
        _results(summary),
        _failures(summary),
        "## Limits",
        LIMITS,
        _private(parts),
        "## Configuration",
        f"{made_with}, with {versions}.",
        f"```yaml\n{yaml.safe_dump(_shared(simulation.plain()), sort_keys=False)}```",
        "## Licence",
        LICENCE,
    ]
    return "\n\n".join(part for part in parts_of_card if part) + "\n"


def _input(dataset: Dataset) -> str:
    shape = "x".join(map(str, dataset.input_shape))
    if dataset.task == "next-token":
        return f"Input: a batch of int64 token ids, `(N, L)`; output: logits `(N, L, {dataset.num_classes})`."
    kind = "uint8" if _is_image(dataset) else str(dataset.test.inputs.dtype).removeprefix("torch.")
    return (
        f"Input: a batch of {kind} samples of shape {shape}; output: logits `(N, {dataset.num_classes})` in the order "
        "of the classes. `config.json` has shapes, classes and normalisation for programs."
    )


def _private(parts: Parts) -> str:
    """Return which tensors the method keeps at its clients: in the global model they are as they were drawn."""
    info = parts.strategy.setting.info if parts.strategy.setting else None
    private = sorted(parts.strategy.half.private(info)) if info else []
    if not private:
        return ""
    return (
        f"Private to the clients, and untrained in these files: {', '.join(f'`{name}`' for name in private)}."
    )


def _what(name: str) -> str:
    if name == "model.safetensors":
        return (
            ", the weights by name (the normalisation in `config.json` is to be applied to the samples before they go "
            "into the model)"
        )
    return ", the whole computation, normalisation included"


def _is_image(dataset: Dataset) -> bool:
    return str(dataset.test.inputs.dtype) == "torch.uint8"


def _classes(dataset: Dataset) -> str:
    if len(dataset.classes) > MOST_CLASSES:
        return f"{len(dataset.classes)}"
    return ", ".join(" ".join(name.split()) or repr(name) for name in dataset.classes)


def _options(plain: Mapping[str, Any]) -> str:
    further = ", ".join(
        f"{key}={value}" for key, value in plain.items() if key != "name" and value is not None
    )
    name = str(plain.get("name", ""))
    return f"{name} ({further})" if name and further else name or further


def _table(*rows: tuple[str, str]) -> str:
    kept = [(name, value.replace("|", "\\|")) for name, value in rows if value]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in kept)])


def _results(summary: Mapping[str, Any]) -> str:
    groups = [key for key in summary if key == "final" or key.startswith("mean_of_last_")]
    names = [
        name
        for name, value in summary["final"].items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    head = [
        f"| | {' | '.join(group.replace('_', ' ') for group in groups)} |",
        "|---|" + "---:|" * len(groups),
    ]
    rows = [f"| {name} | {' | '.join(_number(summary[g].get(name)) for g in groups)} |" for name in names]
    return "\n".join([*head, *rows]) if names else "The run stored no evaluation."


def _failures(summary: Mapping[str, Any]) -> str:
    failures = summary["failures"]
    kinds = ", ".join(f"{count} {kind}" for kind, count in failures["by_kind"].items())
    return f"Client failures: {failures['total']}{f' ({kinds})' if kinds else ''}."


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _shared(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without the places of one machine."""
    kept = {key: dict(value) if isinstance(value, Mapping) else value for key, value in plain.items()}
    for section, keys in PLACES:
        for key in keys:
            kept[section].pop(key, None)
    return {key: _lists(value) for key, value in kept.items()}


def _lists(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, list | tuple) else value
