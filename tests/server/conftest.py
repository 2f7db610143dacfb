"""A client app that does what its message says, and one Ray runtime for all tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flowerbed.server.grids import ray_grid


def toy_factory() -> Callable[[], ClientApp]:
    """Return a factory of the toy app; nested, so that workers need not import this file."""

    def factory() -> ClientApp:
        import os
        import time

        from flowerbed.messages import array_record, tensors

        app = ClientApp()

        def obey(message: Message, context: Context) -> Message | None:
            config = message.content.config_records.get("config") or {}
            partition = context.node_config["partition-id"]
            mine = partition in config.get("only", [partition])
            do = config.get("do", "echo") if mine else "echo"
            if do == "echo":
                return Message(message.content, reply_to=message)
            if do == "add":
                shifted = {k: t + partition for k, t in tensors(message.content["arrays"]).items()}
                return Message(RecordDict({"arrays": array_record(shifted)}), reply_to=message)
            if do == "pop":
                message.content.pop("config")
                message.content["arrays"].pop("w")
                return Message(message.content, reply_to=message)
            if do == "raise":
                raise ValueError(f"client {partition} says no")
            if do == "exit":
                raise SystemExit(3)
            if do == "nothing":
                return None
            if do == "die":
                os._exit(1)
            if do == "die-once" and not os.path.exists(config["marker"]):
                open(config["marker"], "w").close()
                os._exit(1)
            if do == "sleep":
                time.sleep(config["seconds"])
            if do == "count":
                seen = context.state.metric_records.get("seen") or MetricRecord({"calls": 0})
                seen["calls"] += 1
                context.state["seen"] = seen
                if config.get("then-raise"):
                    raise ValueError("after counting")
                return Message(RecordDict({"seen": seen}), reply_to=message)
            about = MetricRecord(
                {"pid": os.getpid(), "partition": partition, "of": context.node_config["num-partitions"]}
            )
            return Message(RecordDict({"about": about}), reply_to=message)

        app.train()(obey)
        app.evaluate()(obey)
        return app

    return factory


@pytest.fixture(scope="session")
def ray_runtime() -> Iterator[None]:
    """Start Ray once for the whole session."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install flowerbed[simulation]")
    # Room for the grid of the session beside one of a single test, whatever this machine has.
    ray_grid.ensure_runtime(None, workers=4, gpus_per_worker=0.0)
    yield
    ray_grid.shutdown()


@pytest.fixture(scope="session")
def toy() -> Callable[[], ClientApp]:
    return toy_factory()


@pytest.fixture(scope="session")
def ray_pair(ray_runtime: None, toy: Callable[[], ClientApp]) -> Iterator[ray_grid.RayGrid]:
    """Ten clients on two workers; tests may kill the workers but not quarantine clients."""
    with ray_grid.RayGrid(toy, 10, workers=2, run_config={"lr": 0.1}) as grid:
        yield grid
