"""DeepZero: Scaling up Zeroth-Order Optimization for Deep Model Training.

Chen, Zhang, Jia, Diffenderfer, Liu, Parasyris, Zhang, Zhang, Kailkhura and Liu, ICLR 2024, arXiv 2310.02025. A network
is trained from scratch by forward passes alone. Coordinate-wise estimation (CGE) moves one weight at a time:

    g_i = (l(theta + mu e_i) - l(theta)) / mu    for i in the active set S, 0 elsewhere;  |S| + 1 losses a step

against random directions (RGE), g = (1/q) sum_j ((l(theta + mu u_j) - l(theta)) / mu) u_j with q + 1 losses. To make
CGE cheap S is sparse, and drawn anew every K steps: uniformly within each layer, in numbers that a pruning score found
without gradients (ZO-GraSP) sets once, before training:

    g_0 = RGE(theta), g_1 = RGE(theta + mu g_0),  H g = (g_1 - g_0) / mu,  score = |theta H g|

on a batch with equally many samples of each class. The largest 1 - s of all scores are kept, and only the share of each
layer, 1 - s_l, is used. Weights stay dense: S selects what is estimated. Biases and normalisation are always active.
``pruned`` is the paper's other use, where the mask of the scores itself is kept and all other weights are zero.

Here one round is one set S: K is ``local.steps``. Feature reuse comes from evaluating many perturbations of one tensor
together (``flowerbed.models.zeroth_order``). A query is one loss of one batch, the unperturbed one included.

The comparison is on Fashion-MNIST at 7x7 with 970 weights: on the 8x8 digits of scikit-learn backpropagation alone is
at 96 to 97 % after as many steps, which leaves nothing to tell.

Controls. Backpropagation with the same steps; RGE at an equal number of queries with q = d and with q = d / 10, every
arm at all of four learning rates (those of the other arms were tuned with another seed); sparse CGE with the same share
in every layer, which leaves out what the scores say.

Differences from the released code: directions in training are standard normal, where the code scales them to length 1
by tensor (kept for the scores, where only proportions matter). We let the two gradients of the scores share directions,
since of two draws, divided by mu, nothing but noise is left (``common=False`` draws twice). Moved weights are copies,
where adding and subtracting mu drifts by rounding. Losses of a batch are added in float64. mu does not follow the
learning rate. Momentum and decay move inactive weights, as in the code, unless ``inactive=stay``. ``signed`` keeps by
the sign of the score as GraSP does, where the code takes absolute values. Batch norm's running statistics change once
a step, not once a query.

Many clients: S comes from the seed of the run and the round, so all clients estimate the same entries. With one step a
round and ``inactive=stay`` a client sends |S| numbers, and the average is the step of the averaged estimate: with all
samples in each batch, CGE on the union of the data. These numbers are the gradient on S, so what can be inverted from
gradients can be inverted from them. Scores of clients are averaged as H g, before their absolute values.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from flowerbed import seeds
from flowerbed.clients.data import Batch
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import MODEL, Extras, LocalRound, Reply, Step, Trained
from flowerbed.clients.training import Evaluation, StepGradients, backpropagate
from flowerbed.errors import ConfigError, require
from flowerbed.models.info import ModelInfo
from flowerbed.models.parts import ModelParts
from flowerbed.models.sparsity import Masks, keep_largest, prunable
from flowerbed.models.tasks import Classification, Task
from flowerbed.models.zeroth_order import Active, Value, coordinate_wise, random_directions
from flowerbed.storage import Tensors
from flowerbed.strategies.base import ClientReply, Phase
from flowerbed.strategies.fedavg import FedAvg, FedAvgParams

ESTIMATORS = ("cge", "rge", "backprop")
SCORE, MASK, VALUES, CURVATURE = "score", "mask", "values", "curvature"
ACTIVE, DRAWS, START = "active", "draws", "start"


@dataclass(frozen=True)
class DeepZeroParams(FedAvgParams):
    """Hyper-parameters of DeepZero and of what it is compared with."""

    estimator: str = "cge"
    """cge (coordinates), rge (random directions) or backprop."""
    mu: float = 5e-3
    """Step of the finite differences."""
    q: int = 0
    """Random directions of a step of rge; 0 means as many as there are parameters."""
    s: float = 0.0
    """Share of the prunable weights that a round of cge does not estimate; 0 estimates all."""
    layers: str = "grasp"
    """What sets the share of each layer: grasp (the scores) or uniform."""
    pruned: bool = False
    """Keep the mask of the scores instead of drawing anew, and let all other weights be zero."""
    inactive: str = "move"
    """What momentum and decay do to weights that are not estimated: move (as released) or stay."""
    score_q: int = 192
    """Random directions of each of the two gradients that the scores are made of."""
    per_class: int = 25
    """Samples of each class in the batch of the scores, as far as there are."""
    common: bool = True
    """Whether the two gradients are taken along the same directions."""
    signed: bool = False
    """Keep the largest theta H g (GraSP) instead of the largest absolute values (as released)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in (
            ("estimator", ESTIMATORS),
            ("layers", ("grasp", "uniform")),
            ("inactive", ("move", "stay")),
        ):
            given = getattr(self, name)
            require(given in choices, f"strategy.{name} is '{given}'; choose from {', '.join(choices)}.")
        require(self.mu > 0, f"strategy.mu is {self.mu}; give a number above 0.")
        require(self.q >= 0, f"strategy.q is {self.q}; give 0 (as many as parameters) or more.")
        require(0 <= self.s < 1, f"strategy.s is {self.s}; give a sparsity of at least 0, below 1.")
        require(self.score_q >= 1, f"strategy.score_q is {self.score_q}; give at least 1.")
        require(self.per_class >= 1, f"strategy.per_class is {self.per_class}; give at least 1.")
        require(
            not self.s or self.estimator == "cge",
            "strategy.s needs strategy.estimator=cge; set strategy.s=0.",
        )
        require(
            not self.pruned or self.scores,
            "strategy.pruned keeps the mask of the scores; set strategy.s above 0 and strategy.layers=grasp.",
        )

    @property
    def scores(self) -> bool:
        """Whether the scores are needed, hence a round before training."""
        return self.s > 0 and self.layers == "grasp"


def exact() -> AbstractContextManager[None]:
    """Let convolutions on a GPU compute in float32 proper, whose rounding alone is small enough against mu."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def active_set(params: DeepZeroParams, info: ModelInfo, masks: Masks, seed: int, round_: int) -> Active:
    """Return S of a round: flat indices by parameter. ``masks`` are those of the scores, {} without."""
    rng = seeds.torch_rng(seed, "active coordinates", round_)
    found, layers = {}, set(prunable(info)) if params.s else set()
    for name in info.roles:
        if name not in info.parameters:
            continue
        every = torch.arange(torch.Size(info.shapes[name]).numel())
        if name not in layers:
            found[name] = every
        elif params.pruned:
            found[name] = every[masks[name].flatten().cpu()]
        else:
            share = float(masks[name].float().mean()) if params.scores else 1 - params.s
            count = round(share * len(every))
            found[name] = torch.randperm(len(every), generator=rng)[:count].sort().values
    return found


def losses(outputs: Tensor, labels: Tensor, task: Task) -> Tensor:
    """Return the task's loss of each sample, ``(N,)``.

    For a classification the classes come first, where many softmaxes of ten numbers take a fifth of the time on a CPU.
    """
    if isinstance(task, Classification):
        return nn.functional.cross_entropy(outputs.T[None], labels[None], reduction="none")[0]
    return task.loss(outputs, labels)


class DeepZeroHalf(ClientHalf):
    """Trains on gradients that are made of losses."""

    params: DeepZeroParams

    def begin(self, local: LocalRound) -> Extras:
        require(
            local.local.precision == "float32" or self.params.estimator == "backprop",
            f"local.precision={local.local.precision} is too coarse for finite differences; set it to float32.",
        )
        masks = dict(local.received.get(MASK, {}))
        active = active_set(self.params, local.info, masks, local.seed, local.clock.round)
        active = {name: at.to(local.device) for name, at in active.items()}
        return {ACTIVE: active, DRAWS: local.generator("directions"), START: local.parameters()}

    def loss(
        self, model: ModelParts, batch: Batch, extras: Extras, task: Task
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        # Added in float64: a difference of two means in float32 would be divided by mu.
        return losses(model(batch["x"]), batch["y"], task).double().mean(), {}

    def estimate(self, compute: Evaluation, parameters: Mapping[str, Tensor]) -> StepGradients:
        if self.params.estimator == "backprop":
            base, metrics, gradients = backpropagate(compute, parameters)
            return base, {**metrics, "queries": torch.tensor(1)}, gradients
        device = next(iter(parameters.values())).device
        before = seeds.torch_states(device) if compute.parts.draws else {}
        with torch.no_grad(), exact():
            base, metrics = compute()
            after = seeds.torch_states(device) if before else {}

            def value(tensors: Tensors) -> Tensor:
                # Dropout and the like draw again what they drew for the unperturbed loss.
                if before:
                    seeds.set_torch_states(before, device)
                return compute.at(tensors)

            found, queries = self._differences(value, parameters, base, compute)
            if after:
                seeds.set_torch_states(after, device)
        return base, {**metrics, "queries": torch.tensor(queries + 1)}, found

    def _differences(
        self, value: Value, parameters: Mapping[str, Tensor], base: Tensor, compute: Evaluation
    ) -> tuple[Tensors, int]:
        mu, scratch = self.params.mu, compute.parts.buffers
        if self.params.estimator == "cge":
            return coordinate_wise(
                value, parameters, mu, base, active=compute.extras[ACTIVE], scratch=scratch
            )
        q = self.params.q or sum(p.numel() for p in parameters.values())
        return random_directions(value, parameters, mu, q, base, compute.extras[DRAWS], scratch=scratch)

    @property
    def stays(self) -> bool:
        """Whether inactive weights keep their values, so that only the active ones need to be sent."""
        return self.params.s > 0 and (self.params.inactive == "stay" or self.params.pruned)

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        if self.stays:
            for name, at in step.extras[ACTIVE].items():
                parameter = step.parts.parameters[name]
                moved = parameter.flatten()[at]
                parameter.copy_(step.extras[START][name])
                parameter.view(-1)[at] = moved

    def end(self, local: LocalRound, trained: Trained, extras: Extras) -> Mapping[str, Mapping[str, Tensor]]:
        model = dict(super().end(local, trained, extras)[MODEL])
        if not self.stays:
            return {MODEL: model}
        values = {name: model.pop(name).flatten()[at] for name, at in extras[ACTIVE].items()}
        return {MODEL: model, VALUES: values}

    @torch.no_grad()
    def query(self, local: LocalRound) -> Reply:
        """Return H g of the prunable weights, by differences of two random-direction gradients."""
        rng = seeds.torch_rng(local.seed, "batch of the scores", local.client)
        labels = local.train_data.y.cpu()
        order = torch.randperm(len(labels), generator=rng)
        rows = [order[labels[order] == c][: self.params.per_class] for c in range(local.task.classes)]
        batch = local.train_data.batch(torch.cat(rows).to(local.device))
        local.model.train()
        parameters, buffers = local.parts.parameters, local.parts.buffers

        def value(tensors: Tensors) -> Tensor:
            # Dropout and the like draw the same in every evaluation.
            seeds.set_torch_states(states, local.device)
            return Evaluation(self.loss, local.parts, batch, {}, local.task).at(tensors)

        def gradient(at: Tensors, place: int) -> Tensors:
            numbers, kind = (local.client, place), local.device.type
            draws = seeds.torch_rng(local.seed, "directions of the scores", *numbers, device=kind)
            base = value({**at, **{name: b.clone() for name, b in buffers.items()}})
            mu, q = self.params.mu, self.params.score_q
            return random_directions(value, at, mu, q, base, draws, unit=True, scratch=buffers)[0]

        here = {name: p.detach() for name, p in parameters.items()}
        with exact(), seeds.torch_stream(local.seed, "modules of the scores", device=local.device):
            states = seeds.torch_states(local.device)
            first = gradient(here, 0)
            moved = {name: p + self.params.mu * first[name] for name, p in here.items()}
            second = gradient(moved, 0 if self.params.common else 1)
        product = {n: (second[n] - first[n]) / self.params.mu for n in prunable(local.info)}
        counted = {"num-examples": len(labels), "queries": 2 * (self.params.score_q + 1)}
        return Reply({CURVATURE: product}, counted)


class DeepZero(FedAvg):
    """FedAvg, with a round of scores before, and active weights alone where the others stay."""

    Params = DeepZeroParams
    Half = DeepZeroHalf
    params: DeepZeroParams

    def phases(self, rounds: int) -> list[Phase]:
        asking = [Phase(SCORE, 1, "query", everyone=True, preparatory=True)] if self.params.scores else []
        return [*asking, *super().phases(rounds)]

    def start_phase(self, phase: Phase, model: Tensors) -> Tensors:
        if phase.name != SCORE and self.params.pruned:
            return {n: v * self.state[MASK][n] if n in self.state[MASK] else v for n, v in model.items()}
        return model

    def broadcast(self, server_round: int) -> Mapping[str, Mapping[str, Tensor]]:
        return {MASK: self.state[MASK]} if MASK in self.state else {}

    def aggregate(self, server_round: int, current: Tensors, replies: list[ClientReply]) -> Tensors:
        if self.phase.name == SCORE:
            weights = torch.tensor([r.examples for r in replies], dtype=torch.float64)
            sent = [r.streams[CURVATURE] for r in replies]
            product = {
                n: torch.stack(
                    [w * s[n].double() for w, s in zip(weights / weights.sum(), sent, strict=True)]
                ).sum(0)
                for n in sent[0]
            }
            scores = {n: current[n].double() * p for n, p in product.items()}
            kept = scores if self.params.signed else {n: v.abs() for n, v in scores.items()}
            self.state[MASK] = keep_largest(kept, self.params.s)
            return {}
        if isinstance(self.half, DeepZeroHalf) and self.half.stays:
            if self.setting is None:
                raise ConfigError("DeepZero needs to know the model; call setup() before the run.")
            masks = self.state.get(MASK, {})
            active = active_set(self.params, self.setting.info, masks, self.setting.seed, server_round)
            replies = [replace(r, streams={MODEL: _whole(r, current, active)}) for r in replies]
        return super().aggregate(server_round, current, replies)


def _whole(reply: ClientReply, current: Tensors, active: Active) -> Tensors:
    """Return the model of a reply: what was sent, and what stayed."""
    model = {}
    for name, value in current.items():
        if name in reply.streams[VALUES]:
            flat = value.flatten().clone()
            flat[active[name]] = reply.streams[VALUES][name]
            model[name] = flat.view_as(value)
        else:
            model[name] = reply.model[name]
    return model
