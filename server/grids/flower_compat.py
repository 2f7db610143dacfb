"""Every private Flower name that we use, in one place.

The rest of the platform imports ``flwr.app``, ``flwr.serverapp`` and ``flwr.clientapp`` only. What is below
has no public equivalent in Flower 1.41-1.42 and has moved before; a contract test checks that each name is
still where it is looked for, so that a change is seen on upgrade and not in a run.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, Final

from flowerbed.offline import offline_defaults

offline_defaults()  # Flower reads its telemetry switch when it is imported.

from flwr.app import Error, Message, Metadata, RecordDict

TaskIdentity: Any
try:
    from flwr.supercore.task_identity import TaskIdentity
except ImportError:  # Releases before 1.35 ask the grid instead.
    TaskIdentity = None

# Node id of the sender of every instruction message (flwr.common.constant.SUPERLINK_NODE_ID).
SERVER_NODE_ID: Final = 1

# flwr.common.constant.ErrorCode. Numbers, because they are part of Flower's wire format and do not change.
LOAD_FAILED: Final = 1
CLIENT_RAISED: Final = 2
NO_REPLY: Final = 4
NODE_UNAVAILABLE: Final = 5
CLIENT_CRASHED: Final = 8


@dataclasses.dataclass(frozen=True)
class RunHandle:
    """What a grid's ``run`` must offer to strategies: only the id. Flower's own ``Run`` keeps gaining fields."""

    run_id: int


def set_identity(run_id: int) -> None:
    """Make ``Message(content, dst_node_id, message_type)`` work in this process, as the server of ``run_id``."""
    if TaskIdentity is not None:
        TaskIdentity.run_id = run_id
        TaskIdentity.node_id = SERVER_NODE_ID
        TaskIdentity.task_id = 0


def set_message_id(message: Message, message_id: str) -> None:
    """Give an instruction message the id that its reply will refer to; Flower leaves this to the grid."""
    message.metadata.__dict__["_message_id"] = message_id


def message_copy(message: Message, content: RecordDict) -> Message:
    """Return ``message`` with its own copy of the metadata and with ``content`` in place of the content."""
    return Message(content, metadata=copy.copy(message.metadata))  # type: ignore[call-overload,no-any-return]


def fields_of(message: Message) -> dict[str, Any]:
    """Return the metadata of ``message`` as plain values, for a wire that should not carry objects."""
    return dict(message.metadata.__dict__)


def message_from_fields(fields: dict[str, Any], content: RecordDict) -> Message:
    """Return the message whose ``fields_of`` is ``fields``, with ``content``."""
    metadata = Metadata.__new__(Metadata)
    metadata.__dict__.update(fields)
    return Message(content, metadata=metadata)  # type: ignore[call-overload,no-any-return]


def reply_with(instruction: Message, outcome: RecordDict | Error) -> Message:
    """Return the reply to ``instruction`` that carries ``outcome``."""
    if isinstance(outcome, Error):
        return Message(outcome, reply_to=instruction)
    return Message(outcome, reply_to=instruction)
