"""One side of the race of inversions: ``python -m ...competitors.inversion_side WORK SIDE``.

WORK is a folder with work.json and work.safetensors, as ``flowerbed bench attack`` writes them; SIDE is ``flowerbed``
or ``breaching``. The side's images go to WORK/SIDE.safetensors; the last line it prints is JSON: CPU and wall seconds
of the attacks alone, imports and preparation left out, and the gradients of the victim's model that were computed.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowerbed.models.base import ModelSpec

GRADIENT = "gradient/"
STATE = "state/"
OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def flowerbed(
    work: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[Callable[[], list[Tensor]], Callable[[], int]]:
    """Return what attacks all victims, and what counts its gradients afterwards."""
    from dataclasses import replace

    from flowerbed.clients.params import LocalParams
    from flowerbed.datasets.augment import Scale
    from flowerbed.strategies.attacks.inversion import Inversion
    from flowerbed.strategies.attacks.observation import Observation, SideInfo
    from flowerbed.strategies.attacks.presets import ATTACKS
    from flowerbed.strategies.attacks.priors import TotalVariation

    state, gradients = _parts(tensors)
    spec = _spec(work)
    side = SideInfo(
        local=LocalParams(lr=1.0, steps=1, batch_size=0), scale=Scale(tuple(work["mean"]), tuple(work["std"]))
    )
    cases = []
    for victim, label in enumerate(tensors["labels"]):
        returned = {**state, **{n: state[n] - g[victim] for n, g in gradients.items()}}
        cases.append((Observation(victim, 1, spec, state, returned, 1), replace(side, labels=label[None])))
    attack = ATTACKS.get("ig")(None)
    assert isinstance(attack, Inversion)
    (descent,) = attack.descents
    attack = replace(
        attack,
        restarts=work["restarts"],
        priors=(TotalVariation(work["tv"]),),
        descents=(replace(descent, steps=work["iterations"]),),
        chunk=work["chunk"],
    )
    spent: list[int] = []

    def run() -> list[Tensor]:
        found = attack.run(cases, seed=work["seed"])
        spent.append(sum(one.evaluations for one in found))
        return [one.x for one in found]

    return run, lambda: spent[0]


def breaching(
    work: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[Callable[[], list[Tensor]], Callable[[], int]]:
    """Return the same of breaching's attack "invertinggradients", through its public interface.

    Raises ``ImportError`` if a folder of ``work["path"]`` lacks what it needs.
    """
    sys.path[:0] = work["path"]
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        # A torchvision built for another torch lacks its compiled operators. The attack calls none of them, and with
        # their names declared the import succeeds.
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library: Any = torch.library
        declared = library.Library("torchvision", "DEF")
        for operator in OPERATORS:
            declared.define(operator)
    import breaching as package

    state, gradients = _parts(tensors)
    model = _spec(work).build(0).eval()
    model.load_state_dict(state)

    class Metadata:
        modality = "vision"
        size = (len(tensors["labels"]),)
        classes = work["classes"]
        shape = tuple(work["shape"])
        normalize = True
        mean = tuple(work["mean"])
        std = tuple(work["std"])

    settings = package.get_attack_config(
        "invertinggradients",
        overrides=[
            f"optim.max_iterations={work['iterations']}",
            f"optim.callback={work['iterations']}",
            f"restarts.num_trials={work['restarts']}",
            f"regularization.total_variation.scale={work['tv']}",
        ],
    )
    attacker = package.attacks.prepare_attack(
        model, torch.nn.CrossEntropyLoss(), settings, {"device": torch.device("cpu"), "dtype": torch.float}
    )
    payload = [
        {"parameters": list(model.parameters()), "buffers": list(model.buffers()), "metadata": Metadata}
    ]

    def run() -> list[Tensor]:
        torch.manual_seed(work["seed"])
        found = []
        for victim, label in enumerate(tensors["labels"]):
            told = {"num_data_points": 1, "labels": label[None], "local_hyperparams": None}
            shared = [
                {
                    "gradients": [gradients[name][victim] for name, _ in model.named_parameters()],
                    "buffers": None,
                    "metadata": told,
                }
            ]
            data, _ = attacker.reconstruct(payload, shared, {}, dryrun=False)
            found.append(data["data"].detach())
        return found

    # One a step of every restart, and one to score it.
    count = len(tensors["labels"]) * work["restarts"] * (work["iterations"] + 1)
    return run, lambda: count


def _spec(work: dict[str, Any]) -> ModelSpec:
    return ModelSpec(work["model"], tuple(work["shape"]), work["classes"], work["options"])


def _parts(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the model and the gradients, the latter with one row a victim."""
    state = {n.removeprefix(STATE): v for n, v in tensors.items() if n.startswith(STATE)}
    return state, {n.removeprefix(GRADIENT): v for n, v in tensors.items() if n.startswith(GRADIENT)}


def main() -> int:
    """Attack as the command line says."""
    folder, side = Path(sys.argv[1]), sys.argv[2]
    work, tensors = json.loads((folder / "work.json").read_text()), load_file(folder / "work.safetensors")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    run, count = {"flowerbed": flowerbed, "breaching": breaching}[side](work, tensors)
    wall, cpu = time.perf_counter(), time.process_time()
    found = run()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    save_file({"x": torch.cat(found).contiguous()}, folder / f"{side}.safetensors")
    print(json.dumps({"cpu": cpu, "wall": wall, "evaluations": count()}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
