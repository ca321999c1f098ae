"""Continual release: running counts, their largest and its column, windows, with noise that grows like a logarithm."""

from assay.privacy.continual.counter import Counter
from assay.privacy.continual.endless import EndlessCounter
from assay.privacy.continual.plan import Plan, plan_counter, plan_endless
from assay.privacy.continual.selection import Selection, SelectionPlan, crossover, plan_selection
from assay.privacy.continual.windows import SlidingWindow

__all__ = [
    "Counter",
    "EndlessCounter",
    "Plan",
    "Selection",
    "SelectionPlan",
    "SlidingWindow",
    "crossover",
    "plan_counter",
    "plan_endless",
    "plan_selection",
]
