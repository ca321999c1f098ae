"""How many tokens a watermark test needs: for i.i.d. tokens of a known law, and for the texts of a real model.

`tokens_needed` and `type2_error` are exact, or state their error. `plan` averages exact errors over texts of a model.
Source: Huang et al. (2023), arXiv:2312.07930, section 4.
"""

from assay.watermark._green import green_chance as green_chance
from assay.watermark._green import green_chances as green_chances
from assay.watermark._iid import TESTS as TESTS
from assay.watermark._iid import Test as Test
from assay.watermark._iid import TokenCount as TokenCount
from assay.watermark._iid import Type2 as Type2
from assay.watermark._iid import tokens_needed as tokens_needed
from assay.watermark._iid import type2_error as type2_error
from assay.watermark._plan import Plan as Plan
from assay.watermark._plan import PlannedTest as PlannedTest
from assay.watermark._plan import TextProfile as TextProfile
from assay.watermark._plan import plan as plan
from assay.watermark._plan import profile_from_laws as profile_from_laws
