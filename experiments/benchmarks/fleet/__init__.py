"""Many node processes on this machine, cheaply: a load test of the server and of the device client.

Real nodes of Flower are three processes each, of which every one imports torch: fifty of them need tens of GB. Here
one process imports the device client once and forks the nodes from it, and every node forks a process for every
message, as real ones start one. What is real: processes, sockets, one process per message, the device client with its
configuration, data and store on disk, and whatever goes wrong with them. What is not: Flower's own servers and polls.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line."""
    # Late: the nodes import this package, and need nothing of the command.
    from flowerbed.experiments.benchmarks.fleet import command

    return command.main(argv)
