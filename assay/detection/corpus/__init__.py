"""Corpus runs: every document of many files, by several processes, to one table, resumable after any stop."""

from assay.detection.corpus.key_tests import run
from assay.detection.corpus.results import RunSummary

__all__ = ["RunSummary", "run"]
