"""The sentences of a report that follow from its numbers, and those that hold for every report."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal

from assay.report.records import Counts, KeyRecord

LIMITS = (
    (
        "A p-value is the chance of a coincidence. If this document had been written without the key, by a person"
        " or by any program, evidence at least this strong would appear that often: 0.001 means once in a "
        "thousand such documents."
    ),
    (
        "A p-value is not the probability that a document is unmarked. One minus the p-value is not the "
        "probability that it is marked either. Both also depend on how common marked documents are where this one"
        " comes from."
    ),
    (
        "A flag is not a finding of guilt. It says that the wording coincides with what the key produces more "
        "often than chance allows. It does not say who wrote, edited, quoted or handed in the document, why, or "
        "whether that was allowed."
    ),
    (
        "No flag is no evidence of a human author. A document that is not flagged may come from a language model "
        "without this watermark, or with another key, or its text may be short, very predictable, edited or "
        "translated."
    ),
    (
        "The evidence belongs to the document as a whole. Part of a flagged document may be unmarked, and a "
        "single shaded token proves nothing: among a hundred unmarked tokens, one reaches the third of the four "
        "levels of shading by chance."
    ),
    (
        "Many tests produce small p-values by chance. The flags are corrected for the number of documents "
        "(Benjamini-Hochberg); the p-values of single documents are not. For a document picked out of the list, "
        "read its q-value."
    ),
    (
        "Repeats count once, copies count again. Repeating a phrase inside a document adds no evidence. Copies of"
        " one text in several documents are each tested; they are flagged together and are not independent "
        "findings."
    ),
    (
        "Mistakes in testing hide a mark and do not create one. With the wrong tokenizer, the wrong key or a "
        "changed text a mark becomes invisible; the stated chances of a false alarm still hold."
    ),
    (
        "Everything rests on the secrecy of the key. Whoever holds it can write text that carries the mark, and "
        "anyone can copy marked text into a document."
    ),
)
"""What the numbers do and do not mean; the first sentence of each is its heading."""


def verdict(counts: Counts, fdr: float, keys: Sequence[KeyRecord]) -> str:
    """The outcome in words: what was found, and how often such a finding is wrong."""
    if counts.documents == 0:
        return "There were no documents to test, so this report says nothing either way."
    if counts.tested == 0:
        one = "The one document could not"
        which = one if counts.documents == 1 else f"None of the {counts.documents:,} documents could"
        return f"{which} be tested: there is too little text, so this report says nothing either way."
    named = [key.id for key in keys if key.flagged] if counts.flagged else [key.id for key in keys]
    mark = _mark(named)
    if counts.flagged == 0:
        one = "The one tested document does not show"
        which = one if counts.tested == 1 else f"None of the {counts.tested:,} tested documents shows"
        return (
            f"{which} {mark} clearly enough to be flagged at a false discovery rate of {percent(fdr)}. "
            "This does not show that the documents are unmarked, or that people wrote them."
        )
    if counts.tested == 1:
        found = f"The one tested document carries {mark} more clearly than chance explains"
        return f"{found}; an unmarked document is flagged with probability at most {percent(fdr)}."
    share = percent(counts.flagged / counts.tested)
    carry = "carries" if counts.flagged == 1 else "carry"
    return (
        f"{counts.flagged:,} of {counts.tested:,} tested documents ({share}) {carry} {mark} more clearly than chance "
        f"explains; of documents flagged in this way, at most {percent(fdr)} are expected to be false alarms."
    )


def monitored(n_scores: int, n_missed: int, alarm: int | None, max_miss_rate: float, false_alarm: float) -> str:
    """What a monitor found, and how often it would cry without cause, whenever one looks."""
    left = f"{n_missed:,} of {n_scores:,} scores left their intervals"
    bound = (
        f"If every interval missed with probability at most {percent(max_miss_rate)}, given the scores before it, the "
        f"probability of an alarm at any time, however long one watches, would be at most {percent(false_alarm)}."
    )
    if alarm is None:
        return f"No alarm: {left}. This does not show that nothing changed. {bound}"
    return f"Alarm at score {alarm + 1:,}: {left}. {bound}"


def labelled(sizes: Sequence[int], n_sets: int, alpha: float) -> str:
    """How many steps are decided, and what all sets promise."""
    parts = [(sizes[1], "one state left"), (sum(sizes[2:]), "several"), (sizes[0], "none, since nothing fits")]
    left = ", ".join(f"{count:,} {'have' if count != 1 else 'has'} {words}" for count, words in parts if count)
    whose = "The set" if n_sets == 1 else f"Each of the {n_sets:,} sets"
    return (
        f"Of {sum(sizes):,} {'steps' if sum(sizes) != 1 else 'step'}, {left}. {whose} holds the true states of all its "
        f"steps with probability at least {percent(1 - alpha)}, if the states form a Markov chain and each symbol "
        "depends on its own state and the one before only."
    )


def percent(share: float) -> str:
    """A share as a percentage for people: three significant digits, never rounded to 0 or to 100."""
    value = 100 * share
    if 99.95 <= value < 100:
        return "over 99.9%"
    return f"{Decimal(f'{value:.3g}'):f}%"


def _mark(key_ids: Sequence[str]) -> str:
    if len(key_ids) == 1:
        return f"the watermark of key {key_ids[0]}"
    if 1 < len(key_ids) <= 3:
        return f"the watermark of one of the keys {', '.join(key_ids[:-1])} and {key_ids[-1]}"
    return f"the watermark of one of {len(key_ids)} keys" if key_ids else "the watermark"
