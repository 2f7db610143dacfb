"""The server's evaluation, computed by the workers of a grid: each counts over a part of the test set.

The driver of a cluster may have no GPU, and a large test set takes it longer than a round. Workers hold the data set
anyway. They are asked as the clients that they are, in a query that no algorithm sees; what they count is added up
batch by batch in the order of the test set, so that the figures do not depend on the number of workers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from flwr.app import ConfigRecord, Message, RecordDict
from torch import Tensor, nn

from flowerbed import messages
from flowerbed.clients.app import choose_device
from flowerbed.clients.local_round import MODEL, Reply
from flowerbed.clients.transforms import ClientTransform, Request
from flowerbed.datasets.dataset import Dataset
from flowerbed.errors import RunError
from flowerbed.models import evaluation
from flowerbed.models.base import ModelSpec
from flowerbed.models.tasks import task_for
from flowerbed.server.grids.base import SimulationGrid
from flowerbed.storage import Tensors

PHASE = "server evaluation"
"""Of the queries; a name that no phase of a strategy has."""
PART, ROWS = "part", "rows"
PARTS = 2
"""For every worker, so that one that is late holds the others up less."""


@dataclass(frozen=True)
class Counting(ClientTransform):
    """Answers the queries for counts over rows of the test set."""

    seed: int
    model: ModelSpec
    dataset: Dataset
    device: str

    @cached_property
    def module(self) -> nn.Module:
        """The model of this process."""
        return self.model.build(self.seed).to(choose_device(self.device)).eval()

    def answer(self, request: Request) -> Reply | None:
        if request.phase != PHASE:
            return None
        start, stop = request.received[PART][ROWS].tolist()
        return Reply(
            {PART: self.counts(request.received[MODEL], start, stop)}, {"num-examples": stop - start}
        )

    def counts(self, model: Mapping[str, Tensor], start: int, stop: int) -> Tensors:
        """Return the counts of every batch of these rows, by name, ``(batches, ...)``."""
        self.module.load_state_dict(dict(model))
        test, device = self.dataset.test, next(iter(self.module.parameters())).device
        task = task_for(self.dataset.task, self.dataset.num_classes)
        found: list[dict[str, Tensor]] = []
        for first in range(start, stop, evaluation.BATCH):
            rows = slice(first, min(first + evaluation.BATCH, stop))
            found.append(
                evaluation.counts(
                    self.module,
                    task,
                    test.inputs[rows],
                    test.labels[rows],
                    lambda inputs: self.dataset.prepare(inputs.to(device)),
                )
            )
        return {name: torch.stack([counts[name] for counts in found]).cpu() for name in found[0]}


@dataclass(frozen=True)
class Sharded:
    """Counts over the whole test set, by the workers of a grid whose clients have ``Counting``."""

    grid: SimulationGrid
    samples: int
    workers: int

    def __call__(self, model: Tensors) -> dict[str, Tensor]:
        """Return what ``evaluation.counts`` returns; raises ``RunError`` where a part cannot be counted."""
        arrays, nodes = messages.array_record(model), self.grid.nodes
        config = ConfigRecord({"server-round": 0, "phase": PHASE})
        asked = []
        for place, rows in enumerate(parts(self.samples, self.workers * PARTS)):
            part = messages.array_record({ROWS: torch.tensor([rows.start, rows.stop])})
            content = RecordDict({MODEL: arrays, PART: part, "config": config})
            asked.append(Message(content, dst_node_id=nodes[place % len(nodes)], message_type="query"))
        sums: dict[str, Tensor] = {}
        for reply in self.grid.send_and_receive(asked):
            if reply.has_error():
                raise RunError(
                    "The grid's workers could not evaluate the model; set evaluation.sharded=false, or mend this: "
                    f"{reply.error.reason}"
                )
            for name, batches in messages.tensors(messages.array_records(reply.content)[PART]).items():
                for counts in batches:
                    sums[name] = sums[name] + counts if name in sums else counts
        return sums


def parts(samples: int, count: int) -> list[range]:
    """Return ``samples`` rows as at most ``count`` consecutive parts of whole batches, of about the same size."""
    batches = -(-samples // evaluation.BATCH)
    count = min(count, batches)
    edges = [batches * i // count for i in range(count + 1)] if count else [0]
    return [range(a * evaluation.BATCH, min(b * evaluation.BATCH, samples)) for a, b in pairwise(edges)]
