"""FedLoGe: a generic and a personal model from features that learn for a sparse simplex.

Reference: Xiao et al., "FedLoGe: Joint Local and Generic Federated Learning under Long-tailed Data", ICLR 2024,
equations (4), (6), (7), and its released code. Features f(x) >= 0 of dimension d, C classes.

Before training, server:  W_s (C, d), the sparse simplex SSE-C of ``flowerbed.models.sparse_etf``, fixed for ever.
Client k, each batch, one forward pass:
                   f by SGD on CE(W_s f(x), y);
                   auxiliary head G = (W, b) by SGD on CE(G sg[f(x)], y);
                   own head L_k = (V, c) by SGD on CE(L_k sg[f(x)], y), sg = no gradient.
Server:            FedAvg on f and G. W_s goes down with the model and never back, L_k never leaves the client.
After training, without data or gradients, at any time:
  GA (generic):    rows w_c of W become ``scale`` w_c / ||w_c||; b stays.
  LA (personal):   G_k has the rows w_c ||v_c|| and b; the client predicts by L_k(f) + G_k(f).

The row lengths of W follow the class sizes of all clients, those of V the client's own: GA takes the first away,
LA puts the second in. Rows of classes that a client has never seen keep the length they were drawn with, about
1/sqrt(3) under ``local_init=drawn``: that is no personalisation.

Evaluated are, on the server's test set, the generic model after GA (``""``), before it (``auxiliary``) and W_s
(``fixed``); on every client's own these three and ``personal``, the form that is asked for, ``sum`` (G + L_k) and
``local`` (L_k). ``report=main`` leaves only ``""`` and ``personal``. ``auxiliary`` and ``""`` are the generic model
without and with phase 2; the released training script logs ``fixed``.

``personal_form=readme`` is G_k(f) + G(f), the form of the code's README; the default is that of the script that
it runs. The script also forbids the classes that the client's *test* set lacks, but for FedLoGe alone. Here that is
no part of the method: ``evaluation.mask`` does it to every method, for the classes without training samples
(``train``) or without test samples (``test``).

``classifier=learned`` is the control that the paper lacks: G teaches the features, so f and G are FedAvg's bit for
bit, L_k is trained beside them, and GA and LA are applied as above. Its generic model is ``tau_norm`` with
``scale=1.7 keep_bias=true``. ``beta=0`` is a dense simplex, FedLoGe without sparsity.

Released code: W_s keeps the random bias that it is created with (``ssec_bias=random``), which is no part of the
method; here it is zero. Its three optimizers are one here, which moves every entry the same; ``local.clip_norm``,
which would couple them, is refused. gamma = 0.1 is the temperature of 500 rounds with 512 features: with few
rounds or a narrow model take 1. Its setting: SGD 0.03, momentum 0.5, batch 8, 5 epochs, 500 rounds, 8 of 40
clients, ResNet-18. W_s lets the features grow where a learned head would grow itself, so the two detached heads
need a small step: at lr 0.05 with momentum 0.9 their losses rose from round to round, at the above they fell.

Seen with three seeds (experiments/ledger/fedloge.json; small network on pooled Fashion-MNIST, strided convolutions with
batch and group norm on CIFAR-10, imbalance 100, 10 clients, Dirichlet 0.5): GA and LA do what is claimed on the small
network, LA on all three. The same GA and LA on FedAvg's features are ahead of W_s on all three, in the generic model
(78.8 against 78.0, 31.4 against 24.2, 29.5 against 28.0 %) and in the personal ones (80.1, 38.6, 36.6 against 77.5,
32.9, 35.6 %), and there the own head alone is ahead of LA. The convolutions learn no rare class in 20 rounds.

Privacy: the row lengths of L_k say which classes a client has; so does its update of G.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from flowerbed import seeds
from flowerbed.clients.data import Batch
from flowerbed.clients.half import ClientHalf, Predictor
from flowerbed.clients.local_round import MODEL, Extras, LocalRound, Trained, shared_model
from flowerbed.errors import ClientError, require
from flowerbed.models.base import ModelSpec, Net
from flowerbed.models.parts import ModelParts
from flowerbed.models.sparse_etf import (
    BIAS,
    DIVISORS,
    SPARSE,
    SPARSE_BIAS,
    WEIGHT,
    SparseEtf,
    nearest_angles,
    simplex_angle,
    sparse_simplex,
)
from flowerbed.models.tasks import Task
from flowerbed.storage import Tensors
from flowerbed.strategies.base import STRATEGIES, Phase, Setting
from flowerbed.strategies.fedavg import FedAvg, FedAvgParams
from flowerbed.strategies.personal import PERSONAL, two_predictors
from flowerbed.strategies.server_side import ServerSide
from flowerbed.strategies.tau_norm import tau_normalised

FIXED: Final = frozenset({SPARSE, SPARSE_BIAS, DIVISORS})
"""Buffers that the server alone sets."""
PREFIX: Final = "personal "
PROBED: Final = 64
"""Samples on which the sign of the features is looked at."""
TOLERATED: Final = 1.0
"""Degrees by which the mean smallest angle of W_s may miss the simplex's without a warning."""


@dataclass(frozen=True)
class FedLoGeParams(FedAvgParams):
    """FedAvg's parameters, the fixed classifier, and the realignment."""

    classifier: str = "sparse"
    """What teaches the features: sparse (W_s); learned (the auxiliary head, as in FedAvg: the control)."""
    beta: float = 0.6
    """Share of W_s that is zero."""
    gamma: float = 0.1
    """Length of every row of W_s, a temperature."""
    ssec_steps: int = 10_000
    """Adam steps of its construction."""
    ssec_lr: float = 1e-4
    ssec_bias: str = "zero"
    """Fixed bias of W_s: zero; random (uniform in +-1/sqrt(d), as in the released code)."""
    local_init: str = "drawn"
    """Where a client's own head starts: drawn (its own draw, uniform in +-1/sqrt(d)); shared (where G does)."""
    realign: str = "ga"
    """Generic model: ga (rows of equal length); none (the auxiliary head as trained)."""
    scale: float = 1.7
    """That length; it matters beside the bias alone."""
    personal_form: str = "code"
    """code: L_k + G_k; readme: G_k + G; sum: L_k + G, without realignment; local: L_k."""
    report: str = "all"
    """all: evaluate every head by itself as well, each at the cost of one evaluation; main: the two models."""
    signed_features: bool = False
    """Allow features below zero, which the paper's are never."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in CHOICES.items():
            value = getattr(self, name)
            require(value in known, f"strategy.{name} is '{value}'; choose {' or '.join(known)}.")
        require(0 <= self.beta < 1, f"strategy.beta is {self.beta}; give a share from 0 (dense) to below 1.")
        require(self.ssec_steps >= 0, f"strategy.ssec_steps is {self.ssec_steps}; give 0 or more.")
        for name in ("gamma", "ssec_lr", "scale"):
            require(
                getattr(self, name) > 0, f"strategy.{name} is {getattr(self, name)}; give a number above 0."
            )

    @property
    def recipe(self) -> SparseEtf:
        """How W_s is made."""
        return SparseEtf(self.beta, self.gamma, self.ssec_steps, self.ssec_lr)


Head = Mapping[str, Tensor]
"""A linear classifier: ``weight`` ``(C, d)`` and, if it has one, ``bias`` ``(C,)``."""


def logits(head: Head, features: Tensor) -> Tensor:
    """Return the outputs ``(N, C)`` of ``features`` ``(N, d)``."""
    return F.linear(features, head["weight"], head.get("bias"))


def generic_head(auxiliary: Head, scale: float) -> Tensors:
    """Return GA: every row of the auxiliary head as long as ``scale``, zero rows excepted; the bias stays."""
    return {**auxiliary, "weight": scale * tau_normalised(auxiliary["weight"], 1.0)}


def local_rows(auxiliary: Head, own: Head) -> Tensors:
    """Return LA's G_k: every row of the auxiliary head times the length of the own head's row; the bias stays."""
    lengths = torch.linalg.vector_norm(own["weight"], dim=1, keepdim=True)
    return {**auxiliary, "weight": auxiliary["weight"] * lengths}


def added(one: Head, other: Head) -> Tensors:
    """Return the head whose outputs are the sums of both heads' outputs."""
    return {name: value + other[name] for name, value in one.items()}


FORMS: Final[dict[str, Callable[[Head, Head], Head]]] = {
    "code": lambda auxiliary, own: added(own, local_rows(auxiliary, own)),
    "readme": lambda auxiliary, own: added(local_rows(auxiliary, own), auxiliary),
    "sum": lambda auxiliary, own: added(own, auxiliary),
    "local": lambda auxiliary, own: own,
}
"""The personal head, from auxiliary and own head."""

CHOICES: Final = {
    "classifier": ("sparse", "learned"),
    "ssec_bias": ("zero", "random"),
    "local_init": ("drawn", "shared"),
    "realign": ("ga", "none"),
    "personal_form": tuple(FORMS),
    "report": ("all", "main"),
}


class FedLoGeHalf(ClientHalf):
    """Trains three heads on one forward pass; keeps its own."""

    stateful = True
    params: FedLoGeParams

    def begin(self, local: LocalRound) -> Extras:
        if self.params.classifier == "sparse" and not bool(local.parts.buffers[SPARSE].any()):
            raise ClientError(
                "the sparse classifier arrived empty; whoever runs the rounds calls the strategy's start_phase "
                "first, as flowerbed's loop does"
            )
        return {PERSONAL: own_head(local, self.params.local_init)}

    def further(self, extras: Extras) -> Tensors:
        return {PREFIX + name: value for name, value in extras[PERSONAL].items()}

    def loss(
        self, model: ModelParts, batch: Batch, extras: Extras, task: Task
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        taught_by_auxiliary = self.params.classifier == "learned"
        features, labels = model.features(batch["x"]), batch["y"]
        detached = features.detach()
        outputs = {
            "auxiliary": model.head(features if taught_by_auxiliary else detached),
            "local": logits(extras[PERSONAL], detached),
        }
        if not taught_by_auxiliary:
            outputs["fixed"] = F.linear(features, model.buffers[SPARSE], model.buffers[SPARSE_BIAS])
        losses = {f"{name}-loss": task.loss(found, labels).mean() for name, found in outputs.items()}
        return torch.stack(list(losses.values())).sum(), losses

    def end(self, local: LocalRound, trained: Trained, extras: Extras) -> Mapping[str, Mapping[str, Tensor]]:
        local.state[PERSONAL] = {name: value.detach().clone() for name, value in extras[PERSONAL].items()}
        return {MODEL: shared_model(local, FIXED)}

    def predictors(self, local: LocalRound) -> Mapping[str, Predictor]:
        auxiliary = auxiliary_head({**local.parts.parameters, **local.parts.buffers})
        own = own_head(local, self.params.local_init)

        def by(head: Head) -> Predictor:
            return lambda x: logits(head, local.parts.features(x))

        found = dict(two_predictors(local, by(FORMS[self.params.personal_form](auxiliary, own))))
        if self.params.report == "all":
            found |= {
                "auxiliary": by(auxiliary),
                "sum": by(FORMS["sum"](auxiliary, own)),
                "local": by(own),
            }
            if self.params.classifier == "sparse":
                buffers = local.parts.buffers
                found["fixed"] = by({"weight": buffers[SPARSE], "bias": buffers[SPARSE_BIAS]})
        return found


def auxiliary_head(model: Mapping[str, Tensor]) -> Tensors:
    """Return G as it was trained, also from a model in which its rows have been divided."""
    head = {"weight": model[WEIGHT] * model[DIVISORS].unsqueeze(1)}
    return {**head, "bias": model[BIAS]} if BIAS in model else head


def own_head(local: LocalRound, start: str) -> Tensors:
    """Return a copy of the client's own head L_k; one that has not trained yet is where it starts."""
    if PERSONAL in local.state:
        return {name: value.to(local.device, copy=True) for name, value in local.state[PERSONAL].items()}
    initial = local.open_initial()
    head = {name: initial[key] for name, key in (("weight", WEIGHT), ("bias", BIAS)) if key in initial}
    if start == "shared":
        return {name: value.to(local.device, copy=True) for name, value in head.items()}
    generator = seeds.torch_rng(local.seed, "own head", local.client)
    bound = head["weight"].shape[1] ** -0.5
    return {name: uniform(value, bound, generator).to(local.device) for name, value in head.items()}


def uniform(like: Tensor, bound: float, generator: torch.Generator) -> Tensor:
    """Return a tensor of the shape and type of ``like``, uniform in +-``bound``, on the CPU."""
    return torch.empty(like.shape, dtype=like.dtype).uniform_(-bound, bound, generator=generator)


@STRATEGIES.register("fedloge")
class FedLoGe(FedAvg):
    """Makes W_s, averages features and auxiliary head, delivers the realigned one."""

    Params = FedLoGeParams
    Half = FedLoGeHalf
    params: FedLoGeParams

    def model_spec(self, spec: ModelSpec) -> ModelSpec:
        options = {"inner": spec.name, "options": dict(spec.options)}
        return replace(spec, name="flowerbed.models.sparse_etf:sparse_etf_net", options=options)

    def setup(self, setting: Setting) -> None:
        super().setup(setting)
        require(
            setting.local.clip_norm == 0,
            "local.clip_norm would let one of FedLoGe's three heads scale the steps of the others; set "
            "local.clip_norm=0.",
        )
        absent = [c for c, count in enumerate(setting.class_counts) if not count]
        require(
            not absent,
            f"No client has a training sample of the classes {absent}, whose rows FedLoGe would realign all the "
            "same; take them out of the data set, or lower data.imbalance or data.server_per_class.",
        )
        if setting.server is not None:
            self._check_task(setting.server)

    def _check_task(self, server: ServerSide) -> None:
        require(
            server.dataset.task == "classification",
            f"FedLoGe's classes are those of one label per sample; the task of '{server.dataset.name}' is "
            f"{server.dataset.task}. Choose a classification set.",
        )
        if not self.params.signed_features:
            model = server.model.build(server.seed).eval()
            assert isinstance(model, Net)
            with torch.no_grad():
                features = model.features(server.dataset.prepare(server.dataset.train.inputs[:PROBED]))
            require(
                bool((features >= 0).all()),
                "FedLoGe's features are never negative, this model's body (or the encoder before it) makes some "
                "that are; choose one whose body ends in a ReLU (mlp, leaf_cnn, resnet8, resnet18), or set "
                "strategy.signed_features=true.",
            )

    def start_phase(self, phase: Phase, model: Tensors) -> Tensors:
        # The model may begin with what another run delivered: its rows are then what this one starts with.
        started = {**model, DIVISORS: torch.ones_like(model[DIVISORS])}
        if self.params.classifier == "learned":
            return started
        return {**started, **self._fixed_classifier(model[SPARSE], BIAS in model)}

    def _fixed_classifier(self, like: Tensor, with_bias: bool) -> Tensors:
        """Return W_s and its bias, of the shape and type of ``like`` ``(C, d)``; a function of the run's seed."""
        (classes, dim), seed = like.shape, self.setting.seed if self.setting else 0
        frame = sparse_simplex(dim, classes, self.params.recipe, seeds.torch_rng(seed, "sparse simplex"))
        angle, ideal = float(nearest_angles(frame).mean()), simplex_angle(classes)
        if ideal - angle > TOLERATED:
            warnings.warn(
                f"The classes of the sparse simplex are {angle:.2f} degrees apart, {ideal:.2f} are possible; give "
                "strategy.ssec_steps more steps, lower strategy.beta, or choose a wider model.",
                stacklevel=2,
            )
        bias = torch.zeros_like(like[:, 0])
        if self.params.ssec_bias == "random" and with_bias:
            bias = uniform(bias, dim**-0.5, seeds.torch_rng(seed, "sparse simplex bias"))
        return {SPARSE: frame.T.contiguous().to(like), SPARSE_BIAS: bias}

    def deliver(self, model: Tensors) -> Tensors:
        if self.params.realign == "none":
            return model
        head = generic_head({"weight": model[WEIGHT]}, self.params.scale)
        lengths = torch.linalg.vector_norm(model[WEIGHT], dim=1)
        return {**model, WEIGHT: head["weight"], DIVISORS: lengths / self.params.scale}

    def alternatives(self, model: Tensors) -> Mapping[str, Tensors]:
        if self.params.report == "main":
            return {}
        found = {"auxiliary": model}
        if self.params.classifier == "sparse":
            fixed = {WEIGHT: model[SPARSE], DIVISORS: torch.ones_like(model[DIVISORS])}
            found["fixed"] = {**model, **fixed, **({BIAS: model[SPARSE_BIAS]} if BIAS in model else {})}
        return found
