"""FedLoGe: three heads on one forward pass, realignment in closed form, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import loge_toys
import numpy as np
import pytest
import torch
import worlds
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from flowerbed import seeds
from flowerbed.clients.data import Batch
from flowerbed.clients.local_round import Extras, LocalRound
from flowerbed.clients.params import LocalParams
from flowerbed.clients.store import ClientState, DiskStore
from flowerbed.clients.training import train
from flowerbed.errors import ClientError, ConfigError
from flowerbed.experiments.config import Simulation
from flowerbed.experiments.parts import build_parts
from flowerbed.experiments.simulation import make_federation, open_grid, resume, simulate
from flowerbed.models.base import ModelSpec, Net
from flowerbed.models.parts import ModelParts
from flowerbed.models.sparse_etf import DIVISORS, SPARSE, SPARSE_BIAS, SparseEtf, sparse_simplex
from flowerbed.models.tasks import Task
from flowerbed.strategies import fedloge
from flowerbed.strategies.base import Phase
from flowerbed.strategies.fedloge import (
    FIXED,
    FORMS,
    FedLoGe,
    FedLoGeHalf,
    FedLoGeParams,
    auxiliary_head,
    generic_head,
    local_rows,
    logits,
    own_head,
)

# A simplex that 16 features take well in a tenth of a second.
RECIPE: dict[str, Any] = {"gamma": 1.0, "beta": 0.3, "ssec_steps": 200, "ssec_lr": 0.01}
MODEL: dict[str, Any] = {"name": "mlp", "hidden": [16]}
SPEC = FedLoGe().model_spec(ModelSpec("mlp", (6,), 3, {"hidden": (5,)}))
EVALUATED: dict[str, Any] = {"every": 1, "clients_every": 1}


def run(options: Mapping[str, Any] | None = None, **sections: Any) -> worlds.World:
    return worlds.run("fedloge", {**RECIPE, **(options or {})}, **{"model": MODEL, **sections})


def open_round(
    params: FedLoGeParams,
    local: LocalParams,
    *,
    state: ClientState | None = None,
    dtype: torch.dtype = torch.float64,
) -> LocalRound:
    """Return a local round whose model has a simplex of three classes in five dimensions."""
    opened = worlds.open_round(local, spec=SPEC, state=state, dtype=dtype)
    frame = sparse_simplex(5, 3, SparseEtf(0.2, 1.0, 50, 0.01), torch.Generator().manual_seed(2))
    bias = torch.tensor([0.1, -0.2, 0.3]) if params.ssec_bias == "random" else torch.zeros(3)
    opened.load({SPARSE: frame.T, SPARSE_BIAS: bias})
    return opened


def random_head(classes: int = 4, dim: int = 6, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(classes, dim, generator=generator, dtype=torch.float64),
        "bias": torch.randn(classes, generator=generator, dtype=torch.float64),
    }


# The construction, as a phase of the server.


def test_the_server_makes_the_simplex_once_and_it_is_everywhere_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With weight decay and momentum, which would move a parameter."""
    seen: set[bytes] = set()

    def watching(self: FedLoGeHalf, model: ModelParts, *rest: Any) -> Any:
        seen.add(b"".join(model.buffers[name].numpy().tobytes() for name in (SPARSE, SPARSE_BIAS)))
        return loss(self, model, *rest)

    loss = FedLoGeHalf.loss
    monkeypatch.setattr(FedLoGeHalf, "loss", watching)
    world = run(
        {"ssec_bias": "random"},
        local={"weight_decay": 0.1, "momentum": 0.9},
        federation={"clients": 4, "cohort": 2, "rounds": 4},
    )
    recipe = FedLoGeParams(**RECIPE).recipe
    frame = sparse_simplex(16, 10, recipe, seeds.torch_rng(3, "sparse simplex"))
    sparse, bias = (world.trained[name] for name in (SPARSE, SPARSE_BIAS))
    assert torch.equal(sparse, frame.T.float())
    assert int((sparse == 0).sum()) == int(0.3 * 160)
    assert 0 < float(bias.abs().max()) <= 16**-0.5
    assert seen == {sparse.numpy().tobytes() + bias.numpy().tobytes()}


def test_the_simplex_does_not_travel_back() -> None:
    local = open_round(FedLoGeParams(), LocalParams(lr=0.1), dtype=torch.float32)
    reply = FedLoGeHalf(FedLoGeParams()).run(local)
    assert reply.streams.keys() == {"arrays"}
    assert reply.streams["arrays"].keys() == local.model.state_dict().keys() - FIXED


def test_no_steps_and_no_sparsity_are_the_dense_simplex() -> None:
    world = run({"beta": 0.0, "ssec_steps": 0})
    gram = world.trained[SPARSE] @ world.trained[SPARSE].T
    torch.testing.assert_close(gram, 10 / 9 * torch.eye(10) - 1 / 9, rtol=0, atol=1e-6)
    assert not world.trained[SPARSE_BIAS].any()


def test_a_poor_simplex_is_said_to_be_one() -> None:
    model = {SPARSE: torch.zeros(10, 16), DIVISORS: torch.ones(10)}
    strategy = FedLoGe(FedLoGeParams(beta=0.6, ssec_steps=0))
    with pytest.warns(UserWarning, match=r"degrees apart, 96\.38 are possible; give strategy\.ssec_steps"):
        strategy.start_phase(Phase("train", 1), model)


def test_a_run_may_begin_with_what_another_delivered() -> None:
    delivered = run().result.model
    for classifier in ("sparse", "learned"):
        started = FedLoGe(FedLoGeParams(**RECIPE, classifier=classifier)).start_phase(
            Phase("train", 1), delivered
        )
        assert torch.equal(auxiliary_head(started)["weight"], delivered["head.weight"])


# The client: three optimizers, one forward pass.


def twin_steps(
    local: LocalRound, own: Mapping[str, Tensor], lr: float, momentum: float
) -> tuple[nn.Module, nn.Linear]:
    """Three torch optimizers on features, auxiliary and own head, as the released code has them; full batches."""
    net = copy.deepcopy(local.model)
    assert isinstance(net, Net)
    head = nn.Linear(5, 3, dtype=torch.float64)
    head.load_state_dict(dict(own))
    optimizers = [
        torch.optim.SGD(list(parameters), lr=lr, momentum=momentum)
        for parameters in (net.body.parameters(), net.head.parameters(), head.parameters())
    ]
    x, y = local.train_data.x, local.train_data.y
    for _ in range(3):
        features = net.body(x)
        losses = [
            F.cross_entropy(features @ net.head.sparse.T, y),  # type: ignore[union-attr,operator]
            F.cross_entropy(net.head(features.detach()), y),
            F.cross_entropy(head(features.detach()), y),
        ]
        for value, optimizer in zip(losses, optimizers):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    return net, head


def test_a_round_equals_three_optimizers_in_plain_torch() -> None:
    local = open_round(FedLoGeParams(), LocalParams(batch_size=0, epochs=3, lr=0.5, momentum=0.9))
    half = FedLoGeHalf(FedLoGeParams())
    net, head = twin_steps(local, own_head(local, "drawn"), lr=0.5, momentum=0.9)
    before = {name: value.clone() for name, value in local.model.state_dict().items()}
    reply = half.run(local)
    after = reply.streams["arrays"]
    worlds.close(after, {n: v for n, v in net.state_dict().items() if n not in FIXED})
    worlds.close(local.state["personal"], head.state_dict())
    assert all(not torch.equal(after[name], before[name]) for name in after)


def test_features_do_not_notice_the_two_detached_heads() -> None:
    params = LocalParams(batch_size=7, epochs=2, lr=0.3, momentum=0.9, weight_decay=0.01)
    with_heads, alone = (open_round(FedLoGeParams(), params, dtype=torch.float32) for _ in range(2))
    FedLoGeHalf(FedLoGeParams()).run(with_heads)

    def fixed_only(
        model: ModelParts, batch: Batch, extras: Extras, task: Task
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        return task.loss(F.linear(model.features(batch["x"]), model.buffers[SPARSE]), batch["y"]).mean(), {}

    train(alone, fixed_only, extras={}, frozen=frozenset({"head.weight", "head.bias"}))
    for name in alone.info.backbone:
        assert torch.equal(with_heads.model.state_dict()[name], alone.model.state_dict()[name]), name
    assert not torch.equal(
        with_heads.model.state_dict()["head.weight"], alone.model.state_dict()["head.weight"]
    )


def differentiated(
    params: FedLoGeParams,
) -> tuple[LocalRound, Extras, Mapping[str, Tensor], dict[str, Tensor]]:
    """Return a round, its extras, the loss parts, and every tensor that may move."""
    local = open_round(params, LocalParams())
    half = FedLoGeHalf(params)
    extras = half.begin(local)
    moving = {**local.parts.parameters, **half.further(extras)}
    for tensor in moving.values():
        tensor.requires_grad_()
    _, parts = half.loss(local.parts, local.train_data.batch(slice(None)), extras, local.task)
    return local, extras, parts, moving


OWNERS = {"fixed-loss": "body.", "auxiliary-loss": "head.", "local-loss": "personal "}


@pytest.mark.parametrize("name", OWNERS)
def test_each_loss_moves_its_own_part_and_nothing_else(name: str) -> None:
    _, _, parts, moving = differentiated(FedLoGeParams())
    gradients = torch.autograd.grad(parts[name], list(moving.values()), allow_unused=True)
    for tensor, gradient in zip(moving, gradients):
        assert (gradient is not None) == tensor.startswith(OWNERS[name]), tensor


@pytest.mark.parametrize("name", OWNERS)
@pytest.mark.parametrize("params", [FedLoGeParams(), FedLoGeParams(ssec_bias="random")])
def test_the_gradient_is_the_finite_difference_of_the_own_loss(name: str, params: FedLoGeParams) -> None:
    local, extras, _, moving = differentiated(params)
    half, batch = FedLoGeHalf(params), local.train_data.batch(slice(None))

    def losses() -> tuple[Tensor, Mapping[str, Tensor]]:
        return half.loss(local.parts, batch, extras, local.task)

    total, _ = losses()
    gradients = dict(zip(moving, torch.autograd.grad(total, list(moving.values()))))
    step = 1e-6
    for tensor_name, tensor in moving.items():
        if not tensor_name.startswith(OWNERS[name]):
            continue
        for i in range(tensor.numel()):
            with torch.no_grad():
                entry = tensor.view(-1)
                found = []
                for sign in (1, -1):
                    entry[i] += sign * step
                    found.append(float(losses()[1][name]))
                    entry[i] -= sign * step
            slope = (found[0] - found[1]) / (2 * step)
            assert float(gradients[tensor_name].view(-1)[i]) == pytest.approx(slope, abs=1e-7)


def test_a_federation_equals_a_plain_loop() -> None:
    """Four clients, two rounds, everything averaged by n_k but the own heads, which stay."""
    world = run({"local_init": "shared"})
    parts = world.parts
    net = parts.spec.model.build(3)
    assert isinstance(net, Net)
    shared = {**copy.deepcopy(net.state_dict()), **{n: world.trained[n] for n in FIXED}}
    own = [{"weight": shared["head.weight"].clone(), "bias": shared["head.bias"].clone()} for _ in range(4)]
    weights = [float(n) for n in parts.train.sizes]
    for t in range(2):
        arrived = []
        for client, head in enumerate(own):
            net.load_state_dict(shared)
            x = parts.dataset.prepare(parts.dataset.train.inputs[parts.train.indices(client)])
            y = parts.dataset.train.labels[parts.train.indices(client)]
            leaves = {name: value.requires_grad_() for name, value in head.items()}
            optimizer = torch.optim.SGD([*net.parameters(), *leaves.values()], lr=worlds.LR)
            for rows in torch.split(worlds.order_of(client, len(y), t), worlds.BATCH):
                optimizer.zero_grad()
                z = net.body(x[rows])
                F.cross_entropy(F.linear(z, shared[SPARSE]), y[rows]).backward()
                F.cross_entropy(net.head(z.detach()), y[rows]).backward()
                F.cross_entropy(F.linear(z.detach(), leaves["weight"], leaves["bias"]), y[rows]).backward()
                optimizer.step()
            own[client] = {name: value.detach() for name, value in leaves.items()}
            arrived.append(copy.deepcopy(net.state_dict()))
        shared = {n: worlds.mean([a[n] for a in arrived], weights).to(v.dtype) for n, v in shared.items()}
    worlds.close(world.trained, shared)
    for client, head in enumerate(own):
        worlds.close(world.state(client)["personal"], head)


def test_one_client_is_the_central_form() -> None:
    """Features are trained against W_s centrally; both heads, started alike, stay alike; LA squares the lengths."""
    world = run(
        {"local_init": "shared"},
        federation={"clients": 1, "rounds": 3},
        local={"momentum": 0.5, "persist": True},
        evaluation=EVALUATED,
    )
    own = world.state(0)["personal"]
    assert torch.equal(own["weight"], world.trained["head.weight"])
    assert torch.equal(own["bias"], world.trained["head.bias"])
    squared = local_rows(own, own)["weight"]
    torch.testing.assert_close(squared, own["weight"] * own["weight"].norm(dim=1, keepdim=True))
    net = world.parts.spec.model.build(3)
    assert isinstance(net, Net)
    data = world.parts.dataset
    indices = world.parts.train.indices(0)
    x, y = data.prepare(data.train.inputs[indices]), data.train.labels[indices]
    optimizer = torch.optim.SGD(net.body.parameters(), lr=worlds.LR, momentum=0.5)
    for epoch in range(3):
        for rows in torch.split(worlds.order_of(0, len(y), epoch), worlds.BATCH):
            optimizer.zero_grad()
            F.cross_entropy(F.linear(net.body(x[rows]), world.trained[SPARSE]), y[rows]).backward()
            optimizer.step()
    body = {n: v for n, v in world.trained.items() if n.startswith("body.")}
    worlds.close(body, {f"body.{n}": v for n, v in net.body.state_dict().items()})
    clients = world.result.final("evaluate-clients")
    assert clients["sum-accuracy"] == clients["auxiliary-accuracy"] == clients["local-accuracy"]


# Own heads, across rounds.


def test_an_own_head_changes_only_by_its_own_training() -> None:
    federation = {"clients": 4, "cohort": 2}
    after = [run(federation={**federation, "rounds": t}) for t in range(1, 5)]
    heads: dict[int, Tensor | None] = dict.fromkeys(range(4))
    for t, world in enumerate(after, start=1):
        asked = world.sampled(t)
        assert len(asked) == 2
        for client, before in heads.items():
            state = world.state(client).get("personal")
            now = state["weight"] if state else None
            if client not in asked:
                assert now is before or torch.equal(now, before)  # type: ignore[arg-type]
            else:
                assert now is not None
                assert before is None or not torch.equal(now, before)
            heads[client] = now


def test_where_an_own_head_starts() -> None:
    local = open_round(FedLoGeParams(), LocalParams(), dtype=torch.float32)
    shared = own_head(local, "shared")
    assert torch.equal(shared["weight"], local.model.state_dict()["head.weight"])
    drawn = own_head(local, "drawn")
    assert all(0 < float(v.abs().max()) <= 5**-0.5 for v in drawn.values())
    other = copy.copy(local)
    other.client = 1
    assert not torch.equal(own_head(other, "drawn")["weight"], drawn["weight"])
    later = copy.copy(local)
    later.clock = replace(local.clock, round=4)
    assert worlds.equal(own_head(later, "drawn"), drawn)
    # Whoever trains a copy does not touch the run's initial head.
    shared["weight"].zero_()
    assert local.open_initial()["head.weight"].any()


def test_a_resumed_run_has_the_same_heads_and_no_second_simplex(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {
        "strategy": {"name": "fedloge", **RECIPE},
        "model": MODEL,
        "partition": {"name": "dirichlet", "alpha": 0.5},
        "local": {"momentum": 0.9, "persist": True},
        "evaluation": EVALUATED,
        "grid": {"device": "cpu"},
    }
    federation = {"clients": 6, "cohort": 3}
    whole = simulate(**asked, federation={**federation, "rounds": 4}, run={"dir": str(tmp_path / "whole")})
    simulate(**asked, federation={**federation, "rounds": 2}, run={"dir": str(tmp_path / "short")})

    def refuse(*_: Any) -> Tensor:
        raise AssertionError("the simplex was made a second time")

    monkeypatch.setattr(fedloge, "sparse_simplex", refuse)
    longer = resume(tmp_path / "short", federation={"rounds": 4})
    assert worlds.equal(longer.model, whole.model)
    assert longer.final("evaluate-clients") == whole.final("evaluate-clients")
    for client in range(6):
        kept = [DiskStore(tmp_path / name / "checkpoints" / "clients") for name in ("whole", "short")]
        one, other = (store.read(client, 99) for store in kept)
        assert one.keys() == other.keys()
        assert all(worlds.equal(one[group], other[group]) for group in one)


def test_a_worker_that_dies_takes_no_head_with_it(tmp_path: Path) -> None:
    def run_with(
        half: FedLoGeHalf, grid: dict[str, Any], folder: Path
    ) -> tuple[dict[str, Tensor], DiskStore]:
        simulation = Simulation.of(
            {
                "strategy": {"name": "fedloge", **RECIPE},
                "model": MODEL,
                "federation": {"clients": 6, "cohort": 4, "rounds": 3},
                "evaluation": {"every": 0, "clients_every": 3},
                "grid": {**grid, "device": "cpu"},
            }
        )
        parts = build_parts(simulation)
        parts.strategy.half = half
        parts = replace(parts, spec=replace(parts.spec, half=half))
        store = DiskStore(folder)
        with open_grid(parts, store) as opened:
            result = make_federation(parts, opened).run()
        assert not result.failures
        return result.model, store

    params = FedLoGeParams(**RECIPE)
    calm, kept = run_with(FedLoGeHalf(params), {}, tmp_path / "calm")
    marker = tmp_path / "killed"
    half = loge_toys.KillsItsWorkerOnce(params, str(marker))
    hit, rescued = run_with(half, {"name": "ray", "workers": 2}, tmp_path / "hit")
    assert marker.exists(), "no worker was killed, so nothing was tested"
    assert worlds.equal(hit, calm)
    for client in range(6):
        before, after = kept.read(client, 99), rescued.read(client, 99)
        assert before.keys() == after.keys()
        assert all(worlds.equal(after[group], tensors) for group, tensors in before.items())


# Realignment.


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.floats(0.1, 10), classes=st.integers(2, 7))
def test_ga_makes_all_rows_as_long_and_turns_none(seed: int, scale: float, classes: int) -> None:
    head = random_head(classes, seed=seed)
    found = generic_head(head, scale)
    torch.testing.assert_close(
        found["weight"].norm(dim=1), torch.full((classes,), scale, dtype=torch.float64)
    )
    torch.testing.assert_close(
        F.cosine_similarity(found["weight"], head["weight"]), torch.ones(classes).double()
    )
    assert found["bias"] is head["bias"]
    again = generic_head(found, scale)
    torch.testing.assert_close(again, found, rtol=1e-12, atol=0)
    # Without a bias the scale changes no prediction.
    z = torch.randn(20, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    plain = {"weight": head["weight"]}
    assert torch.equal(
        logits(generic_head(plain, scale), z).argmax(1), logits(generic_head(plain, 1.0), z).argmax(1)
    )


def test_ga_by_hand() -> None:
    head = {
        "weight": torch.tensor([[3.0, 4.0], [0.0, -2.0], [0.0, 0.0]]),
        "bias": torch.tensor([1.0, 2.0, 3.0]),
    }
    found = generic_head(head, 1.7)
    wanted = torch.tensor([[1.02, 1.36], [0.0, -1.7], [0.0, 0.0]])
    torch.testing.assert_close(found, {"weight": wanted, "bias": head["bias"]})


def test_la_by_hand_and_its_identity() -> None:
    head = {"weight": torch.tensor([[1.0, 2.0], [3.0, -1.0]]), "bias": torch.tensor([0.5, -0.5])}
    own = {"weight": torch.tensor([[0.0, 2.0], [3.0, 4.0]]), "bias": torch.tensor([7.0, 7.0])}
    found = local_rows(head, own)
    torch.testing.assert_close(found["weight"], torch.tensor([[2.0, 4.0], [15.0, -5.0]]))
    assert torch.equal(found["bias"], head["bias"])
    unit = {"weight": torch.tensor([[0.0, 1.0], [-1.0, 0.0]]), "bias": own["bias"]}
    assert worlds.equal(local_rows(head, unit), head)


def test_the_personal_forms_are_sums_of_outputs() -> None:
    auxiliary, own = random_head(seed=1), random_head(seed=2)
    z = torch.randn(9, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    w, b, v, c = auxiliary["weight"], auxiliary["bias"], own["weight"], own["bias"]
    n = torch.diag(v.norm(dim=1))
    wanted = {
        "code": z @ v.T + c + z @ (n @ w).T + b,
        "readme": z @ (n @ w).T + b + z @ w.T + b,
        "sum": z @ w.T + b + z @ v.T + c,
        "local": z @ v.T + c,
    }
    assert wanted.keys() == FORMS.keys()
    for form, expected in wanted.items():
        torch.testing.assert_close(logits(FORMS[form](auxiliary, own), z), expected)


@pytest.mark.parametrize("form", sorted(FORMS))
@pytest.mark.parametrize("realign", ["ga", "none"])
def test_a_client_predicts_from_the_delivered_model_as_from_the_trained_one(form: str, realign: str) -> None:
    """GA is undone where LA needs the lengths that it took away."""
    params = FedLoGeParams(realign=realign, personal_form=form)
    own = random_head(3, 5, seed=4)
    local = open_round(params, LocalParams(), state={"personal": own})
    trained = {name: value.detach().clone() for name, value in local.model.state_dict().items()}
    auxiliary = {"weight": trained["head.weight"], "bias": trained["head.bias"]}
    local.load(FedLoGe(params).deliver(trained))
    x = local.train_data.x
    z = local.parts.features(x)
    found = {name: predict(x) for name, predict in FedLoGeHalf(params).predictors(local).items()}
    generic = generic_head(auxiliary, 1.7) if realign == "ga" else auxiliary
    wanted = {
        "": logits(generic, z),
        "personal": logits(FORMS[form](auxiliary, own), z),
        "auxiliary": logits(auxiliary, z),
        "sum": logits(FORMS["sum"](auxiliary, own), z),
        "local": logits(own, z),
        "fixed": z @ trained[SPARSE].T,
    }
    assert found.keys() == wanted.keys()
    for name, expected in wanted.items():
        torch.testing.assert_close(found[name], expected, msg=lambda m, n=name: f"{n}: {m}")
    main = FedLoGeHalf(replace(params, report="main")).predictors(local)
    assert main.keys() == {"", "personal"}


def test_delivering_leaves_the_trained_model_alone_and_can_be_undone() -> None:
    strategy = FedLoGe(FedLoGeParams(scale=3.0))
    model = {
        **{f"head.{n}": v for n, v in random_head().items()},
        DIVISORS: torch.ones(4, dtype=torch.float64),
    }
    before = {name: value.clone() for name, value in model.items()}
    delivered = strategy.deliver(model)
    assert worlds.equal(model, before)
    torch.testing.assert_close(
        delivered["head.weight"].norm(dim=1), torch.full((4,), 3.0, dtype=torch.float64)
    )
    torch.testing.assert_close(auxiliary_head(delivered)["weight"], model["head.weight"])
    assert FedLoGe(FedLoGeParams(realign="none")).deliver(model) is model


def test_training_goes_on_as_if_nothing_had_been_realigned() -> None:
    realigned, plain = (run({"realign": how}, evaluation=EVALUATED) for how in ("ga", "none"))
    assert worlds.equal(realigned.trained, plain.trained)
    server = realigned.result.final("evaluate-server")
    assert server["auxiliary-accuracy"] == plain.result.final("evaluate-server")["accuracy"]


# Evaluation.


def test_the_clients_together_say_what_the_server_says() -> None:
    """Their test samples make up the test set; so does every head's figure, group by group."""
    result = run(evaluation=EVALUATED).result
    server, clients = result.final("evaluate-server"), result.final("evaluate-clients")
    for prefix in ("", "auxiliary-", "fixed-"):
        assert server[f"{prefix}correct-per-class"] == clients[f"{prefix}correct-per-class"]
        for group in ("many", "medium"):
            name = f"{prefix}accuracy-{group}-share-75-95"
            assert server[name] == clients[name]
    assert all(
        name in clients for name in ("personal-accuracy-mean", "personal-accuracy-many-own-share-75-95")
    )
    main = run({"report": "main"}, evaluation=EVALUATED).result
    assert "auxiliary-accuracy" not in main.final("evaluate-server")
    assert main.final("evaluate-server")["accuracy"] == server["accuracy"]


def test_it_learns() -> None:
    world = run(
        model={"name": "mlp", "hidden": [64]}, federation={"clients": 6, "cohort": 3, "rounds": 12},
        local={"batch_size": 16, "momentum": 0.5}, evaluation={"every": 0, "clients_every": 12},
    )  # fmt: skip
    server, clients = world.result.final("evaluate-server"), world.result.final("evaluate-clients")
    assert server["accuracy"] > 0.8
    assert server["fixed-accuracy"] > 0.7
    assert clients["personal-accuracy"] > 0.85


# The control.


@pytest.mark.parametrize("local", [{}, {"momentum": 0.9, "persist": True, "weight_decay": 0.01}])
def test_a_learned_classifier_is_fedavg_bit_for_bit(local: dict[str, Any]) -> None:
    federation = {"clients": 4, "cohort": 2, "rounds": 3}
    shared: dict[str, Any] = {"local": local, "federation": federation, "evaluation": EVALUATED}
    ours = run({"classifier": "learned"}, **shared)
    plain = worlds.run("fedavg", model=MODEL, **shared)
    assert worlds.equal({n: v for n, v in ours.trained.items() if n not in FIXED}, plain.trained)
    server = ours.result.final("evaluate-server")
    assert server["auxiliary-accuracy"] == plain.result.final("evaluate-server")["accuracy"]
    assert "fixed-accuracy" not in server
    control = worlds.run("tau_norm", {"scale": 1.7, "keep_bias": True}, model=MODEL, **shared)
    delivered = {n: v for n, v in ours.result.model.items() if n not in FIXED}
    assert worlds.equal(delivered, control.result.model)
    assert server["accuracy"] == control.result.final("evaluate-server")["accuracy"]


def test_the_control_keeps_own_heads_on_detached_features() -> None:
    params = FedLoGeParams(classifier="learned")
    _, _, parts, moving = differentiated(params)
    assert parts.keys() == {"auxiliary-loss", "local-loss"}
    names = list(moving)
    for loss, owned in (("auxiliary-loss", ("body.", "head.")), ("local-loss", ("personal ",))):
        gradients = torch.autograd.grad(
            parts[loss], list(moving.values()), allow_unused=True, retain_graph=True
        )
        assert [g is not None for g in gradients] == [n.startswith(owned) for n in names]


def test_the_controls_scale_is_checked() -> None:
    with pytest.raises(ConfigError, match="strategy.scale is 0"):
        worlds.run("tau_norm", {"scale": 0.0})


# What is refused.


def test_a_client_without_a_simplex_says_so() -> None:
    local = worlds.open_round(LocalParams(), spec=SPEC)
    with pytest.raises(ClientError, match="the sparse classifier arrived empty"):
        FedLoGeHalf(FedLoGeParams()).run(local)
    FedLoGeHalf(FedLoGeParams(classifier="learned")).run(local)


SIGNED = {"name": "loge_toys:signed_net"}


def test_features_below_zero_are_refused_unless_allowed() -> None:
    with pytest.raises(ConfigError, match="FedLoGe's features are never negative.*ends in a ReLU"):
        run(model=SIGNED)
    assert run({"signed_features": True}, model=SIGNED).result.status == "completed"


def missing_class(directory: Path) -> str:
    """Write a data set whose class 2 has no training sample, and return its name."""
    rng = np.random.default_rng(0)
    labels = np.tile([0, 1, 3], 20)
    np.savez(
        directory / "set.npz", x_train=rng.random((60, 6), dtype=np.float32), y_train=labels,
        x_test=rng.random((20, 6), dtype=np.float32), y_test=np.tile([0, 1, 2, 3], 5),
    )  # fmt: skip
    return f"npz:{directory / 'set.npz'}"


def test_a_class_without_any_sample_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"No client has a training sample of the classes \[2\]"):
        run(dataset={"name": missing_class(tmp_path)})
    # The server has taken every sample of the smallest classes.
    with pytest.raises(
        ConfigError, match="No client has a training sample of the classes.*data.server_per_class"
    ):
        run(data={"server_per_class": 145}, partition={"name": "iid"})


@pytest.mark.parametrize(
    ("options", "sections", "message"),
    [
        ({"classifier": "dense"}, {}, "strategy.classifier is 'dense'; choose sparse or learned"),
        ({"ssec_bias": "one"}, {}, "strategy.ssec_bias is 'one'"),
        ({"local_init": "zero"}, {}, "strategy.local_init is 'zero'"),
        ({"realign": "la"}, {}, "strategy.realign is 'la'"),
        (
            {"personal_form": "paper"},
            {},
            "strategy.personal_form is 'paper'; choose code or readme or sum or local",
        ),
        ({"report": "none"}, {}, "strategy.report is 'none'"),
        ({"beta": 1.0}, {}, "strategy.beta is 1.0"),
        ({"gamma": 0.0}, {}, "strategy.gamma is 0.0"),
        ({"scale": -1.0}, {}, "strategy.scale is -1.0"),
        ({"ssec_lr": 0.0}, {}, "strategy.ssec_lr is 0.0"),
        ({"ssec_steps": -1}, {}, "strategy.ssec_steps is -1"),
        ({"server_lr": 0.0}, {}, "strategy.server_lr is 0"),
        ({}, {"local": {"clip_norm": 1.0}}, "local.clip_norm would let one of FedLoGe's three heads"),
        ({}, {"model": {"name": "mlp", "hidden": [9]}}, "10 classes needs as many features, 'mlp' has 9"),
        ({}, {"model": {"name": "toys:Scalar"}}, "no separate features and head"),
        ({}, {"model": {"name": "worlds:deep_head"}}, "head of one linear layer"),
        ({}, {"evaluation": {"mask": "oracle"}}, "evaluation.mask is 'oracle'; choose none, train or test"),
    ],
)
def test_bad_settings_are_named(options: dict[str, Any], sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(options, **sections)
