"""Power of the tests of "this model wrote it" at equal level: python benchmarks/zero_shot_identity.py

Toy model: at each place an independent law over 500 tokens, softmax of normal logits of standard deviation 2. Texts
are drawn from the model itself (the null), at other temperatures and after top-k 50; every test is told temperature 1.
The first table is for texts of 200 tokens; `--dominance` for lengths from 50 to 1000; `--trap` is not a toy: texts that
the bundled model wrote by several rules, under the null of plain sampling and of the rule itself; `--pair` is the hard
pair of "A or B?", the bundled model and a second training of it from another seed. Hoeffding's test is
given the true range of each law, which no scoring pass knows; the textbook Freedman bound is given the observed sum of
varentropies as if it had been fixed in advance, which favours it. The normal test has no proved level.
"""

from __future__ import annotations

import argparse
import gzip
import math
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from assay.detection.zero_shot import freedman_test, gap_test, studentised_score, tilt_test
from assay.kernels.scoring.statistics import DEFAULT_TILTS, Floats, TokenStatistics

VOCABULARY, SPREAD, SEED = 500, 2.0, 20261121
DATA = Path(__file__).resolve().parent.parent / "data"
SECOND_SEED = DATA / "models" / "second-seed"
TRUTHS = ("T = 1 (null)", "T = 0.9", "T = 0.8", "T = 1.1", "top-k 50")
TESTS = (
    "normal z",
    "Hoeffding-Azuma",
    "Freedman textbook",
    "Freedman mixture",
    "entropy gap",
    "tilt at the end",
    "tilt any time",
)


def draw(law: Floats, truth: str, rng: np.random.Generator) -> np.ndarray:
    """One token per row of log-probabilities, from what really writes."""
    if truth.startswith("T"):
        law = law / float(truth.split("=")[1].split()[0])
    elif truth.startswith("top-k"):
        k = int(truth.split()[1])
        law = np.where(law >= np.partition(law, -k, axis=1)[:, -k, None], law, -np.inf)
    return np.argmax(law + rng.gumbel(size=law.shape), axis=1)


def text(truth: str, n: int, rng: np.random.Generator) -> tuple[TokenStatistics, Floats]:
    """Statistics of one text under the model, and the range of each token's surprisal."""
    logits = rng.normal(scale=SPREAD, size=(n, VOCABULARY))
    law = logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True))
    chosen = draw(law, truth, rng)
    p, tilts = np.exp(law), np.array(DEFAULT_TILTS)
    entropy = -np.sum(p * law, axis=1)
    centred = -law - entropy[:, None]
    statistics = TokenStatistics(
        log_prob=law[np.arange(n), chosen],
        entropy=entropy,
        varentropy=np.sum(p * centred**2, axis=1),
        third_moment=np.sum(p * centred**3, axis=1),
        rank=np.ones(n, dtype=np.int64),  # not used here
        ties=np.zeros(n, dtype=np.int64),
        max_log_prob=np.max(law, axis=1),
        tilts=tilts,
        tilted_log_sums=np.stack([np.log(np.sum(p ** (1 - s), axis=1)) for s in tilts], axis=1),
        scored=np.ones(n, dtype=np.bool_),
    )
    return statistics, np.ptp(law, axis=1)


def log_pvalues(statistics: TokenStatistics, ranges: Floats) -> dict[str, float]:
    """What each test makes of one text."""
    total = abs(float(np.sum(-statistics.log_prob - statistics.entropy)))
    v, b = float(np.sum(statistics.varentropy)), math.log(VOCABULARY)
    tilt = tilt_test(statistics)
    return {
        "normal z": math.log(max(math.erfc(abs(studentised_score(statistics)) / math.sqrt(2)), 1e-300)),
        "Hoeffding-Azuma": math.log(2) - 2 * total**2 / float(np.sum(ranges**2)),
        "Freedman textbook": math.log(2) - total**2 / (2 * (v + b * total / 3)),
        "Freedman mixture": freedman_test(statistics, candidates=VOCABULARY).log_pvalue,
        "entropy gap": gap_test(statistics, candidates=VOCABULARY).log_pvalue,
        "tilt at the end": -tilt.log_evalue,
        "tilt any time": tilt.log_pvalue,
    }


def rejections(truth: str, n: int, count: int, level: float) -> dict[str, float]:
    """Share of `count` texts that each test rejects."""
    rng = np.random.default_rng([SEED, TRUTHS.index(truth), n])
    found = [log_pvalues(*text(truth, n, rng)) for _ in range(count)]
    return {test: float(np.mean([one[test] <= math.log(level) for one in found])) for test in TESTS}


def table(rows: list[tuple[str, dict[str, float]]], show: Callable[[str], None] = print) -> None:
    show(f"| {'':22s} | " + " | ".join(TESTS) + " |")
    show("|---" * (len(TESTS) + 1) + "|")
    for name, row in rows:
        show(f"| {name:22s} | " + " | ".join(f"{100 * row[test]:.1f} %" for test in TESTS) + " |")


def generate(
    model: Any, count: int, n: int, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> list[np.ndarray]:
    """Token ids of texts of n tokens that the model writes after its beginning-of-sequence token."""
    import torch
    from transformers import GenerationConfig

    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    model.generation_config = GenerationConfig()  # its own ends texts at a token, which changes the law
    config = GenerationConfig(
        do_sample=True,
        max_new_tokens=n,
        temperature=temperature,
        top_k=top_k or 0,
        top_p=top_p or 1.0,
        pad_token_id=0,
    )
    texts: list[np.ndarray] = []
    while len(texts) < count:
        inputs = torch.full((100, 1), model.config.bos_token_id)
        made = model.generate(inputs, attention_mask=torch.ones_like(inputs), generation_config=config)
        texts += list(made[:, 1:].numpy())
    return texts[:count]


def trap(count: int, level: float) -> None:
    """How often the model's own texts are rejected: by the naive null, and by the null that names the rule."""
    from assay.detection.zero_shot import identity_tests
    from assay.kernels.scoring.decoding import Decoding
    from assay.kernels.scoring.model import ModelScorer
    from assay.models import load_model

    model = load_model()
    scorer = ModelScorer(model)
    print(f"{count} texts of 200 tokens a row, level {level}")
    print("| sampled at | plain sampling, normal z | plain sampling, tilt | the rule itself, tilt |\n|---|---|---|---|")
    for rule in (Decoding(), Decoding(temperature=0.7), Decoding(top_k=50), Decoding(top_p=0.9)):
        texts = generate(model, count, 200, temperature=rule.temperature, top_k=rule.top_k, top_p=rule.top_p)
        plain = scorer.score(texts[:count])
        shares = [
            np.mean([math.erfc(abs(studentised_score(one)) / math.sqrt(2)) <= level for one in plain]),
            np.mean([tilt_test(one).log_pvalue <= math.log(level) for one in plain]),
            np.mean([one.pvalue <= level for one in identity_tests(texts[:count], scorer, decoding=rule)]),
        ]
        name = f"temperature {rule.temperature:g}, top-k {rule.top_k}, top-p {rule.top_p}"
        print(f"| {name} | " + " | ".join(f"{100 * share:.1f} %" for share in shares) + " |")


def pair(folder: Path, count: int, level: float) -> None:
    """The hard pair: two trainings of one architecture on the same books. Texts of each, and of a human."""
    from assay.detection.zero_shot import Candidate, attribute_all
    from assay.kernels.scoring.model import ModelScorer
    from assay.models import load_model, load_tokenizer_for_generation

    tokenizer = load_tokenizer_for_generation()
    scorers = {"first": ModelScorer(load_model(), tokenizer), "second": ModelScorer(load_model(folder), tokenizer)}
    sides = {"first": Candidate(scorer=scorers["first"])}, {"second": Candidate(scorer=scorers["second"])}
    # A book that neither was trained on.
    book = gzip.decompress((DATA / "corpus" / "the-time-machine.txt.gz").read_bytes()).decode("utf-8")
    prose = tokenizer(" ".join(book.split()), add_special_tokens=False)["input_ids"]
    answers = ("first", "second", "none of them", "undecided")
    print(f"Up to {count} texts a row, level {level}. The author is missed: it is not among the plausible candidates.")
    print("| author, tokens | " + " | ".join(answers) + " | author missed |\n" + "|---" * 6 + "|")
    for n in (15, 30, 60, 120):
        texts: dict[str, list[Any]] = {name: generate(one.model, count, n) for name, one in scorers.items()}
        texts["a human"] = [prose[start : start + n] for start in range(0, len(prose) - n, n)][:count]
        for author, documents in texts.items():
            found = attribute_all(documents, *sides, level=level)
            shares = Counter(one.answer for one in found)
            missed = sum(author not in one.plausible for one in found) if author in scorers else None
            cells = [f"{100 * shares[name] / len(found):.1f} %" for name in answers]
            cells.append("" if missed is None else f"{100 * missed / len(found):.1f} %")
            print(f"| {author}, {n} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=1500)
    parser.add_argument("--level", type=float, default=0.05)
    parser.add_argument("--dominance", action="store_true", help="lengths from 50 to 1000")
    parser.add_argument("--trap", action="store_true", help="the bundled model's own texts")
    parser.add_argument("--pair", type=Path, nargs="?", const=SECOND_SEED, help="folder of the second model")
    options = parser.parse_args()
    start = time.process_time()
    if options.trap:
        trap(options.texts, options.level)
    elif options.pair:
        pair(options.pair, options.texts, options.level)
    elif not options.dominance:
        print(f"{options.texts} texts of 200 tokens, level {options.level}")
        table([(truth, rejections(truth, 200, options.texts, options.level)) for truth in TRUTHS])
    else:
        rivals = ("Hoeffding-Azuma", "Freedman textbook", "Freedman mixture", "entropy gap")
        rows, lost = [], []
        for truth in TRUTHS[1:]:
            for n in (50, 100, 200, 500, 1000):
                row = rejections(truth, n, options.texts, options.level)
                rows.append((f"{truth}, {n} tokens", row))
                lost += [(rows[-1][0], rival) for rival in rivals if row[rival] > row["tilt any time"]]
        print(f"{options.texts} texts, level {options.level}")
        table(rows)
        print("The tilt e-process rejects less often than:", lost or "no rival, at no length")
    print(f"{time.process_time() - start:.0f} CPU seconds")


if __name__ == "__main__":
    main()
