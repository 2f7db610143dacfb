"""Which algorithms and settings can be computed as a batch of clients, and why the others cannot."""

from __future__ import annotations

from flowerbed.clients.half import ClientHalf
from flowerbed.clients.params import LocalParams

UNSTACKABLE = {
    "run": "does its local round by itself",
    "hooks": "chooses the hooks of a step by itself",
    "batches": "makes its own batches",
    "further": "trains tensors beside the model's parameters",
    "decayed": "lets weight decay act on some parameters only",
    "estimate": "makes its gradients by itself, evaluating the loss more than once",
    "after_step": "acts on the model after every step",
}
"""Methods of a client half that one batched computation has no place for."""

TIME_LIMIT = "they have a time limit, which holds for each of them alone"
"""Why clients of a message with a time limit are not computed as a batch."""


def refusal(half: ClientHalf, local: LocalParams) -> str | None:
    """Return a sentence that says why clients of ``half`` are not computed as a batch; None if they can be.

    A half is at the gradient level if it overrides nothing of ``UNSTACKABLE``: ``begin``, ``loss``, ``correct``,
    ``end``, ``frozen``, ``private``, and what does not concern training (``query``, ``predictors``), are free.
    """
    name = type(half).__name__
    for method, what in UNSTACKABLE.items():
        if overrides(half, method):
            return f"{name} {what} (it overrides '{method}'), which needs one client at a time"
    if local.persist:
        return (
            "local.persist keeps each client's optimizer and random stream, which needs one client at a time"
        )
    if local.optimizer == "rmsprop":
        return "local.optimizer=rmsprop is of one client at a time"
    if local.precision != "float32":
        return (
            f"local.precision={local.precision} is of steps of one client at a time (cohort.precision is that of "
            "clients together)"
        )
    return None


def overrides(half: ClientHalf, method: str) -> bool:
    """Return whether the class of ``half`` has a ``method`` of its own."""
    return getattr(type(half), method) is not getattr(ClientHalf, method)


def uses_base_loss(half: ClientHalf) -> bool:
    """Return whether the loss is the task's, averaged over the batch."""
    return not overrides(half, "loss")
