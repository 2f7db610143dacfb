"""Attacks on language models: which tokens a client trained on, and in what order.

======================  =============================================================================================
``Tokens``              a search space: a distribution over tokens at every place of every sequence
``PositionReadOut``     the tokens of one sequence, solved for, where a model has a table of positions
======================  =============================================================================================

A client's sample is L + 1 tokens t_0 .. t_L: x = t_0 .. t_{L-1} goes in, y = t_1 .. t_L is predicted. Two things are
known without any search. The gradient of the embedding table is 0 in the rows of all tokens that did not go in. And the
head's bias counts those that were to be predicted, as it counts labels (``flowerbed.strategies.attacks.labels``).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F

from flowerbed import seeds
from flowerbed.errors import ConfigError, require
from flowerbed.models.base import ModelSpec
from flowerbed.models.transformer import Positions
from flowerbed.strategies.attacks import candidates
from flowerbed.strategies.attacks import labels as label_rules
from flowerbed.strategies.attacks.objectives import layers as layers_distance
from flowerbed.strategies.attacks.observation import (
    Gradient,
    Observation,
    Reconstruction,
    SideInfo,
    batch_size,
    gradient_of,
)
from flowerbed.strategies.attacks.spaces import Rows, Space, Variables

if TYPE_CHECKING:
    # Both are made of this module.
    from flowerbed.strategies.attacks.costs import Costs
    from flowerbed.strategies.attacks.descents import Watch

TOKENS = "tokens"
FAINT = 1e-6
"""Rows of the embedding's gradient below this share of the largest are rounding."""
NEVER = -1e4
"""The logit of a token that is not there."""
MOVES = ("swap", "move", "span", "prefix")
TOGETHER = 25
"""Moves that are tried at a time."""


@runtime_checkable
class TextSpace(Protocol):
    """What a search space has beside the rest if its samples are tokens."""

    def told(self, side: SideInfo, model: ModelSpec) -> Space:
        """Return the space with what the threat model grants of language."""

    def targets(self, variables: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        """Return what is predicted, as probabilities ``(B, L, V)``. Pure; works under ``vmap``."""

    def settled(self, variables: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        """Return the tokens of one row, int64 ``(B, L + 1)``."""

    def moved(self, variables: Variables, costs: Costs, seed: int, stage: int) -> None:
        """Make discrete moves on all rows where they lower the cost, in place, after a stage."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """Logits ``(B, L + 1, V)``: distributions over the tokens that are there (LAMP, Balunovic et al. 2022).

    LAMP searches for embeddings and takes the nearest tokens at the end. Here an embedding is a mean over tokens, so
    that the gradient of the table and the shifted targets follow from one and the same variable. As there, stages of
    Adam alternate with discrete moves: two tokens swap, a token or a span goes elsewhere, a prefix goes to the end; a
    move stays if it lowers the cost. A bigram model of public text takes the place of GPT-2's perplexity.
    """

    stages: int = 10
    """Stages of Adam, with moves after each."""
    tries: int = 100
    """Moves tried after a stage, for every row."""
    language: float = 0.05
    """Weight of the mean negative log-likelihood of a token given the one before; without public text it is 0."""
    bigrams: Tensor | None = None
    """``(V, V)`` log-probabilities of the second token given the first, from public text."""

    @property
    def fixed(self) -> Variables:
        return {}

    def told(self, side: SideInfo, model: ModelSpec) -> Tokens:
        if side.surrogate is None or not self.language:
            return self
        return replace(self, bigrams=bigram_model(side.surrogate, model.num_classes))

    def open(self, rows: Rows) -> Variables:
        (length,) = rows.shape
        return {TOKENS: rows.draws("tokens", rows.batch, length + 1, rows.classes)}

    def decode(self, variables: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        """Return distributions ``(B, L, V)``; ``labels`` hold the tokens that are there, in any order."""
        return self._distributions(variables, labels)[:, :-1]

    def targets(self, variables: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        return self._distributions(variables, labels)[:, 1:]

    def settled(self, variables: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        return self._distributions(variables, labels).argmax(-1)

    def penalty(self, variables: Mapping[str, Tensor]) -> Tensor:
        if self.bigrams is None:
            return variables[TOKENS].new_zeros(())
        p = variables[TOKENS].softmax(-1)
        likelihood = torch.einsum("blv,vw,blw->bl", p[:, :-1], self.bigrams.to(p), p[:, 1:])
        return -self.language * likelihood.mean()

    def constrain(self, variables: Variables, rows: Rows) -> None:
        """Logits may go anywhere."""

    def advance(self, variables: Variables, labels: Tensor) -> tuple[Space, Variables] | None:
        if self.stages <= 1:
            return None
        return replace(self, stages=self.stages - 1), variables

    @torch.no_grad()
    def moved(self, variables: Variables, costs: Costs, seed: int, stage: int) -> None:
        for row in range(costs.rows.count):
            rng = seeds.torch_rng(seed, "token moves", row, stage)
            best = variables[TOKENS][row]
            given = costs.row(self, row)
            cost = functools.partial(costs.of, self)
            least = float(cost({TOKENS: best}, *given)[0])
            for _ in range(-(-self.tries // TOGETHER)):
                tried = torch.stack([rearranged(best, rng) for _ in range(TOGETHER)])
                if costs.loops:
                    found = torch.stack([cost({TOKENS: one}, *given)[0] for one in tried])
                else:
                    found = vmap(cost, in_dims=({TOKENS: 0}, *[None] * len(given)))({TOKENS: tried}, *given)[
                        0
                    ]
                costs.count(TOGETHER)
                place = int(found.nan_to_num(nan=torch.inf).argmin())
                if float(found[place]) < least:
                    best, least = tried[place], float(found[place])
            variables[TOKENS][row] = best

    def _distributions(self, variables: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        logits = variables[TOKENS]
        there = (labels.flatten()[:, None] == torch.arange(logits.shape[-1], device=logits.device)).any(0)
        return torch.where(there, logits, NEVER).softmax(-1)


def rearranged(sequences: Tensor, rng: torch.Generator) -> Tensor:
    """Return ``(B, L + 1, V)`` with the places of one random sequence rearranged by one random move."""

    def draw(end: int) -> int:
        return int(torch.randint(end, (1,), generator=rng))

    count, length = sequences.shape[:2]
    places, which, move = list(range(length)), draw(count), MOVES[draw(len(MOVES))]
    a, b = sorted((draw(length), draw(length)))
    if move == "swap":
        places[a], places[b] = places[b], places[a]
    elif move == "prefix":
        places = places[b:] + places[:b]
    else:
        taken = places[a : b + 1] if move == "span" else [places[a]]
        rest = [place for place in places if place not in taken]
        to = draw(len(rest) + 1)
        places = rest[:to] + taken + rest[to:]
    found = sequences.clone()
    found[which] = sequences[which][places]
    return found


def bigram_model(text: Tensor, vocab: int, smoothing: float = 0.1) -> Tensor:
    """Return log-probabilities ``(V, V)`` of a token given the one before, from sequences ``(N, L)``.

    Every count begins at ``smoothing`` times the token's share of the text.
    """
    share = (torch.bincount(text.flatten(), minlength=vocab).double() + 1) / (text.numel() + vocab)
    counts = (smoothing * vocab * share).expand(vocab, vocab).clone()
    pairs = text[:, :-1].flatten() * vocab + text[:, 1:].flatten()
    counts += torch.bincount(pairs, minlength=vocab * vocab).view(vocab, vocab)
    return (counts / counts.sum(1, keepdim=True)).log().float()


def embedding_of(module: nn.Module, model: ModelSpec) -> str:
    """Return the name of the embedding's table; raises ``ConfigError`` for a model that takes no tokens."""
    names = [name for name, part in module.named_modules() if isinstance(part, nn.Embedding)]
    if not names:
        raise ConfigError(
            f"The model '{model.name}' takes no tokens, so an attack on text has nothing to search for; use one on "
            "images."
        )
    return f"{names[0]}.weight"


def bag(observation: Observation, gradient: Gradient, size: int, side: SideInfo, seed: int) -> Tensor:
    """Return int64 ``(B, L + 1)`` that holds every token that the client had, in no order, frequent ones first.

    Tokens are there whose row of the embedding's gradient is not 0, and those that the head's gradient counts.
    """
    module, model = observation.module(), observation.model
    table = embedding_of(module, model)
    (length,) = model.input_shape
    rng = seeds.torch_rng(seed, "label dummies")
    x = side.surrogate
    if x is None:
        x = torch.randint(model.num_classes, (label_rules.DUMMIES, length), generator=rng)
    last = label_rules.last_layer(module, gradient, size * length, x)
    counts = torch.bincount(label_rules.restore("count", last), minlength=model.num_classes)
    went_in = gradient[table].abs().amax(1)
    there = (went_in > FAINT * went_in.max()) | (counts > 0)
    tokens = (counts + there.long()).argsort(descending=True, stable=True)[: int(there.sum())]
    wanted = size * (length + 1)
    return tokens.repeat(-(-wanted // len(tokens)))[:wanted].view(size, length + 1)


@dataclass(frozen=True)
class PositionReadOut:
    """The tokens of a single sequence, by least squares.

    With d_l = dL/de_l at place l, the gradient of the table of positions is d_l row by row, and that of the embedding
    is sum of d_l over the places that hold a token: dE = A dP with A_vl = 1 where t_l = v. Places that are independent
    (at most as many as the model is wide) give A. The last target is what the head's bias counts beyond those that
    went in. The gradient of a position embedding is also what APRIL begins with (Lu et al. 2022), for images.
    """

    name: str = "positions"

    def run(
        self,
        cases: Sequence[tuple[Observation, SideInfo]],
        *,
        seed: int = 0,
        device: torch.device | None = None,
        watch: Watch | None = None,
    ) -> list[Reconstruction]:
        """Attack every observation and return what was found, in their order.

        ``x`` and ``labels`` are int64 ``(1, L)``. Raises ``ConfigError`` for several sequences, a model without a table
        of positions, or more places than the model is wide.
        """
        found = []
        for place, (observation, side) in enumerate(cases):
            side.demand(self.name, "local")
            found.append(self._read(observation, side))
            if watch is not None:
                watch(place + 1, len(cases))
        return found

    def _read(self, observation: Observation, side: SideInfo) -> Reconstruction:
        started = time.perf_counter()
        module, model = observation.module().eval(), observation.model
        table = embedding_of(module, model)
        names = [f"{n}.table" for n, part in module.named_modules() if isinstance(part, Positions)]
        require(
            bool(names),
            f"The attack '{self.name}' needs a table of positions, and '{model.name}' has none; use attack=lamp.",
        )
        size = batch_size(observation, side)
        require(
            size == 1,
            f"The attack '{self.name}' reads one sequence, and the update is that of {size}; use attack=lamp.",
        )
        gradient = gradient_of(observation, side)
        places, tokens = gradient[names[0]].double(), gradient[table].double()
        rank = int(torch.linalg.matrix_rank(places))
        require(
            rank == len(places),
            f"The attack '{self.name}' tells {rank} of {len(places)} places apart; it needs all, so a model that is "
            "wider than its sequences are long.",
        )
        solved = tokens @ torch.linalg.pinv(places)
        x = solved.argmax(0)[None]
        with torch.no_grad():
            p = module(x).double().softmax(-1).mean((0, 1))
        last = label_rules.last_layer(module, gradient, x.shape[1], x)
        counts = torch.bincount(
            label_rules.restore("count", replace(last, probabilities=p)), minlength=model.num_classes
        )
        counts -= torch.bincount(x[0, 1:], minlength=model.num_classes)
        labels = torch.cat([x[:, 1:], counts.argmax().view(1, 1)], 1)
        named = {n: v for n, v in module.named_parameters() if n in gradient}
        made, _ = candidates.gradient(module, named, dict(module.named_buffers()), x, labels)
        cost = float(layers_distance({n: v.detach() for n, v in made.items()}, gradient))
        told = {"certain": float(solved.amax(0).min())}
        return Reconstruction(x, labels, cost, 1, time.perf_counter() - started, (), told)


class SoftEmbedding(nn.Module):
    """An embedding that also takes distributions over tokens ``(..., V)``, with the same parameter."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        assert isinstance(weight, nn.Parameter)
        self.weight = weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Return embeddings of tokens, or their means under distributions."""
        if tokens.is_floating_point():
            mean: Tensor = tokens @ self.weight
            return mean
        return F.embedding(tokens, self.weight)


def take_distributions(module: nn.Module) -> None:
    """Let every embedding of a model take distributions over tokens as well."""
    for part in list(module.modules()):
        for name, child in part.named_children():
            if isinstance(child, nn.Embedding):
                setattr(part, name, SoftEmbedding(child.weight))
