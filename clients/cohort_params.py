"""How clients are computed together, as one frozen, checked value; without torch, as all of the configuration."""

from __future__ import annotations

from dataclasses import dataclass

from flowerbed.errors import require

KERNELS = ("fused", "fused-onednn", "vmap", "compiled", "generic")


@dataclass(frozen=True)
class CohortOptions:
    """How clients are batched; by default what a measurement finds fastest."""

    kernel: str = "auto"
    """auto; fused (hand-written); fused-onednn (its large dense layers through oneDNN); vmap (torch.func);
    compiled (that by torch.compile, on a GPU as a CUDA graph: never chosen by itself, since compiling takes most of a
    minute); generic (one client at a time)."""
    block: int = 0
    """Clients computed together; 0 means that it is measured."""
    precision: str = "float32"
    """bfloat16: the fused kernel convolves in that type, the others compute the model under autocast; weights and their
    updates stay as they are."""
    dropout: str = "exact"
    """exact: the masks that each client draws by itself; fast: others of the same distribution."""

    def __post_init__(self) -> None:
        require(
            self.kernel in ("auto", *KERNELS),
            f"cohort.kernel is '{self.kernel}'; choose from auto, {', '.join(KERNELS)}.",
        )
        require(self.block >= 0, f"cohort.block is {self.block}; give 0 (measured) or more.")
        require(
            self.precision in ("float32", "bfloat16"),
            f"cohort.precision is '{self.precision}'; choose float32 or bfloat16.",
        )
        require(
            self.dropout in ("exact", "fast"), f"cohort.dropout is '{self.dropout}'; choose exact or fast."
        )
