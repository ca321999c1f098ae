"""The sentences of a report that follow from its numbers, and those that hold for every report on one null hypothesis.

There are two null hypotheses: nobody who knew the key wrote the text (`KEY`), and a human wrote it (`HUMAN`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from assay.report.records import CalibrationRecord, Counts, KeyRecord


@dataclass(frozen=True, kw_only=True)
class Words:
    """What a report says because of its null hypothesis.

    Attributes
    ----------
    title
        Its heading, unless the caller has a better one.
    template
        File of the page's passages.
    found_one, found_many, missed_one, missed_many
        What flagged documents do, and what a document or none of several do where nothing is flagged; what they do it
        to follows.
    untested
        Why a document could not be tested.
    null_one, null_many
        A document for which the null hypothesis is true, and what a report without flags does not show.
    limits
        What the numbers do and do not mean; the first sentence of each is its heading.
    """

    title: str
    template: str
    found_one: str
    found_many: str
    missed_one: str
    missed_many: str
    untested: str
    null_one: str
    null_many: str
    limits: tuple[str, ...]


KEY = Words(
    title="Watermark audit",
    template="report-key.html.j2",
    found_one="carries",
    found_many="carry",
    missed_one="does not show",
    missed_many="shows",
    untested="there is too little text",
    null_one="an unmarked document",
    null_many="the documents are unmarked, or that people wrote them",
    limits=(
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
    ),
)

HUMAN = Words(
    title="Human-text audit",
    template="report-human.html.j2",
    found_one="differs from",
    found_many="differ from",
    missed_one="does not differ from",
    missed_many="differs from",
    untested="there is too little text, or none of a length that was calibrated",
    null_one="a human text like them",
    null_many="people wrote the documents",
    limits=(
        (
            "A p-value is the chance of a coincidence. If a person had written this document, and it were like the "
            "texts of the calibration, evidence at least this strong would appear that often: 0.001 means once in a "
            "thousand such documents."
        ),
        (
            "A p-value is not the probability that a person wrote a document. One minus the p-value is not the "
            "probability that a machine did. Both also depend on how common machine-written documents are where this "
            "one comes from."
        ),
        (
            "A flag is not a finding of guilt. It says that few of the calibration's human texts look as machine-like "
            "to the scoring model. It does not say who wrote, edited, translated or handed in the document, why, or "
            "whether that was allowed."
        ),
        (
            "Everything rests on the likeness to the calibration texts. The documents must be exchangeable with them, "
            "as if all had been drawn from one pile. For another language, subject, kind of text or group of writers "
            "the stated error rates do not hold, and documents written by people may be flagged far more often."
        ),
        (
            "No flag is no evidence of a human author. The score may be blind to the model that wrote the document, or "
            "the document may be short, edited or translated."
        ),
        (
            "The evidence belongs to the document as a whole. Part of a flagged document may be written by a person, "
            "and this report cannot say which."
        ),
        (
            "Many tests produce small p-values by chance. The flags are corrected for the number of documents "
            "(Benjamini-Hochberg); the p-values of single documents are not. For a document picked out of the list, "
            "read its q-value."
        ),
        (
            "All documents are compared with the same calibration. If its texts happen to look more machine-like, or "
            "less, than others of their kind, all p-values are too large or too small together. The guarantee named "
            "below says how far this is accounted for."
        ),
        (
            "Copies count again. Copies of one text in several documents are each tested; they are flagged together "
            "and are not independent findings, although the correction for many documents takes them for independent."
        ),
    ),
)


def words_of(calibrations: Sequence[CalibrationRecord]) -> Words:
    """The words of a report: on a calibration's null hypothesis where it has one, else on that of keys."""
    return HUMAN if calibrations else KEY


def verdict(
    counts: Counts, fdr: float, keys: Sequence[KeyRecord] = (), calibrations: Sequence[CalibrationRecord] = ()
) -> str:
    """The outcome in words: what was found, and how often such a finding is wrong."""
    words = words_of(calibrations)
    if counts.documents == 0:
        return "There were no documents to test, so this report says nothing either way."
    if counts.tested == 0:
        one = "The one document could not"
        which = one if counts.documents == 1 else f"None of the {counts.documents:,} documents could"
        return f"{which} be tested: {words.untested}, so this report says nothing either way."
    what = _texts(calibrations) if calibrations else _mark(keys, flagged=bool(counts.flagged))
    if counts.flagged == 0:
        one = f"The one tested document {words.missed_one}"
        which = one if counts.tested == 1 else f"None of the {counts.tested:,} tested documents {words.missed_many}"
        return (
            f"{which} {what} clearly enough to be flagged at a false discovery rate of {percent(fdr)}. "
            f"This does not show that {words.null_many}."
        )
    if counts.tested == 1:
        found = f"The one tested document {words.found_one} {what} more clearly than chance explains"
        return f"{found}; {words.null_one} is flagged with probability at most {percent(fdr)}."
    share = percent(counts.flagged / counts.tested)
    found = words.found_one if counts.flagged == 1 else words.found_many
    return (
        f"{counts.flagged:,} of {counts.tested:,} tested documents ({share}) {found} {what} more clearly than chance "
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


def _mark(keys: Sequence[KeyRecord], *, flagged: bool) -> str:
    """The mark of the keys that flagged documents name, or of all that were tested."""
    key_ids = [key.id for key in keys if key.flagged or not flagged]
    if len(key_ids) == 1:
        return f"the watermark of key {key_ids[0]!r}"
    if 1 < len(key_ids) <= 3:
        return f"the watermark of one of the keys {', '.join(map(repr, key_ids[:-1]))} and {key_ids[-1]!r}"
    return f"the watermark of one of {len(key_ids)} keys" if key_ids else "the watermark"


def _texts(calibrations: Sequence[CalibrationRecord]) -> str:
    return f"the human texts of calibration {calibrations[0].id}"
