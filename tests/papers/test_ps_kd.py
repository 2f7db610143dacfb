"""PS-KD: its identities and pitfalls."""

from __future__ import annotations

import pytest
import torch
import worlds
from torch import Tensor, nn
from torch.nn import functional as F

from flowerbed.clients.local_round import MODEL, Trained
from flowerbed.clients.memory import SampleMemory
from flowerbed.clients.params import LocalParams
from flowerbed.datasets.augment import shift
from flowerbed.datasets.sources import load_dataset
from flowerbed.errors import ConfigError
from flowerbed.experiments.measures import Measured
from flowerbed.experiments.papers.ps_kd import PAST, PsKdHalf, PsKdParams, confidence
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Classification
from flowerbed.seeds import torch_rng

PS_KD = "flowerbed.experiments.papers.ps_kd:PsKd"
ONE = {"clients": 1}


def loss_of(logits: Tensor, y: Tensor, past: Tensor, alpha: float, **params: object) -> Tensor:
    """Return the loss at given logits; the model is the identity."""
    half = PsKdHalf(PsKdParams(**params))  # type: ignore[arg-type]
    ids = torch.arange(len(y))
    memory = SampleMemory(ids, past, ids)
    batch = {"x": logits, "y": y, "index": ids, "alpha": torch.tensor(alpha, dtype=logits.dtype)}
    value, _ = half.loss(
        ModelParts.resident(nn.Identity()), batch, {PAST: memory}, Classification(logits.shape[1])
    )
    return value


def draws(n: int = 7, classes: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    logits = torch.randn(n, classes, generator=rng, dtype=torch.float64, requires_grad=True)
    past = torch.randn(n, classes, generator=rng, dtype=torch.float64).softmax(-1)
    return logits, torch.randint(classes, (n,), generator=rng), past


def test_loss_is_the_cross_entropy_with_the_blended_target() -> None:
    logits, y, past = draws()
    target = 0.7 * F.one_hot(y, 5).double() + 0.3 * past
    assert torch.allclose(target.sum(1), torch.ones(7, dtype=torch.float64))
    expected = -(target * logits.log_softmax(-1)).sum(1).mean()
    torch.testing.assert_close(loss_of(logits, y, past, 0.3), expected)


def test_gradient_of_the_true_class_is_rescaled_by_the_past() -> None:
    """Ratio to cross entropy: r = 1 - alpha (1 - p_past) / (1 - p); negative where now is far surer than then."""
    logits, y, past = draws()
    alpha = 0.6
    (mine,) = torch.autograd.grad(loss_of(logits, y, past, alpha), logits)
    (plain,) = torch.autograd.grad(F.cross_entropy(logits, y), logits)
    rows = torch.arange(len(y))
    p = logits.detach().softmax(-1)[rows, y]
    r = 1 - alpha * (1 - past[rows, y]) / (1 - p)
    torch.testing.assert_close(mine[rows, y] / plain[rows, y], r, rtol=0, atol=1e-6)
    assert (r < 1).all()


def test_towards_uniform_it_is_label_smoothing() -> None:
    logits, y, past = draws()
    expected = F.cross_entropy(logits, y, label_smoothing=0.37)
    torch.testing.assert_close(loss_of(logits, y, past, 0.37, target="uniform"), expected)


def test_alpha_zero_is_fedavg_bit_for_bit() -> None:
    options = {"federation": {"clients": 3, "rounds": 3}}
    mine = worlds.run(PS_KD, {"alpha": 0.0}, **options).result.model
    assert worlds.equal(mine, worlds.run("fedavg", **options).result.model)
    other = worlds.run(PS_KD, {"alpha": 0.8}, **options).result.model
    assert not worlds.equal(mine, other)


def test_alpha_grows_with_the_epoch_and_ends_at_alpha_t() -> None:
    world = worlds.run(PS_KD, {"alpha": 0.8}, federation={"clients": 1, "rounds": 2}, local={"epochs": 2})
    alphas = [r.metrics["alpha"] for r in world.result.history if "alpha" in r.metrics]
    # Epochs 1 to 4 of 4: 0.2, 0.4, 0.6, 0.8, as the mean of the two of each round.
    assert alphas == pytest.approx([0.3, 0.7])
    steady = worlds.run(PS_KD, {"alpha": 0.1, "ramp": "constant"}, federation=ONE)
    assert [r.metrics["alpha"] for r in steady.result.history if "alpha" in r.metrics] == pytest.approx(
        [0.1, 0.1]
    )


def test_memory_is_what_the_network_said_in_training_mode_on_the_same_views() -> None:
    """With a learning rate of 0 the network is frozen, so the memory can be computed afterwards."""
    world = worlds.run(
        PS_KD,
        federation={"clients": 1, "rounds": 2},
        local={"lr": 0.0, "augment": "shift"},
        model={"name": "worlds:bn_net"},
    )
    parts, memory = world.parts, world.state(0)[f"memory {PAST}"]
    net = parts.spec.model.build(3).train()
    indices = torch.from_numpy(parts.train.indices(0).copy())
    x = parts.dataset.prepare(parts.dataset.train.inputs[indices])
    per_epoch = -(-len(x) // worlds.BATCH)
    for place, rows in enumerate(torch.split(worlds.order_of(0, len(x), 1), worlds.BATCH)):
        step = per_epoch + place
        view = shift(x[rows], torch_rng(3, "augment", 0, step))
        said = memory["values"][torch.searchsorted(memory["ids"], indices[rows])]
        torch.testing.assert_close(said, net(view).detach().softmax(-1), rtol=1e-5, atol=1e-6)
        assert (memory["written"][torch.searchsorted(memory["ids"], indices[rows])] == step).all()


def test_a_sample_that_was_left_out_still_has_a_whole_target() -> None:
    """The released code reads a zero row there, and the target sums to 1 - alpha."""
    world = worlds.run(PS_KD, federation={"clients": 1, "rounds": 1}, local={"drop_last": True})
    memory = world.state(0)[f"memory {PAST}"]
    left_out = memory["written"] == -1
    assert int(left_out.sum()) == len(memory["ids"]) % worlds.BATCH > 0
    torch.testing.assert_close(memory["values"].sum(1), torch.ones(len(memory["ids"])))
    assert set(memory["values"][left_out].unique().tolist()) == {0.0, 1.0}


def test_the_memory_never_leaves_the_client() -> None:
    local = worlds.open_round(LocalParams(batch_size=4))
    half = PsKdHalf(PsKdParams())
    streams = half.end(local, Trained(1, 20, 0.1, {}), half.begin(local))
    assert streams.keys() == {MODEL}
    assert f"memory {PAST}" in local.state


def test_clients_remember_their_own_samples_only() -> None:
    world = worlds.run(PS_KD)
    for client in range(4):
        ids = world.state(client)[f"memory {PAST}"]["ids"]
        assert ids.tolist() == sorted(world.parts.train.indices(client).tolist())


def test_confidence_figures_against_a_slow_twin() -> None:
    data = load_dataset("digits")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    found = confidence(Measured(net, data, 0, torch.device("cpu")))
    p = net(data.prepare(data.test.inputs)).detach().double().softmax(-1)
    sure, guess = p.max(1)
    right = (guess == data.test.labels).tolist()
    ranked = sorted(range(len(right)), key=lambda i: -float(sure[i]))
    risks, errors = [], 0
    for n, i in enumerate(ranked, start=1):
        errors += not right[i]
        risks.append(errors / n)
    best = [max(0, n - sum(right)) / n for n in range(1, len(right) + 1)]
    ece = 0.0
    for b in range(10):
        inside = [i for i in range(len(right)) if b / 10 < float(sure[i]) <= (b + 1) / 10]
        ece += abs(sum(right[i] - float(sure[i]) for i in inside)) / len(right)
    aurc = sum(risks) / len(risks)
    assert found == pytest.approx(
        {
            "error": 1 - sum(right) / len(right),
            "ece-10": ece,
            "aurc": aurc,
            "e-aurc": aurc - sum(best) / len(best),
        }
    )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"alpha": 1.5}, "strategy.alpha is 1.5"),
        ({"ramp": "steep"}, "strategy.ramp is 'steep'"),
        ({"target": "future"}, "strategy.target is 'future'"),
    ],
)
def test_wrong_parameters_are_refused(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        PsKdParams(**options)  # type: ignore[arg-type]
