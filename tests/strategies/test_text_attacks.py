"""Text: relaxed tokens against the central gradient, what is there without a search, moves, and the whole search."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attack_nets import tiny_text
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from flowerbed.clients.params import LocalParams
from flowerbed.errors import ConfigError
from flowerbed.models.base import ModelSpec
from flowerbed.strategies.attacks import candidates
from flowerbed.strategies.attacks.descents import Descent
from flowerbed.strategies.attacks.inversion import Inversion
from flowerbed.strategies.attacks.observation import Gradient, Observation, SideInfo, gradient_of
from flowerbed.strategies.attacks.presets import ATTACKS
from flowerbed.strategies.attacks.text import (
    TOKENS,
    PositionReadOut,
    Tokens,
    bag,
    bigram_model,
    rearranged,
    take_distributions,
)

LENGTH, VOCAB = 6, 8
GPT = ModelSpec("gpt_tiny", (LENGTH,), VOCAB, {"width": 16, "depth": 1, "heads": 2})
LSTM = ModelSpec("char_lstm", (LENGTH,), VOCAB, {"hidden": 12, "depth": 1})
SIDE = SideInfo(local=LocalParams(lr=1.0, batch_size=0, steps=1))


def text(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCAB, (count, LENGTH + 1), generator=rng)
    return tokens[:, :-1], tokens[:, 1:]


def central(spec: ModelSpec, x: Tensor, y: Tensor, seed: int = 0) -> Gradient:
    module = spec.build(seed).eval()
    named = dict(module.named_parameters())
    loss = F.cross_entropy(module(x).transpose(1, 2), y, reduction="none").mean(1).mean()
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def observed(spec: ModelSpec, x: Tensor, y: Tensor, seed: int = 0) -> Observation:
    sent = {n: v.detach().clone() for n, v in spec.build(seed).state_dict().items()}
    moved = {n: sent[n] - g for n, g in central(spec, x, y, seed).items()}
    return Observation(0, 1, spec, sent, {**sent, **moved}, len(y))


@pytest.mark.parametrize("spec", [GPT, LSTM], ids=["gpt", "lstm"])
def test_sure_distributions_have_the_gradient_of_tokens(spec: ModelSpec) -> None:
    x, y = text(3)
    module = spec.build(0).eval()
    take_distributions(module)
    one_hot = [F.one_hot(t, VOCAB).float() for t in (x, y)]
    for given_x, given_y in ((x, y), tuple(one_hot)):
        found, _ = candidates.gradient(module, dict(module.named_parameters()), {}, given_x, given_y)
        for name, value in central(spec, x, y).items():
            torch.testing.assert_close(found[name].detach(), value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("spec", [GPT, LSTM], ids=["gpt", "lstm"])
def test_every_token_that_was_there_is_known(spec: ModelSpec) -> None:
    for seed in range(5):
        x, y = text(1, seed)
        seen = observed(spec, x, y, seed)
        found = bag(seen, gradient_of(seen, SIDE), 1, SIDE, seed)
        assert found.shape == (1, LENGTH + 1)
        assert set(found.flatten().tolist()) == set(x.flatten().tolist()) | set(y.flatten().tolist())


@settings(max_examples=15, deadline=None)
@given(tokens=st.lists(st.integers(0, VOCAB - 1), min_size=LENGTH + 1, max_size=LENGTH + 1))
def test_one_sequence_is_solved_for(tokens: list[int]) -> None:
    """Whatever its repeats."""
    row = torch.tensor([tokens])
    x, y = row[:, :-1], row[:, 1:]
    (found,) = PositionReadOut().run([(observed(GPT, x, y), SIDE)])
    assert found.x.tolist() == x.tolist()
    assert found.labels.tolist() == y.tolist()
    assert found.found["certain"] > 0.99
    assert found.cost < 1e-4


@pytest.mark.parametrize(
    ("spec", "count", "sentence"),
    [
        (LSTM, 1, "needs a table of positions, and 'char_lstm' has none"),
        (GPT, 2, "reads one sequence, and the update is that of 2"),
        (replace(GPT, options={"width": 4, "depth": 1, "heads": 2}), 1, "of 6 places apart"),
    ],
)
def test_what_positions_cannot_tell_is_refused(spec: ModelSpec, count: int, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        PositionReadOut().run([(observed(spec, *text(count)), SIDE)])


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_a_move_rearranges_one_sequence(seed: int) -> None:
    sequences = torch.arange(3 * 5 * 2).view(3, 5, 2)
    found = rearranged(sequences, torch.Generator().manual_seed(seed))
    changed = [i for i in range(3) if not torch.equal(found[i], sequences[i])]
    assert len(changed) <= 1
    for before, after in zip(sequences, found, strict=True):
        assert sorted(after.tolist()) == before.tolist()


def test_a_bigram_model_by_hand() -> None:
    found = bigram_model(torch.tensor([[0, 1, 1], [0, 1, 0]]), 2, smoothing=0.0).exp()
    # 0 is followed by 1 twice; 1 by 1 and by 0 once each.
    torch.testing.assert_close(found, torch.tensor([[0.0, 1.0], [0.5, 0.5]]))
    smooth = bigram_model(torch.tensor([[0, 1, 1], [0, 1, 0]]), 3).exp()
    torch.testing.assert_close(smooth.sum(1), torch.ones(3))
    assert float(smooth.min()) > 0


def test_likely_text_costs_less() -> None:
    data = tiny_text(LENGTH)
    space = Tokens(language=1.0).told(replace(SIDE, surrogate=data.test.inputs), GPT)
    follow = torch.arange(LENGTH + 1) % VOCAB
    costs = [
        float(space.penalty({TOKENS: 20.0 * F.one_hot(row, VOCAB)[None]})) for row in (follow, follow.flip(0))
    ]
    assert 0 < costs[0] < costs[1]
    assert float(Tokens().penalty({TOKENS: torch.zeros(1, LENGTH + 1, VOCAB)})) == 0


def test_tokens_that_are_not_there_are_never_found() -> None:
    space, there = Tokens(), torch.tensor([[1, 2, 2]])
    logits = torch.zeros(2, 5, VOCAB)
    logits[..., 7] = 50
    assert set(space.settled({TOKENS: logits}, there).flatten().tolist()) <= {1, 2}


def test_the_search_finds_a_sequence_and_what_follows() -> None:
    x, y = text(1, seed=4)
    lamp = ATTACKS.get("lamp")(None)
    assert isinstance(lamp, Inversion)
    short = replace(lamp, space=Tokens(stages=2, tries=50), descents=(Descent(steps=50, lr=0.1),), restarts=2)
    (found,) = short.run([(observed(GPT, x, y), SIDE)])
    assert found.x.tolist() == x.tolist()
    assert found.labels.tolist() == y.tolist()
    assert found.cost < 1e-4
    assert found.evaluations == 2 * 2 * (50 + 50 + 1)


def test_recurrent_nets_are_searched_row_by_row() -> None:
    x, y = text(2, seed=4)
    attack = Inversion("mine", Tokens(stages=1, tries=25), descents=(Descent(steps=25, lr=0.1),))
    (found,) = attack.run([(observed(LSTM, x, y), SIDE)])
    assert found.x.shape == x.shape
    assert found.x.dtype == torch.int64
    assert found.curve[-1] < 0.7 * found.curve[0]


def test_moves_only_ever_help() -> None:
    """From the right tokens in a wrong order, without a step of Adam."""
    x, y = text(1, seed=2)
    tokens = torch.cat([x, y[:, -1:]], 1)

    class Shuffled(Tokens):
        def open(self, rows: object) -> dict[str, Tensor]:
            wrong = tokens[:, [1, 0, 2, 3, 5, 4, 6]]
            return {TOKENS: 20.0 * F.one_hot(wrong, VOCAB)[None].float()}

    still = Descent(steps=1, lr=1e-12)
    costs = [
        Inversion("mine", Shuffled(stages=1, tries=tries), descents=(still,))
        .run([(observed(GPT, x, y), SIDE)])[0]
        .cost
        for tries in (0, 1500)
    ]
    assert costs[1] < 1e-3 < costs[0]


def test_a_model_without_tokens_is_refused() -> None:
    spec = ModelSpec("mlp", (1, 8, 8), 4)
    module = spec.build(0)
    sent = dict(module.state_dict())
    seen = Observation(0, 1, spec, sent, {n: v + 1 for n, v in sent.items()}, 1)
    lamp = ATTACKS.get("lamp")(None)
    with pytest.raises(ConfigError, match="takes no tokens"):
        lamp.run([(seen, SIDE)])
