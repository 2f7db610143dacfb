"""GGEUR: embeddings of every class spread along the global class covariance, before any federated algorithm.

Reference: Ma, Dai, Huang, Chen, "Geometric Knowledge-Guided Localized Global Distribution Alignment for Federated
Learning", CVPR 2025 (arXiv 2503.06457), equations 1 to 5, Algorithms 1 and 2; released code
WeiDai-David/2025CVPR_GGEUR. It works on the embeddings of a frozen encoder (``encoder=``), which need no unit norm.

Statistics, one round before training:
    client k:  n_k, sum x, sum x x^T of each class i; mu_k, Sigma_k follow, Sigma_k with 1/n_k           (eq. 1)
    server:    Sigma_i = (1/N_i) [sum_k n_k Sigma_k + sum_k n_k (mu_k - mu_i)(mu_k - mu_i)^T]            (eq. 4)
               exactly, since the three sums add up; its eigenpairs (lambda_m, xi_m) are the class's shape.
Generation, at a client's first training message, which carries the shapes:
    x~ = centre + sum_m eps_m sqrt(lambda_m) xi_m, eps ~ N(0, 1), until each class has T embeddings      (eq. 5)
    centre ``sample`` (Algorithm 1): random own embeddings of the class; a class without any gets none.
    centre ``domains`` (Algorithm 2): own embeddings, and the class means of every other client, ``M`` from each.
Training: the algorithm ``base`` on the balanced sets, whose clients therefore weigh the same. Its global model is
really broadcast in every round.

Where paper and released code differ
  - eq. 5 has lambda_m in place of sqrt(lambda_m), hence covariance Sigma^2 (``spread=lambda``); the code draws from
    N(x, Sigma). Only the square root is equivariant to a rescaling of the embeddings: it is the default.
  - The code never loads the global head into a client, so that everything in it, FedAvg too, is one average of heads
    trained apart: ``protocol=one_shot``. The paper describes rounds, which are the default.
  - The code shapes a class by the largest clients that hold 80 % of it (``guide_fraction=0.8``); eq. 4 by all.
  - With several domains the code scales ten eigenvalues by 5 ... 1, the ten smallest since its order is ascending,
    which does next to nothing (``stretch=bottom``); the intent was surely ``top``. Off by default.
  - A client with no sample of a class takes only the first other domain's cloud there; here it draws from all.
  - The code ends its head in a softmax before the cross entropy: ``model=linear model.softmax=true``.
  - T: 5000 (CIFAR-10), 500 (CIFAR-100), 2000 (Digits), 50 (Office-Home) in the code, 2000 in readings of the paper.
  - M: 500, 50 on Office-Home. Reported there is the best test round; here never.
  - The code does not weigh clients in the mean: ``base_options={weighting: uniform}``. Balanced sets differ only by
    classes that a client lacks.

Controls: ``centre=duplicate`` balances by repetition, without noise or statistics; ``centre=global_mean`` draws from
N(mu_i, Sigma_i) around the *global* class mean, which the server holds anyway, also for classes that a client lacks;
``T=0`` is the base algorithm bit for bit.

Measured (experiment=embeddings_quick: Fashion-MNIST, patches, Dirichlet 0.03, T = 400, equal steps, seeds 0 to 2,
last round): FedAvg 80.9, with the code's uniform mean 79.7, duplication 78.0, GGEUR 79.6, with lambda 75.3, with the
others' prototypes (Algorithm 2) 81.4, global class means 84.4, all data in one place 87.5. One shot: raw 65.9, GGEUR
74.9. So in rounds GGEUR beats duplication by 1.5 points and FedAvg not at all; its large gain, 9 points, is that of the
one-shot protocol. The centres matter most: in 62 % of the cells of clients and classes there is one sample. To leave
cells with fewer than 2, 5 or 20 samples as they are does not help (seeds 0 and 1: 77.1, 77.8, 79.3; GGEUR 79.2). On
seed 0 (GGEUR 78.5): 80 % guides 78.4, n_floor 5 78.5; noise with z = 1, dp_clip 20 (epsilon 4.4 at delta 1e-5) at the
server 75.8, at the clients 72.5.
On four domains (experiment=embeddings_domains, 100 samples a class, mean of the four accuracies and their deviation):
FedAvg 65.2 (7.4), duplication 64.6 (7.4), Algorithm 1 72.8 (4.4), Algorithm 2 74.3 (3.4), prototypes alone 74.1 (3.2).

On a linear head the features that MOON compares are the frozen embeddings themselves, so that it is FedAvg, and
FedProto's distance is constant. Give them a layer to train: ``model=mlp``.

Privacy: a class with one sample at a client sends this embedding verbatim. ``n_floor`` leaves out of the statistics
what a client has fewer samples of; ``dp`` clips embeddings and adds noise, for neighbours that differ in one sample
(``ggeur_privacy``; the metric ``dp-epsilon``); with ``secure.enabled`` the server sees the sums over clients alone,
divided by ``scale`` so that they fit ``secure.clip``. Statistics that no data set has are rejected, by client. None of
these protects what ``base`` sends.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from flowerbed import messages, seeds
from flowerbed.clients.data import ClientData
from flowerbed.clients.half import ClientHalf, Predictor
from flowerbed.clients.local_round import MODEL, LocalRound, Reply, shared_model
from flowerbed.errors import ClientError, RunError, require
from flowerbed.models.info import ModelInfo
from flowerbed.storage import Tensors
from flowerbed.strategies.aggregation import mean_metrics
from flowerbed.strategies.base import STRATEGIES, ClientReply, Phase, Setting, decode
from flowerbed.strategies.composed import Composed, inner_strategy
from flowerbed.strategies.ggeur_generation import (
    CENTRES,
    DOMAINS,
    DUPLICATE,
    GLOBAL_MEAN,
    PROTOTYPE,
    ClassKnowledge,
    Rule,
    balanced,
)
from flowerbed.strategies.ggeur_geometry import (
    Moments,
    fault,
    from_low_rank,
    guiding,
    low_rank,
    shapes,
    stretched,
    total,
)
from flowerbed.strategies.ggeur_privacy import clipped, gaussian_epsilon, noised

STATISTICS = "statistics"
"""The phase, and the stream of its replies."""
SHAPES = "class shapes"
"""Stream and server state: ``values`` ``(C, r)``, ``vectors`` ``(C, r, d)``, for one control ``mean`` ``(C, d)``."""
PROTOTYPES = "domain prototypes"
"""Stream: class means of the other clients, ``mean`` ``(K - 1, C, d)``, and whether they exist, ``known``
``(K - 1, C)``. Server state: the same of all clients, with their ``node``."""
INFORMED = "informed"
"""Server state: the nodes that have shapes and used them."""
BALANCED = "balanced set"
"""Client state: kept ``rows`` of the client's data, generated ``x`` and their classes ``y``."""
HEAD = "one-shot model"
"""Client state of the one-shot protocol: the model that the client goes on with."""
LARGEST = 4096
"""Numbers in an embedding beyond which a covariance is out of the question."""


@dataclass(frozen=True)
class GgeurParams:
    """The data phase, and the algorithm that trains on what it makes."""

    base: str = "fedavg"
    """The algorithm on top: fedavg, fedprox, feddyn, fedntd, moon, scaffold, fedproto, or any other."""
    base_options: dict[str, Any] = field(default_factory=dict)
    """Its options, for example {mu: 0.1}."""
    T: int = 2000
    """Embeddings that every class has at every client after the phase; 0 leaves the data as they are."""
    centre: str = "sample"
    """What is generated around: sample (Algorithm 1), domains (Algorithm 2), prototype (those of others alone),
    global_mean (control), or duplicate (control: repeats samples)."""
    M: int = 500
    """Points in the pool around each other client's prototype, and around the own samples (domains, prototype)."""
    spread: str = "sqrt"
    """sqrt (covariance Sigma, as released) or lambda (Sigma^2, as printed)."""
    rank: int = 0
    """Leading eigenpairs of a class that clients receive (r); 0 means all."""
    client_rank: int = 0
    """Leading eigenpairs that a client sends in place of sum x x^T; exact below that many samples. 0 means the sum."""
    guide_fraction: float = 1.0
    """Share of a class that the clients have who shape it, largest first; 1 means all clients."""
    stretch: str = "none"
    """Ten eigenvalues multiplied by 5 ... 1: none, top (largest), or bottom (smallest, as released)."""
    protocol: str = "rounds"
    """rounds, or one_shot: every client goes on with its own model, the mean is evaluated and never broadcast."""
    n_floor: int = 0
    """Fewest samples of a class that a client says anything about; 0 or 1 means no floor."""
    trace_limit: float = 0.0
    """Largest mean squared norm of a class that is believed; statistics beyond are rejected. 0 means any."""
    dp: str = "none"
    """Noise on the statistics: none, server (on the sum) or client (each on its own)."""
    dp_clip: float = 10.0
    """Largest norm of an embedding in the statistics (R), with dp."""
    dp_noise: float = 1.0
    """Noise multiplier (z) of the Gaussian mechanism."""
    dp_delta: float = 1e-5
    """Failure probability at which dp-epsilon is reported."""
    scale: float = 1.0
    """What the sums are divided by before they are sent, for secure.enabled; see the metric secure-clipped."""

    def __post_init__(self) -> None:
        for name, known in (
            ("centre", CENTRES),
            ("spread", ("sqrt", "lambda")),
            ("stretch", ("none", "top", "bottom")),
            ("protocol", ("rounds", "one_shot")),
            ("dp", ("none", "server", "client")),
        ):
            value = getattr(self, name)
            require(value in known, f"strategy.{name} is '{value}'; choose from {', '.join(known)}.")
        for name, least in (("T", 0), ("M", 1), ("rank", 0), ("client_rank", 0), ("n_floor", 0)):
            value = getattr(self, name)
            require(value >= least, f"strategy.{name} is {value}; give {least} or more.")
        for name in ("dp_clip", "scale"):
            value = getattr(self, name)
            require(
                math.isfinite(value) and value > 0,
                f"strategy.{name} is {value}; give a finite number above 0.",
            )
        for name in ("dp_noise", "trace_limit"):
            value = getattr(self, name)
            require(
                math.isfinite(value) and value >= 0,
                f"strategy.{name} is {value}; give a finite number, 0 or more.",
            )
        require(
            0 < self.guide_fraction <= 1,
            f"strategy.guide_fraction is {self.guide_fraction}; give a share above 0, at most 1.",
        )
        require(
            0 < self.dp_delta < 1, f"strategy.dp_delta is {self.dp_delta}; give a number between 0 and 1."
        )
        require(
            self.dp != "client" or not self.client_rank,
            "strategy.dp=client adds noise to the moment sums, which strategy.client_rank replaces; set one of them.",
        )

    @property
    def asks(self) -> bool:
        """Whether the clients are asked for statistics at all."""
        return self.T > 0 and self.centre != DUPLICATE

    @property
    def relays(self) -> bool:
        """Whether clients receive each other's class means."""
        return self.asks and self.centre in (DOMAINS, PROTOTYPE)


class GgeurHalf(ClientHalf):
    """Sends statistics, generates once, and is the base algorithm's client on the balanced set."""

    params: GgeurParams

    def __init__(self, params: GgeurParams, base: ClientHalf) -> None:
        super().__init__(params)
        self.base = base
        self.stateful = base.stateful or params.T > 0 or params.protocol == "one_shot"

    def private(self, info: ModelInfo) -> frozenset[str]:
        return self.base.private(info)

    def frozen(self, info: ModelInfo) -> frozenset[str]:
        return self.base.frozen(info)

    def query(self, local: LocalRound) -> Reply:
        if local.phase != STATISTICS:
            return self.base.query(local)
        # Statistics are taken on the CPU, whatever the device, and so is their noise.
        noise = seeds.torch_rng(local.seed, "statistics noise", local.client, local.clock.round)
        stream = statistics(local.train_data, local.task.classes, self.params, noise)
        return Reply({STATISTICS: stream}, {"num-examples": len(local.train_data)})

    def run(self, local: LocalRound) -> Reply:
        p = self.params
        if p.T and BALANCED not in local.state:
            local.state[BALANCED] = generated(local, p)
        opened = self._opened(local)
        if p.protocol == "one_shot":
            own = local.state.get(HEAD) or opened.received[MODEL]
            opened = replace(opened, received={**opened.received, MODEL: own})
            opened.load(own)
        reply = self.base.run(opened)
        if p.protocol == "one_shot":
            local.state[HEAD] = shared_model(local, frozenset())
        local.optimizer_steps = opened.optimizer_steps
        return reply

    def predictors(self, local: LocalRound) -> Mapping[str, Predictor]:
        return self.base.predictors(self._opened(local))

    def _opened(self, local: LocalRound) -> LocalRound:
        """Return the round as the base's client sees it."""
        if BALANCED not in local.state:
            # Not asked yet: nothing has been generated, and an evaluation needs nothing.
            return local
        balanced = local.state[BALANCED]
        steps = local.local.steps_per_round(len(balanced["rows"]) + len(balanced["y"]))
        # An evaluation seldom needs the set itself, so it is put together only where somebody asks for it.
        return replace(
            local,
            open_train=lambda: balanced_data(local.train_data, balanced),
            clock=replace(local.clock, steps=steps),
        )


def statistics(data: ClientData, classes: int, p: GgeurParams, generator: torch.Generator) -> Tensors:
    """Return what a client says about its classes: moment sums, or low-rank statistics."""
    x, y = data.x.flatten(1).cpu().double(), data.y.cpu()
    if len(y) and int(y.min()) < 0:
        raise ClientError(
            "some of this client's samples have no label, and GGEUR needs each; set data.labelled=1"
        )
    enough = torch.bincount(y, minlength=classes) >= p.n_floor
    x, y = x[enough[y]], y[enough[y]]
    if p.dp != "none":
        x = clipped(x, p.dp_clip)
    moments = Moments.of(x, y, classes)
    if p.dp == "client":
        moments = noised(moments, p.dp_noise, p.dp_clip, generator)
    if p.client_rank:
        return low_rank(moments, p.client_rank)
    return moments.times(1 / p.scale).tensors()


def generated(local: LocalRound, p: GgeurParams) -> Tensors:
    """Return the client's balanced set, made with the shapes that it received, as its state holds it."""
    data, classes = local.train_data, local.task.classes
    stream = partial(seeds.numpy_rng, local.seed, "ggeur", local.client)
    rule = Rule(p.T, p.centre, p.spread, p.M)
    made = balanced(data.x.flatten(1).cpu(), data.y.cpu(), knowledge(local.received, classes), rule, stream)
    return {"rows": made.rows, "x": made.x.reshape(-1, *data.x.shape[1:]), "y": made.y}


def knowledge(received: Mapping[str, Mapping[str, Tensor]], classes: int) -> Sequence[ClassKnowledge | None]:
    """Return what was received about every class."""
    found = received.get(SHAPES)
    if found is None:
        return [None] * classes
    others = received.get(PROTOTYPES)
    return [
        ClassKnowledge(
            found["values"][c],
            found["vectors"][c],
            found["mean"][c] if "mean" in found else None,
            others["mean"][others["known"][:, c] > 0, c] if others is not None else None,
        )
        for c in range(classes)
    ]


def balanced_data(data: ClientData, state: Mapping[str, Tensor]) -> ClientData:
    """Return the kept samples followed by the generated ones, whose ``index`` is -1; extras are left out."""
    rows, device = state["rows"].to(data.x.device), data.x.device
    index = torch.full((len(state["y"]),), -1, dtype=torch.int64, device=device)
    return replace(
        data,
        x=torch.cat([data.x[rows], state["x"].to(device)]),
        y=torch.cat([data.y[rows], state["y"].to(device)]),
        index=torch.cat([data.index[rows], index]),
        extras={},
    )


@STRATEGIES.register("ggeur")
class Ggeur(Composed):
    """The statistics round, and the shapes beside the first training message of every client."""

    Params = GgeurParams
    params: GgeurParams

    def __init__(self, params: GgeurParams | None = None) -> None:
        params = GgeurParams() if params is None else params
        super().__init__(params, inner_strategy(params.base, params.base_options))
        self.half = GgeurHalf(params, self.base.half)
        self.sums_in_queries = params.asks
        alone = params.relays or params.client_rank > 0 or params.guide_fraction < 1
        self.individual_replies = self.base.individual_replies or alone

    def own_phases(self) -> list[Phase]:
        return [Phase(STATISTICS, 1, "query", everyone=True, preparatory=True)] if self.params.asks else []

    def setup(self, setting: Setting) -> None:
        super().setup(setting)
        if not self.params.T:
            return
        require(
            setting.local.augment == "none",
            f"GGEUR trains on embeddings and local.augment={setting.local.augment} is made for images; set it to none.",
        )
        if setting.server is not None:
            dataset = setting.server.dataset
            size = math.prod(dataset.input_shape)
            require(
                dataset.task == "classification" and dataset.train.inputs.dtype != torch.int64,
                f"GGEUR needs one class for each embedding, and '{dataset.name}' has neither; choose an image set.",
            )
            require(
                size <= LARGEST,
                f"GGEUR keeps a covariance of every class and a sample has {size} numbers; choose an encoder, for "
                "example encoder=patches.",
            )
            empty = [dataset.classes[c] for c, n in enumerate(setting.class_counts) if not n]
            require(
                not empty,
                f"No client has a sample of class '{', '.join(empty[:5])}', so it has no shape; choose a data set or "
                "partition that has all classes.",
            )

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        asked = list(super().configure_train(server_round, arrays, config, grid))
        if self.own or not self.params.asks:
            return asked
        informed = set(self.state[INFORMED]["node"].tolist())
        shared = messages.array_record(self.state[SHAPES])
        contents: dict[int, RecordDict] = {}
        for message in asked:
            node, content = message.metadata.dst_node_id, message.content
            if node in informed:
                continue
            if self.params.relays:
                message.content = RecordDict({**content, SHAPES: shared, PROTOTYPES: self._others(node)})
            else:
                # Messages that shared a content share the longer one too.
                message.content = contents.setdefault(id(content), RecordDict({**content, SHAPES: shared}))
        return asked

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        replies = list(replies)
        if self.own:
            usable = [decode(reply) for reply in replies if reply.has_content()]
            return None, self._shape(server_round, usable)
        aggregated = super().aggregate_train(server_round, replies)
        if self.params.asks:
            nodes = {reply.metadata.src_node_id for reply in replies if reply.has_content()}
            nodes |= set(self.state[INFORMED]["node"].tolist())
            self.state[INFORMED] = {"node": torch.tensor(sorted(nodes), dtype=torch.int64)}
        return aggregated

    def _shape(self, server_round: int, replies: list[ClientReply]) -> MetricRecord:
        """Make the shapes from the clients' statistics; return the metrics of the round."""
        p = self.params
        metrics = mean_metrics([reply.metrics for reply in replies])
        replies = self.transformed(server_round, replies)
        for transform in self.transforms:
            metrics.update(transform.metrics())
        merged = any(transform.merges for transform in self.transforms)
        read = {r.node: self._read(r.streams[STATISTICS]) for r in replies}
        known = {node: m for node, m in read.items() if merged or self._believed(node, m)}
        if not known:
            raise RunError(
                "The statistics of every client were rejected; " + next(iter(self.rejected.values()))
            )
        parts = list(known.values())
        if p.guide_fraction < 1:
            guides = guiding(torch.stack([m.count for m in parts]), p.guide_fraction)
            parts = [m.times(guide.double()) for m, guide in zip(parts, guides, strict=True)]
        moments = self._whole(total(parts), merged)
        values, vectors = shapes(moments.covariance, p.rank)
        values = stretched(values, p.stretch)
        self.state[SHAPES] = {"values": values.float(), "vectors": vectors.float()}
        if p.centre == GLOBAL_MEAN:
            self.state[SHAPES]["mean"] = moments.mean.float()
        if p.relays:
            self.state[PROTOTYPES] = {
                "node": torch.tensor(list(known), dtype=torch.int64),
                "mean": torch.stack([m.mean for m in known.values()]).float(),
                "known": torch.stack([(m.count > 0).to(torch.uint8) for m in known.values()]),
            }
        self.state[INFORMED] = {"node": torch.empty(0, dtype=torch.int64)}
        metrics["statistics-rejected"] = len(self.rejected)
        metrics["shape-trace"] = float(values.sum(1).mean())
        if p.dp != "none":
            metrics["dp-epsilon"] = gaussian_epsilon(p.dp_delta, p.dp_noise)
        return metrics

    def _read(self, stream: Mapping[str, Tensor]) -> Moments:
        if self.params.client_rank:
            return from_low_rank(stream)
        return Moments.read(stream).times(self.params.scale)

    def _believed(self, node: int, moments: Moments) -> bool:
        """Whether some data set could have such statistics; if not, the client is noted as rejected."""
        p = self.params
        found = None if p.dp == "client" else fault(moments)
        if found is None and p.trace_limit:
            squares = moments.covariance.diagonal(dim1=1, dim2=2).sum(1) + moments.mean.square().sum(1)
            beyond = torch.nonzero(squares > p.trace_limit).flatten().tolist()
            if beyond:
                c = beyond[0]
                found = c, f"its mean squared norm {float(squares[c]):.4g} is above strategy.trace_limit"
        if found is not None:
            self.rejected[node] = f"statistics of class {found[0]} cannot be used: {found[1]}"
        return found is None

    def _whole(self, moments: Moments, merged: bool) -> Moments:
        """Return the sums of all clients as they are used; raises ``RunError`` for a class that nobody has."""
        p = self.params
        if p.dp == "server":
            seed = self.setting.seed if self.setting else 0
            moments = noised(moments, p.dp_noise, p.dp_clip, seeds.torch_rng(seed, "statistics noise"))
        if p.dp != "none":
            # A noisy count below one is no count.
            return replace(moments, count=moments.count.clamp(min=1.0))
        # The rounding of masked sums is below a sample.
        count = moments.count.round() if merged else moments.count
        empty = torch.nonzero(count <= 0).flatten().tolist()
        if empty:
            raise RunError(
                f"No usable client has a sample of class {empty[0]} for its statistics; give the clients such samples, "
                "or lower strategy.n_floor."
            )
        return replace(moments, count=count)

    def _others(self, node: int) -> ArrayRecord:
        """Return the prototypes of all clients but one."""
        found = self.state[PROTOTYPES]
        others = found["node"] != node
        return messages.array_record({"mean": found["mean"][others], "known": found["known"][others]})
