"""The numbers of a report against independent calculations."""

from __future__ import annotations

import math
from datetime import datetime

import numpy as np
import pytest
from scipy import stats

from assay.detection.result import TestResult
from assay.report import Excerpt, InputFile, Report, columns, shares, wording
from assay.report.records import Counts, KeyRecord


def result(log_pvalue: float = -1.0, n_tokens: int = 300, **changes: object) -> TestResult:
    values = {"test": "gumbel-sum", "statistic": 1.0, "log_evalue": -log_pvalue / 2, "n_scored": max(0, n_tokens - 4)}
    named = {"null": "no key", "alternative": "greater", "key_id": "k", "scheme": "gumbel/1"}
    return TestResult(log_pvalue=log_pvalue, n_tokens=n_tokens, **{**values, **named, **changes})


def test_counts_against_loops(synthetic) -> None:
    report = synthetic.report(fdr=0.05)
    tested = [r for r in synthetic.results if r[2].n_scored]
    counts = report.counts
    assert (counts.documents, counts.tested) == (300, len(tested))
    assert counts.tokens == sum(r.n_tokens for _, _, r in synthetic.results)
    assert counts.tokens_scored == sum(r.n_scored for _, _, r in synthetic.results)
    assert counts.repeats_dropped == sum(r.n_repeats_dropped for _, _, r in synthetic.results)
    assert counts.short == sum(r.n_tokens < 200 for _, _, r in tested)
    assert sum(report.histogram.counts) == counts.tested
    assert report.histogram.counts[0] == sum(r.pvalue < 0.05 for _, _, r in tested)
    assert sum(one.documents for one in report.sources) == sum(one.documents for one in report.lengths) == counts.tested
    assert sum(one.flagged for one in report.sources) == sum(one.flagged for one in report.lengths) == counts.flagged
    assert [key.flagged for key in report.keys] == [counts.flagged]


def step_up(log_pvalues: list[float], fdr: float) -> set[int]:
    """Benjamini and Hochberg's own words: the largest k with p_(k) <= k q / n, reject the k smallest."""
    order = sorted(range(len(log_pvalues)), key=log_pvalues.__getitem__)
    passing = [i + 1 for i, row in enumerate(order) if log_pvalues[row] <= math.log((i + 1) * fdr / len(order))]
    return set(order[: max(passing, default=0)])


@pytest.mark.parametrize("fdr", [0.001, 0.01, 0.05, 0.2])
def test_flags_are_those_of_the_step_up_procedure(synthetic, fdr: float) -> None:
    log_pvalues = [r.log_pvalue for _, _, r in synthetic.results]
    expected = {synthetic.results[i][0] for i in step_up(log_pvalues, fdr)}
    report = synthetic.report(fdr=fdr, listed=300)
    assert {one.doc_id for one in report.documents if one.flagged} == expected
    assert report.counts.flagged == len(expected)
    assert report.log_pvalue_threshold == max(log_pvalues[i] for i in step_up(log_pvalues, fdr))
    # The near-misses: no correction flags more, Bonferroni flags fewer.
    assert sum(p <= math.log(fdr) for p in log_pvalues) > len(expected)
    assert sum(p <= math.log(fdr / 300) for p in log_pvalues) < len(expected)


@pytest.mark.parametrize(
    ("successes", "trials"), [(0, 1), (1, 1), (0, 30), (30, 30), (7, 30), (499, 1000), (1, 100_000), (3, 10**7)]
)
def test_clopper_pearson_against_scipy_and_its_definition(successes: int, trials: int) -> None:
    low, high = shares.clopper_pearson(successes, trials)
    expected = stats.binomtest(successes, trials).proportion_ci(0.95, method="exact")
    assert (low, high) == pytest.approx((expected.low, expected.high), rel=1e-3)
    assert low == 0 if successes == 0 else stats.binom.sf(successes - 1, trials, low) == pytest.approx(0.025, rel=1e-9)
    assert high == 1 if successes == trials else stats.binom.cdf(successes, trials, high) == pytest.approx(0.025, 1e-9)


def test_clopper_pearson_covers_every_share_and_wald_does_not() -> None:
    n = 20
    truths = np.linspace(0.001, 0.999, 999)
    pmf = stats.binom.pmf(np.arange(n + 1)[:, None], n, truths)
    exact = np.array([shares.clopper_pearson(k, n) for k in range(n + 1)])
    k = np.arange(n + 1)
    half = 1.96 * np.sqrt(k / n * (1 - k / n) / n)
    wald = np.stack([k / n - half, k / n + half], axis=1)

    def least_coverage(intervals: np.ndarray) -> float:
        inside = (intervals[:, :1] <= truths) & (truths <= intervals[:, 1:])
        return float(np.min(np.sum(pmf * inside, axis=0)))

    assert least_coverage(exact) >= 0.95
    assert least_coverage(wald) < 0.5


@pytest.mark.parametrize("n", [0, 1, 7, 300, 10_000_000])
def test_band_against_scipy(n: int) -> None:
    for probability in (0.00025, 0.5, 0.99975):
        expected = stats.binom.ppf(probability, n, 0.05) if n else 0
        assert shares._binomial_quantile(probability, n, 0.05) == expected
    histogram = shares.histogram(np.full(min(n, 300), -1.0))
    if n <= 300:
        ends = stats.binom.ppf([0.01 / 40, 1 - 0.01 / 40], n, 0.05) if n else (0, 0)
        assert (histogram.band_low, histogram.band_high) == tuple(ends)


def test_uniform_pvalues_stay_in_the_band_and_marked_ones_leave_it() -> None:
    # 1500 reports on unmarked documents. The band errs in at most 1 % of them: more than 30 errors have
    # probability 3e-4 (binomial); the seed is fixed. A band without Bonferroni's correction errs in about 18 %.
    rng = np.random.default_rng(0)
    low, high = stats.binom.ppf([0.005, 0.995], 300, 0.05)
    outside = uncorrected = 0
    for _ in range(1500):
        h = shares.histogram(np.log(rng.random(300)))
        outside += not all(h.band_low <= count <= h.band_high for count in h.counts)
        uncorrected += not all(low <= count <= high for count in h.counts)
    assert outside <= 30
    assert uncorrected > 100
    marked = shares.histogram(np.log(rng.random(300) ** 3))
    assert marked.counts[0] > marked.band_high


def test_histogram_edges() -> None:
    counts = shares.histogram(np.array([0.0, -math.inf, math.log(0.05), math.log(0.049), -5000.0])).counts
    assert (counts[0], counts[1], counts[-1], sum(counts)) == (3, 1, 1, 5)


@pytest.mark.parametrize(
    ("n_tokens", "bucket"), [(5, 0), (49, 0), (50, 1), (199, 2), (200, 3), (399, 3), (3199, 6), (3200, 7), (10**7, 7)]
)
def test_length_buckets(n_tokens: int, bucket: int) -> None:
    report = Report.from_results([("a", "s", result(-2.0, n_tokens))])
    assert [one.documents for one in report.lengths] == [int(i == bucket) for i in range(8)]
    one = report.lengths[bucket]
    assert (one.log_pvalue_smallest, one.log_pvalue_median) == (-2.0, -2.0)
    assert report.documents[0].short == (n_tokens < 200)


def test_median_of_an_even_bucket_is_a_pvalue_that_occurred() -> None:
    rows = [(str(i), "s", result(p)) for i, p in enumerate([-math.inf, -math.inf, -3.0, -1.0])]
    assert Report.from_results(rows).lengths[3].log_pvalue_median == -math.inf


def test_most_certain_documents_come_first_ties_by_evalue_then_order() -> None:
    rows = [
        ("c", "s", result(-2.0, log_evalue=1.0)),
        ("b", "s", result(-2.0, log_evalue=3.0)),
        ("a", "s", result(-9.0, log_evalue=0.0)),
        ("d", "s", result(-2.0, log_evalue=1.0)),
    ]
    assert [one.doc_id for one in Report.from_results(rows, listed=3).documents] == ["a", "b", "c"]
    assert Report.from_results(rows, listed=0).documents == ()
    excerpt = Excerpt(doc_id="d", pieces=("x",), log_tail=(None,))
    assert [one.doc_id for one in Report.from_results(rows, listed=1, excerpts=[excerpt]).documents] == ["a", "d"]


def test_untested_documents_are_counted_and_nothing_else() -> None:
    rows = [("a", "s", result(-50.0)), ("b", "t", result(0.0, 3)), ("c", "t", result(0.0, 0))]
    report = Report.from_results(rows)
    assert (report.counts.documents, report.counts.tested, report.counts.flagged) == (3, 1, 1)
    assert [one.source for one in report.sources] == ["s"]
    assert sum(report.histogram.counts) == 1


def test_most_sources_are_listed_largest_first() -> None:
    rows = [(str(i), f"s{i % 250}", result()) for i in range(600)]
    report = Report.from_results(rows)
    assert (len(report.sources), report.sources_left_out) == (200, 50)
    assert [one.documents for one in report.sources[:100]] == [3] * 100


def test_most_inputs_are_listed_and_the_rest_counted() -> None:
    inputs = [InputFile(name=f"f{i}", sha256=None, size=i) for i in range(1003)]
    report = Report.from_results([("a", "s", result())], inputs=inputs)
    assert (len(report.inputs), report.inputs_left_out) == (1000, 3)
    assert "Input files: the first 50 of 1003" in report.to_html()


def test_records_of_a_run_are_taken_by_their_columns() -> None:
    from types import SimpleNamespace

    fields = ("statistic", "log_pvalue", "log_evalue", "n_tokens", "n_scored", "n_repeats_dropped", "key_id", "scheme")
    values = {name: getattr(result(-20.0), name) for name in fields}
    (one,) = Report.from_results([SimpleNamespace(doc_id="d", source=None, file="f", row=3, **values)]).documents
    assert (one.source, one.file, one.row, one.flagged) == ("(no source)", "f", 3, True)


def test_keys_not_described_are_named_without_fingerprint() -> None:
    found = [result(-50.0, key_id="k1"), result(-1.0, key_id="k2"), result(-1.0, key_id=None)]
    rows = [(f"doc {i}", "s", one) for i, one in enumerate(found)]
    keys = Report.from_results(rows).keys
    assert [(key.id, key.fingerprint, key.flagged) for key in keys] == [("k1", None, 1), ("k2", None, 0)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fdr": 0.0}, r"fdr must be in \(0, 1\), got 0.0"),
        ({"fdr": math.nan}, "fdr must be in"),
        ({"fdr": "0.1"}, "fdr must be in"),
        ({"listed": -1}, "listed must be an integer of at least 0, got -1"),
        ({"listed": True}, "listed must be an integer"),
        ({"made": datetime(2026, 1, 1)}, "made must have a time zone"),
        ({"excerpts": [Excerpt(doc_id="zz", pieces=(), log_tail=())]}, "must name each one document, got 'zz'"),
        ({"excerpts": [Excerpt(doc_id="a", pieces=(), log_tail=())] * 2}, "at most one excerpt"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Report.from_results([("a", "s", result())], **arguments)


def test_bad_results_and_excerpts_are_named() -> None:
    with pytest.raises(ValueError, match="got int without 'doc_id'"):
        Report.from_results([7])
    with pytest.raises(ValueError, match="one entry per piece, got 1 for 2 pieces"):
        Excerpt(doc_id="a", pieces=("x", "y"), log_tail=(None,))
    for bad in (0.1, math.nan):
        with pytest.raises(ValueError, match="logarithms of probabilities, at most 0"):
            Excerpt(doc_id="a", pieces=("x",), log_tail=(bad,))


def counts(documents: int, tested: int, flagged: int) -> Counts:
    rest = {"short": 0, "short_flagged": 0, "rejected": 0, "tokens": 0, "tokens_scored": 0, "repeats_dropped": 0}
    return Counts(documents=documents, tested=tested, flagged=flagged, **rest)


def keys(*flagged: int) -> list[KeyRecord]:
    blank = {"scheme": None, "parameters": None, "fingerprint": None, "state": None}
    return [KeyRecord(id=f"k{i}", flagged=hits, **blank) for i, hits in enumerate(flagged)]


@pytest.mark.parametrize(
    ("found", "named", "words"),
    [
        (counts(0, 0, 0), keys(), "There were no documents to test"),
        (counts(1, 0, 0), keys(0), "The one document could not be tested"),
        (counts(3, 0, 0), keys(0), "None of the 3 documents could be tested"),
        (counts(1, 1, 0), keys(0), "The one tested document does not show the watermark of key 'k0'"),
        (counts(9, 8, 0), keys(0), "None of the 8 tested documents shows the watermark of key 'k0'"),
        (counts(1, 1, 1), keys(1), "The one tested document carries the watermark of key 'k0'"),
        (counts(9, 8, 1), keys(1), "1 of 8 tested documents (12.5%) carries the watermark of key 'k0'"),
        (counts(9, 8, 4), keys(1, 3, 0), "(50%) carry the watermark of one of the keys 'k0' and 'k1' more"),
        (counts(9000, 8000, 5), keys(1, 1, 1, 2), "5 of 8,000 tested documents (0.0625%) carry the watermark of"),
    ],
)
def test_verdicts(found: Counts, named: list[KeyRecord], words: str) -> None:
    text = wording.verdict(found, 0.01, named)
    assert words in text
    if found.flagged > 1:
        assert "at most 1% are expected to be false alarms" in text
    if found.tested and not found.flagged:
        assert "does not show that the documents are unmarked" in text


@pytest.mark.parametrize(
    ("share", "text"), [(0.01, "1%"), (1e-9, "0.0000001%"), (1.0, "100%"), (0.99999, "over 99.9%"), (0.12345, "12.3%")]
)
def test_percent(share: float, text: str) -> None:
    assert wording.percent(share) == text


def test_ten_million_documents_fit() -> None:
    # Selection of the listed documents must not sort everything three times over: one partition, then the few.
    rng = np.random.default_rng(1)
    log_pvalue = np.log(rng.random(1_000_000))
    order = np.lexsort((np.arange(len(log_pvalue)), log_pvalue))[:20]
    assert columns.most_certain(log_pvalue, np.zeros(len(log_pvalue)), 20) == order.tolist()
    assert columns.most_certain(log_pvalue[:3], np.zeros(3), 20) == np.argsort(log_pvalue[:3]).tolist()


def test_pieces_and_ids_are_cut_and_surrogates_shown() -> None:
    excerpt = Excerpt(doc_id="a\udc80", pieces=("x" * 1_000_000, "\ud800"), log_tail=(-1.0, None))
    (one,) = Report.from_results([("a\udc80", "s\udfff", result())], excerpts=[excerpt]).documents
    assert (one.doc_id, one.source) == ("a\\udc80", "s\\udfff")
    assert one.excerpt is not None
    assert [len(piece) for piece in one.excerpt.pieces] == [200, 6]


def test_excerpt_keeps_the_200_tokens_with_most_evidence() -> None:
    rng = np.random.default_rng(3)
    tails = np.log(rng.random(5000))
    tails[3100:3300] *= 1.5
    tails[3150] = -math.inf
    listed = [None if i % 7 == 0 else float(tail) for i, tail in enumerate(tails)]
    whole = Excerpt(doc_id="a", pieces=tuple(map(str, range(5000))), log_tail=tuple(listed))
    (one,) = Report.from_results([("a", "s", result(n_tokens=5000))], excerpts=[whole]).documents
    # Brute force over all windows, an infinite score counted as 1000.
    excess = [0.0 if tail is None else min(-tail, 1000.0) - 1 for tail in listed]
    best = max(range(4801), key=lambda i: sum(excess[i : i + 200]))
    assert one.excerpt is not None
    assert one.excerpt.start == best
    assert one.excerpt.pieces == tuple(map(str, range(best, best + 200)))
    assert one.excerpt.log_tail == tuple(listed[best : best + 200])


def test_long_excerpts_are_cut() -> None:
    many = Excerpt(doc_id="a", pieces=("x",) * 5000, log_tail=(None,) * 5000)
    (one,) = Report.from_results([("a", "s", result())], excerpts=[many]).documents
    assert one.excerpt is not None
    assert len(one.excerpt.pieces) == len(one.excerpt.log_tail) == 200
