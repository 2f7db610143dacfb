"""Many clients of one round as one batched computation, where an algorithm allows it."""

from flowerbed.clients.cohort.engine import CohortEngine
from flowerbed.clients.cohort.plan import Plan
from flowerbed.clients.cohort.result import Stacked
from flowerbed.clients.cohort_params import CohortOptions

__all__ = ["CohortEngine", "CohortOptions", "Plan", "Stacked"]
