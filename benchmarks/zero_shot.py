"""Human or LLM: error rates and power of calibrated scores on a labelled collection.

    python benchmarks/zero_shot.py FOLDER [--model PATH ...] [--other PATH] [--out results.json]
    python benchmarks/zero_shot.py FOLDER --only-discoveries [--out results.json]

FOLDER holds .jsonl.gz files with the fields text, label (human or llm), model and domain. Prints a table per question,
in Markdown: which share of human texts is flagged at nominal 1 % and 5 %, by every way of calibrating and by the ways
that carry no guarantee; what happens in another domain, and whether the drift guard notices; the false discovery rate
of simulated corpora, with the collection's machine texts and with texts that the scoring model wrote itself, which it
finds; AUROC and TPR of every score. `--other` is a second model over the first one's vocabulary, for Binoculars.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import platform
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from assay.conformal.drift import DriftGuard
from assay.conformal.fdr import e_bh, storey
from assay.conformal.human import p_to_log_e
from assay.conformal.p_values import ConformalPValues
from assay.detection.multiplicity import benjamini_hochberg
from assay.detection.zero_shot import LARGER_MEANS_LLM, fit_rank_sum, zero_shot_scores
from assay.kernels.scoring.model import ModelScorer
from assay.models import load_model, load_tokenizer_for_generation

SPLITS = 200
LEVELS = (0.01, 0.05)
LENGTH_EDGES = (150, 300)
MAX_CHARACTERS = 1500  # longer texts are cut: lengths are then alike, as the collection's authors advise
DISCOVERIES = ("procedure", "nominal", "achieved", "machine texts found")

Table = list[list[str]]


def documents(folder: Path) -> list[dict[str, str]]:
    found = []
    for path in sorted(folder.glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            found += [json.loads(line) for line in lines]
    return found


def show(title: str, head: Sequence[str], rows: Table) -> None:
    print(f"\n### {title}\n")
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def flagged_with_interval(flagged: int, of: int) -> str:
    interval = stats.binomtest(flagged, of).proportion_ci(0.95, method="exact")
    return f"{percent(flagged / of)} ({percent(interval.low)} to {percent(interval.high)})"


def conformal(**settings: Any) -> Callable[..., np.ndarray]:
    def p_values(calibration: np.ndarray, new: np.ndarray, groups: np.ndarray, new_groups: np.ndarray) -> np.ndarray:
        model = ConformalPValues(level=0.5, simulations=500, **settings)
        return model.fit(calibration, groups).p_values(new, new_groups)

    return p_values


def false_positives(human: np.ndarray, domain: np.ndarray, lengths: np.ndarray, rng: np.random.Generator) -> Table:
    """Half the human texts calibrate, half are tested; 200 random splits."""
    everyone = np.full(len(human), "all")
    bins = np.searchsorted(LENGTH_EDGES, lengths).astype(str)
    ways: dict[str, tuple[Callable[..., np.ndarray], np.ndarray]] = {
        "marginal": (conformal(), everyone),
        "conditional, Simes (90 %)": (conformal(guarantee="simes"), everyone),
        "conditional, Monte Carlo (90 %)": (conformal(guarantee="monte-carlo"), everyone),
        "Mondrian by domain": (conformal(), domain),
        "Mondrian by length": (conformal(), bins),
    }
    shares: dict[tuple[str, float], list[float]] = {}
    worst: dict[tuple[str, float], list[float]] = {}
    first: dict[tuple[str, float], str] = {}
    for split in range(SPLITS):
        order = rng.permutation(len(human))
        fit, test = order[: len(order) // 2], order[len(order) // 2 :]
        for name, (way, groups) in ways.items():
            if name.startswith("conditional, Monte") and split >= 20:
                continue  # fitting its band is slow; 20 splits show it
            p = way(human[fit], human[test], groups[fit], groups[test])
            for level in LEVELS:
                record(shares, worst, first, (name, level), p <= level, domain[test])
        for level in LEVELS:
            own = np.quantile(human[test], 1 - level, method="lower")
            record(shares, worst, first, ("threshold fitted and read on the same texts", level),
                   human[test] > own, domain[test])  # fmt: skip
            record(shares, worst, first, ("fixed constant: normal quantile", level),
                   human[test] > stats.norm.isf(level), domain[test])  # fmt: skip
    return [
        [name, percent(level), flagged, percent(float(np.mean(shares[name, level]))),
         percent(float(np.mean(np.array(shares[name, level]) > level))), percent(float(np.mean(worst[name, level])))]
        for (name, level), flagged in first.items()
    ]  # fmt: skip


def record(
    shares: dict[tuple[str, float], list[float]],
    worst: dict[tuple[str, float], list[float]],
    first: dict[tuple[str, float], str],
    at: tuple[str, float],
    flagged: np.ndarray,
    domain: np.ndarray,
) -> None:
    shares.setdefault(at, []).append(float(np.mean(flagged)))
    worst.setdefault(at, []).append(max(float(np.mean(flagged[domain == d])) for d in np.unique(domain)))
    first.setdefault(at, flagged_with_interval(int(np.sum(flagged)), len(flagged)))


def across_domains(human: np.ndarray, domain: np.ndarray, rng: np.random.Generator) -> Table:
    """Calibrated on one domain, tested on another; the guard watches the other domain's human texts arrive."""
    rows = []
    names = [d for d in np.unique(domain) if np.sum(domain == d) >= 80]
    for source in names:
        for target in names:
            own, other = human[domain == source], human[domain == target]
            if source == target:
                order = rng.permutation(len(own))
                own, other = own[order[: len(own) // 2]], own[order[len(own) // 2 :]]
            p = ConformalPValues(level=0.05).fit(own).p_values(other)
            guard = DriftGuard(own, level=0.01, rng=rng)
            for score in rng.permutation(other):
                guard.update(float(score))
            alarm = "none" if guard.alarm_at is None else f"after {guard.alarm_at} texts"
            rows.append([source, target, str(len(own)), flagged_with_interval(int(np.sum(p <= 0.05)), len(p)), alarm])
    return rows


def discoveries(human: np.ndarray, machine: np.ndarray, rng: np.random.Generator) -> Table:
    """200 corpora of 150 documents, 30 of them by machines, judged with 400 other human texts."""
    rows = []
    procedures: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "Benjamini-Hochberg": benjamini_hochberg,
        "Storey": storey,
        "e-BH on calibrated p-values": lambda log_p: e_bh(np.array([p_to_log_e(p) for p in np.exp(log_p)])),
        "no correction": lambda log_p: log_p,
    }
    for nominal in (0.1, 0.2):
        for name, procedure in procedures.items():
            wrong, power = [], []
            for _ in range(200):
                order = rng.permutation(len(human))
                fit, rest = human[order[:400]], human[order[400:]]
                corpus = np.concatenate([rng.choice(rest, 120, replace=False), rng.choice(machine, 30, replace=False)])
                log_p = np.log(ConformalPValues(level=0.01).fit(fit).p_values(corpus))
                rejected = procedure(log_p) <= math.log(nominal)
                wrong.append(np.sum(rejected[:120]) / max(1, np.sum(rejected)))
                power.append(np.mean(rejected[120:]))
            error = np.std(wrong) / math.sqrt(len(wrong))
            achieved = f"{percent(float(np.mean(wrong)))} ± {percent(float(error))}"
            rows.append([name, percent(nominal), achieved, percent(float(np.mean(power)))])
    return rows


def own_texts(scorer: ModelScorer, count: int) -> list[str]:
    """Texts of 200 tokens that the scoring model writes at temperature 0.7: machine texts that even it can tell."""
    import torch

    torch.manual_seed(0)
    bos = scorer.model.config.bos_token_id
    inputs = torch.full((count, 1), bos)
    made = scorer.model.generate(
        inputs, do_sample=True, temperature=0.7, top_k=0, min_new_tokens=200, max_new_tokens=200, pad_token_id=bos
    )
    return [str(text) for text in scorer.tokenizer.batch_decode(made, skip_special_tokens=True)]


def power(scores: dict[str, np.ndarray], label: np.ndarray, domain: np.ndarray) -> Table:
    """AUROC and TPR at 5 % and 1 % of human texts flagged, per domain and averaged over domains."""
    rows = []
    for name, values in scores.items():
        signed = values if LARGER_MEANS_LLM.get(name, True) else -values
        aurocs, at5, at1 = [], [], []
        for d in np.unique(domain):
            human, machine = signed[(domain == d) & (label == "human")], signed[(domain == d) & (label == "llm")]
            if len(human) < 80 or len(machine) < 20:
                continue
            rank = stats.mannwhitneyu(machine, human).statistic / (len(machine) * len(human))
            aurocs.append(rank)
            at5.append(np.mean(machine > np.quantile(human, 0.95)))
            at1.append(np.mean(machine > np.quantile(human, 0.99)))
        rows.append([name, f"{np.mean(aurocs):.3f}", f"{np.min(aurocs):.3f} to {np.max(aurocs):.3f}",
                     percent(float(np.mean(at5))), percent(float(np.mean(at1)))])  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", action="append", help="a scoring model; repeat it; default the bundled one")
    parser.add_argument("--other", help="a second model over the first one's vocabulary, for Binoculars")
    parser.add_argument("--only-discoveries", action="store_true", help="false discovery rates alone")
    parser.add_argument("--score", default="curvature", help="the score of the tables on error rates")
    parser.add_argument("--out", type=Path, help="JSON; what --only-discoveries finds is added to an older run's")
    options = parser.parse_args()
    rows = documents(options.folder)
    if options.only_discoveries:
        rows = [row for row in rows if row["label"] == "human"]
    label = np.array([row["label"] for row in rows])
    domain = np.array([row["domain"] for row in rows])
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    print(f"{len(rows)} texts, {np.sum(label == 'human')} human, {len(np.unique(domain))} domains; cut to "
          f"{MAX_CHARACTERS} characters. Commit {commit.stdout.strip()}, {platform.machine()}.")  # fmt: skip
    kept: dict[str, Any] = {}
    for spec in options.model or ["default"]:
        scorer = ModelScorer(load_model(spec), load_tokenizer_for_generation(spec))
        texts = [row["text"][:MAX_CHARACTERS] for row in rows]
        name = Path(spec).name
        first = spec == (options.model or ["default"])[0]
        second = options.other if first else None
        other = None if second is None else ModelScorer(load_model(second), scorer.tokenizer)
        scores = zero_shot_scores(texts, scorer, other=other)
        human = label == "human"
        # The combination learns ranks on a third of the human texts, which then take no part in its row.
        rng = np.random.default_rng(0)
        learns = human & (rng.random(len(rows)) < 1 / 3)
        combined = fit_rank_sum({key: values[learns] for key, values in scores.items()}).combine(scores)
        rest = ~learns
        kept[name] = {}
        if not options.only_discoveries:
            table = power(scores, label, domain)
            table += power({"sum of log ranks": combined[rest]}, label[rest], domain[rest])
            show(f"Power, scorer {name}", ["score", "AUROC", "over domains", "TPR at 5 %", "TPR at 1 %"], table)
            kept[name] = {"power": table}
        if not first:
            continue
        sign = 1 if LARGER_MEANS_LLM[options.score] else -1
        signed = sign * scores[options.score]
        own = sign * zero_shot_scores(own_texts(scorer, 150), scorer, other=other)[options.score]
        found = discoveries(signed[human], own, np.random.default_rng(1))
        title = "False discovery rate of 200 simulated corpora, "
        show(title + "machine texts of the scorer at temperature 0.7", DISCOVERIES, found)
        kept[name]["discoveries_of_its_own"] = found
        if options.only_discoveries:
            continue
        lengths = np.array([len(text) // 4 for text in texts])
        head = ["way", "nominal", "first split (95 % interval)", "mean of 200 splits", "splits above", "worst domain"]
        fpr = false_positives(signed[human], domain[human], lengths[human], rng)
        show(f"Human texts flagged, score {options.score}, scorer {name}", head, fpr)
        shift = across_domains(signed[human], domain[human], rng)
        head = ["calibrated on", "tested on", "n", "flagged at 5 % (95 % interval)", "drift alarm at 1 %"]
        show("Another domain without Mondrian calibration", head, shift)
        fdr = discoveries(signed[human], signed[~human], rng)
        show(title + "machine texts of the collection", DISCOVERIES, fdr)
        kept[name] |= {"false_positives": fpr, "across_domains": shift, "discoveries": fdr}
    if options.out:
        made: dict[str, Any] = {"commit": commit.stdout.strip(), "tables": kept}
        if options.only_discoveries and options.out.exists():  # beside the whole run, under its own commit
            made = json.loads(options.out.read_text()) | {"only_discoveries": made}
        options.out.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
