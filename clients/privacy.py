"""Local differential privacy: a client clips and noises its own update before anything leaves it.

Client k sends  w_t + u_k min(1, C / ||u_k||) + N(0, (z C)^2 I),  u_k = w_k - w_t, over all of the model's
parameters and every further stream together (these count as they are, from zero). So the server needs no trust.
What is not protected, and not noised: BatchNorm statistics, the metrics of training and all of evaluation.

The noise of a simulation comes from the run's seeded streams and is reproducible; that of a device comes from a
secret of its own, since whoever knows the seed could take the noise away.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from flowerbed.clients import updates
from flowerbed.clients.local_round import MODEL, LocalRound, Reply
from flowerbed.clients.transforms import ClientTransform
from flowerbed.errors import ClientError


@dataclass(frozen=True)
class LocalPrivacy(ClientTransform):
    """The Gaussian mechanism on one client's update."""

    clip: float
    """C, the largest norm of an update."""
    noise: float
    """z, the standard deviation of every coordinate's noise over C."""

    def reply(self, local: LocalRound, reply: Reply) -> Reply:
        stream = updates.whole_numbers(reply.streams)
        if stream is not None:
            raise ClientError(
                f"stream '{stream}' holds whole numbers, which Gaussian noise cannot protect; this strategy does "
                "not combine with privacy.mode=local"
            )
        start = {n: v.to(local.device) for n, v in local.received[MODEL].items()}
        update = updates.update_of(reply.streams, start, local.info.parameters)
        factor = updates.clip_factor(updates.norm(update), self.clip)
        generator = local.hidden_generator("privacy noise")
        private = {
            key: value * factor + updates.gaussian_like(value, self.noise * self.clip, generator)
            for key, value in update.items()
        }
        return replace(reply, streams=updates.with_update(reply.streams, start, private))
