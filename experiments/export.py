"""``flowerbed export``: a run's global model as files that need no flowerbed, with a model card.

``safetensors`` holds the tensors of the state dict by name. The other formats hold the whole computation from samples
*as the data set stores them* (uint8 images, float32 features, int64 tokens) to logits: the scaling and normalisation
that the run trained with is inside, and the batch may be of any size. Every file is read back by its own runtime and
compared with the model on test samples before the command ends.
"""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flowerbed.datasets.dataset import Dataset
from flowerbed.errors import ConfigError, RunError, unknown_name
from flowerbed.experiments import model_card, report, run_directory
from flowerbed.experiments.parts import Parts, build_parts
from flowerbed.models.compact import compacted
from flowerbed.models.info import parameter_count
from flowerbed.storage import atomic_write

WEIGHTS = "model.safetensors"
CHECKED = 64
"""Test samples on which a file must agree with the model."""
ATOL, RTOL = 1e-4, 1e-3
"""How far it may be off: the runtimes order their sums differently."""

Predict = Callable[[Tensor], Tensor]


class Prepared(nn.Module):
    """A model behind the scaling and normalisation of its data: samples as they are stored to logits."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, dataset: Dataset) -> None:
        super().__init__()
        self.model = model
        trailing = (1,) * (len(dataset.input_shape) - 1)
        self.register_buffer("mean", torch.tensor(dataset.mean).reshape(-1, *trailing))
        self.register_buffer("std", torch.tensor(dataset.std).reshape(-1, *trailing))

    def forward(self, samples: Tensor) -> Tensor:
        """Return the logits ``(N, C)``, or ``(N, L, V)`` for tokens."""
        # The type is known when this is traced; each file is for samples of one type.
        if samples.dtype != torch.int64:
            scaled = samples.to(torch.float32)
            scaled = scaled / 255 if samples.dtype == torch.uint8 else scaled
            samples = (scaled - self.mean) / self.std
        logits: Tensor = self.model(samples)
        return logits


@dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    files: tuple[Path, ...]
    """The models in the order of the formats asked for, then config.json and README.md, the model card."""
    differences: dict[str, float]
    """Largest difference from the model's logits on test samples, by format."""


def export_run(
    run: Path, formats: Sequence[str] = ("safetensors",), out: Path | None = None, *, compact: bool = False
) -> Exported:
    """Write the global model of a run in some formats, with a model card, into ``out`` (``run``/export).

    ``compact`` takes out the channels that are exactly zero (``flowerbed.models.compact``). Raises ``ConfigError`` for
    a run without a model, an unknown format, a missing package, or a model that a format cannot hold or out of which
    no channels can be taken; ``RunError`` if a file does not compute what the model does.
    """
    for name in formats:
        if name not in FORMATS:
            raise ConfigError(unknown_name("export format", name, FORMATS))
    if not (run / WEIGHTS).exists() and (run / "config.yaml").exists():
        raise ConfigError(f"{run} has no {WEIGHTS} yet; finish the run first (flowerbed resume {run}).")
    simulation = run_directory.load_simulation(run)
    parts = build_parts(simulation)
    model = trained(parts, run / WEIGHTS)
    samples = parts.dataset.test.inputs[:CHECKED].clone()
    prepared = parts.dataset.prepare(samples)
    with torch.no_grad():
        expected = model(prepared)
    trained_parameters = parameter_count(model)
    if compact:
        model = compacted(model, prepared)
    folder = out or run / "export"
    folder.mkdir(parents=True, exist_ok=True)
    whole = Prepared(model, parts.dataset).eval()
    files, differences = [], {}
    for name in formats:
        path = folder / f"model.{FORMATS[name].suffix}"
        predict = _written(name, whole, samples, path)
        differences[name] = _difference(name, predict, samples, expected)
        files.append(path)
    facts = {
        **model_card.facts(parts),
        "parameters": parameter_count(model),
        "files": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
    }
    atomic_write(folder / "config.json", (json.dumps(facts, indent=1) + "\n").encode())
    card = model_card.text(
        parts,
        report.read_summary(run),
        trained_parameters,
        parameter_count(model),
        [path.name for path in files],
    )
    atomic_write(folder / "README.md", card.encode())
    return Exported((*files, folder / "config.json", folder / "README.md"), differences)


def trained(parts: Parts, weights: Path) -> nn.Module:
    """Return the run's model on the CPU, in evaluation mode, with its trained weights."""
    model = parts.spec.model.build(parts.spec.seed)
    try:
        model.load_state_dict(load_file(weights))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"{weights} does not hold the model that the run describes: {error}.") from error
    return model.eval()


def _written(name: str, model: Prepared, samples: Tensor, path: Path) -> Predict:
    """Write one format and return what its own runtime makes of the file."""
    try:
        with _quiet(), torch.no_grad():
            return FORMATS[name].write(model, samples, path)
    except ConfigError:
        raise
    except Exception as error:
        # Tracing a model fails with errors of every kind.
        raise ConfigError(
            f"The model cannot be exported as {name}: {type(error).__name__}: {str(error).strip().splitlines()[0]} "
            "The format safetensors holds the weights of every model."
        ) from error


def _difference(name: str, predict: Predict, samples: Tensor, expected: Tensor) -> float:
    """Return how far a file is off; raises ``RunError`` if that is too far."""
    with _quiet(), torch.no_grad():
        # In two batches, of which one is of a size that no trace has seen.
        found = (
            torch.cat([predict(samples[:1]), predict(samples[1:])]) if len(samples) > 1 else predict(samples)
        )
    difference = float((found - expected).abs().max())
    if not torch.allclose(found, expected, rtol=RTOL, atol=ATOL):
        raise RunError(
            f"The {name} file is not the model: its outputs differ by up to {difference:.3g} on {len(samples)} test "
            "samples. Do not use it."
        )
    return difference


def _safetensors(model: Prepared, samples: Tensor, path: Path) -> Predict:
    save_file({name: value.contiguous() for name, value in model.model.state_dict().items()}, path)
    model.model.load_state_dict(load_file(path))
    return model


def _pt2(model: Prepared, samples: Tensor, path: Path) -> Predict:
    torch.export.save(_program(model, samples), path)
    read: Predict = torch.export.load(path).module()
    return read


def _torchscript(model: Prepared, samples: Tensor, path: Path) -> Predict:
    torch.jit.save(torch.jit.trace(model, samples), str(path))  # type: ignore[no-untyped-call]
    read: Predict = torch.jit.load(str(path))  # type: ignore[no-untyped-call]
    return read


def _onnx(model: Prepared, samples: Tensor, path: Path) -> Predict:
    try:
        import onnx
        import onnxscript  # noqa: F401 - torch.onnx needs it
    except ImportError as error:
        raise ConfigError(
            f"The format onnx needs onnx and onnxscript ({error}): pip install 'flowerbed[export]'."
        ) from error
    program = torch.onnx.export(
        _program(model, samples),
        dynamo=True,
        verbose=False,
        external_data=False,
        input_names=["samples"],
        output_names=["logits"],
    )
    assert program is not None
    program.save(str(path), external_data=False)
    try:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except ImportError:
        from onnx.reference import ReferenceEvaluator

        session = ReferenceEvaluator(onnx.load(str(path)))
    return lambda x: torch.from_numpy(session.run(None, {"samples": x.numpy()})[0])


def _program(model: Prepared, samples: Tensor) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch")
    return torch.export.export(model, (samples,), dynamic_shapes=({0: batch},))


@dataclass(frozen=True)
class Format:
    """One kind of file."""

    suffix: str
    write: Callable[[Prepared, Tensor, Path], Predict]
    """Writes the file and returns what its own runtime computes from it."""


FORMATS = {
    "safetensors": Format("safetensors", _safetensors),
    "pt2": Format("pt2", _pt2),
    "torchscript": Format("ts", _torchscript),
    "onnx": Format("onnx", _onnx),
}
"""By name: weights alone; what torch.export, torch.jit.trace (deprecated by PyTorch) and torch.onnx make."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' warnings, which are about their own parts, from the user."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def as_json(made: Exported) -> dict[str, Any]:
    """Return what was made as JSON values."""
    return {"files": [str(path) for path in made.files], "differences": made.differences}
