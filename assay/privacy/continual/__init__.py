"""Continual release: running counts, their largest and their argmax, windows, with noise that grows like a log."""

from assay.privacy.continual.counter import Counter
from assay.privacy.continual.plan import Plan, plan_counter, plan_endless

__all__ = ["Counter", "Plan", "plan_counter", "plan_endless"]
