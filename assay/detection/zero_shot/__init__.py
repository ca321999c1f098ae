"""Zero-shot tests: did this model write the text, which of several did, and scores that speak of any model."""

from assay.detection.zero_shot.attribution import Attribution, Candidate, Member, attribute, attribute_all
from assay.detection.zero_shot.bounds import freedman_test, gap_log_bounds, gap_test, max_varentropy
from assay.detection.zero_shot.identity import identity_test, identity_tests, over_rules, studentised_score
from assay.detection.zero_shot.likelihood import likelihood_ratio_test, mixture_test
from assay.detection.zero_shot.rank_sum import RankSum, fit_rank_sum
from assay.detection.zero_shot.scores import LARGER_MEANS_LLM, binoculars_scores, text_scores, zero_shot_scores
from assay.detection.zero_shot.tilt import tilt_test

__all__ = [
    "LARGER_MEANS_LLM",
    "Attribution",
    "Candidate",
    "Member",
    "RankSum",
    "attribute",
    "attribute_all",
    "binoculars_scores",
    "fit_rank_sum",
    "freedman_test",
    "gap_log_bounds",
    "gap_test",
    "identity_test",
    "identity_tests",
    "likelihood_ratio_test",
    "max_varentropy",
    "mixture_test",
    "over_rules",
    "studentised_score",
    "text_scores",
    "tilt_test",
    "zero_shot_scores",
]
