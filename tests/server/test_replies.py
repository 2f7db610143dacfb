"""Which replies are used: every kind of bad reply is counted, named and left out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import Error, Message, MetricRecord, RecordDict

from flowerbed import messages
from flowerbed.pooling import Adder, Mean, Pool
from flowerbed.server.grids import flower_compat
from flowerbed.server.replies import check_replies, settle_pool

flower_compat.set_identity(1)
CLIENTS = {1000: 0, 1001: 1, 1002: 2}


def ask() -> list[Message]:
    content = RecordDict({"arrays": messages.array_record({"w": torch.zeros(2, 3)})})
    return [Message(content=content, dst_node_id=node, message_type="train") for node in CLIENTS]


def answer(
    message: Message, *, w: torch.Tensor | None = None, **changes: float | list[float] | None
) -> Message:
    metrics = {"num-examples": 4, "loss": 0.5, **changes}
    content = RecordDict({"arrays": messages.array_record({"w": torch.ones(2, 3) if w is None else w})})
    content["metrics"] = MetricRecord({k: v for k, v in metrics.items() if v is not None})
    return Message(content, reply_to=message)


def check_third(bad: Message, asked: list[Message]) -> tuple[str, str]:
    """Check two good replies and ``bad`` from the third client; return its failure."""
    good = [answer(asked[0]), answer(asked[1])]
    checked = check_replies(asked, [bad, *good], CLIENTS, 7)
    assert [m.metadata.src_node_id for m in checked.usable] == [1000, 1001]
    (failure,) = checked.failures
    assert (failure.round, failure.client) == (7, 2)
    return failure.kind, failure.reason


def test_good_replies_are_used_in_the_order_of_asking() -> None:
    asked = ask()
    checked = check_replies(asked, [answer(m) for m in reversed(asked)], CLIENTS, 1)
    assert [m.metadata.src_node_id for m in checked.usable] == list(CLIENTS)
    assert checked.failures == []


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_bad_number_is_enough(value: float) -> None:
    asked = ask()
    w = torch.ones(2, 3)
    w[1, 2] = value
    assert check_third(answer(asked[2], w=w), asked) == (
        "non-finite",
        "'w' of stream 'arrays' holds NaN or infinity",
    )


def test_large_finite_numbers_whose_sum_overflows_are_fine() -> None:
    asked = ask()
    w = torch.full((2, 3), 3e38)
    assert not check_replies(asked, [answer(m, w=w) for m in asked], CLIENTS, 1).failures


def test_a_metric_that_is_not_finite() -> None:
    asked = ask()
    assert check_third(answer(asked[2], loss=float("nan")), asked)[0] == "non-finite"


def test_a_shape_other_than_the_one_sent() -> None:
    asked = ask()
    kind, reason = check_third(answer(asked[2], w=torch.ones(3, 2)), asked)
    assert kind == "wrong-shape"
    assert "'w' has shape (3, 2), sent was (2, 3)" in reason


@pytest.mark.parametrize("name", ["loss", "num-examples"])
def test_a_missing_metric(name: str) -> None:
    asked = ask()
    assert check_third(answer(asked[2], **{name: None}), asked) == (
        "missing-metric",
        f"metric '{name}' is missing",
    )


@pytest.mark.parametrize("weight", [-1, [1.0, 2.0]])
def test_a_weight_that_is_none(weight: float | list[float]) -> None:
    asked = ask()
    assert check_third(answer(asked[2], **{"num-examples": weight}), asked)[0] == "missing-metric"


def test_a_missing_stream() -> None:
    asked = ask()
    bare = Message(RecordDict({"metrics": MetricRecord({"num-examples": 4, "loss": 0.1})}), reply_to=asked[2])
    assert check_third(bare, asked) == ("missing-stream", "stream 'arrays' is missing")


def test_another_stream_with_a_shape_of_its_own() -> None:
    asked = ask()
    replies = [answer(m) for m in asked]
    for reply, size in zip(replies, (5, 5, 6), strict=True):
        reply.content["extra"] = messages.array_record({"c": torch.zeros(size)})
    (failure,) = check_replies(asked, replies, CLIENTS, 1).failures
    assert failure.client == 2
    assert failure.reason == "'c' has shape (6,), most replies have (5,)"


def test_an_array_that_nobody_else_sends() -> None:
    asked = ask()
    replies = [answer(m) for m in asked]
    replies[2].content["arrays"]["more"] = messages.array_record({"m": torch.zeros(1)})["m"]
    (failure,) = check_replies(asked, replies, CLIENTS, 1).failures
    assert failure.reason == "'more' is in no other reply"


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("ValueError: broken", "raised"),
        ("worker died while running this client", "died"),
        ("time limit of 3 s exceeded", "time-limit"),
        ("quarantined: killed its worker twice", "quarantined"),
    ],
)
def test_errors_have_a_kind(reason: str, kind: str) -> None:
    asked = ask()
    assert check_third(Message(Error(2, reason), reply_to=asked[2]), asked) == (kind, reason)


def test_a_reply_that_never_came() -> None:
    asked = ask()
    checked = check_replies(asked, [answer(asked[0])], CLIENTS, 1)
    assert [f.kind for f in checked.failures] == ["no-reply", "no-reply"]


def test_the_types_of_most_replies_are_the_usual_ones_whoever_was_asked_first() -> None:
    adder, pool = Adder({"model": Mean("arrays")}), Pool()
    for place, kind in enumerate([torch.float64, torch.float32, torch.float32]):
        adder.add(
            pool, place, {"arrays": {"w": torch.full((2,), float(place), dtype=kind)}}, {"num-examples": 1}
        )
    settled = settle_pool(pool, {}, [10, 11, 12], 1)
    assert [(f.client, f.kind) for f in settled.failures] == [(10, "wrong-shape")]
    assert settled.sums.places == [1, 2]
