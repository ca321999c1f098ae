"""`assay plan` and its functions: sampled laws against the scorer, plans against simulation, refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from assay._cli_plan import NAMES, read_prompts
from assay._cli_plan import plan as plan_command
from assay.detection import planning
from assay.kernels.scoring.continuations import continuations
from assay.kernels.scoring.decoding import Decoding
from assay.kernels.scoring.model import ModelScorer
from assay.models import load_model, load_tokenizer_for_generation
from assay.watermark import power

PROMPT = "We walked along the shore until"


@pytest.fixture(scope="module")
def model():
    return load_model()


@pytest.fixture(scope="module")
def prompt():
    return load_tokenizer_for_generation()(PROMPT)["input_ids"]


def drawing(rng, laws):
    def choose(_, law):
        laws.append(law)
        return (law + rng.gumbel(size=law.shape)).argmax(axis=1)

    return choose


def test_laws_of_continuations_are_those_of_the_scorer(model, prompt):
    laws = []
    rule = {"temperature": 0.8, "top_k": 60, "top_p": 0.9}
    texts = continuations(
        model, prompt, drawing(np.random.default_rng(1), laws), rows=3, tokens=30, decoding=Decoding(**rule)
    )
    assert texts.shape == (3, 30)
    scored = ModelScorer(model).score(list(texts), prompt=prompt, **rule)
    ours = np.array([[law[row, token] for law, token in zip(laws, texts[row], strict=True)] for row in range(3)])
    np.testing.assert_allclose(ours, [one.log_prob for one in scored], atol=1e-4)
    entropies = [
        [-np.nansum(np.exp(law[row]) * np.where(law[row] > -99, law[row], 0)) for law in laws] for row in (0, 1, 2)
    ]
    np.testing.assert_allclose(entropies, [one.entropy for one in scored], atol=1e-3)
    # Near-miss: the laws without the truncation are others.
    assert np.abs(ours - [one.log_prob for one in ModelScorer(model).score(list(texts), prompt=prompt)]).max() > 0.1


def test_banned_and_stop_tokens(model, prompt):
    laws = []
    texts = continuations(
        model, prompt, drawing(np.random.default_rng(2), laws), rows=2, tokens=5, decoding=Decoding(), banned=[0, 7]
    )
    assert all(np.isneginf(law[:, [0, 7]]).all() for law in laws)
    np.testing.assert_allclose([np.exp(law).sum(axis=1) for law in laws], 1.0, atol=1e-5)
    ended = continuations(
        model, prompt, lambda ids, law: np.full(2, 9), rows=2, tokens=5, decoding=Decoding(), stop=[9]
    )
    assert ended.tolist() == [[9], [9]]
    assert texts.shape == (2, 5)


def test_green_chances_of_many_laws():
    rng = np.random.default_rng(3)
    laws = np.vstack([rng.dirichlet(np.full(300, a), size=2) for a in (0.01, 0.3, 5.0)])
    laws[0] = np.eye(300)[7]
    for gamma, delta in ((0.25, 2.0), (0.5, 0.01), (0.1, 8.0), (0.3, np.inf)):
        expected = [power.green_chance(law, gamma, delta) for law in laws]
        np.testing.assert_allclose(power.green_chances(laws, gamma, delta), expected, rtol=1e-4)
    with pytest.raises(ValueError, match="shape"):
        power.green_chances(laws[0])
    with pytest.raises(ValueError, match=r"laws\[1\] must sum to 1"):
        power.green_chances([[1.0, 0.0], [0.5, 0.4]])


def test_profiles_describe_the_sampled_texts(model, prompt):
    one = planning.profiles(model, [prompt], texts_per_prompt=2, tokens=12, temperature=0.7, seed=4)
    again = planning.profiles(model, [prompt, prompt], texts_per_prompt=2, tokens=12, temperature=0.7, seed=4)
    assert [len(text.probabilities) for text in again] == [12] * 4
    np.testing.assert_array_equal(one[0].probabilities, again[0].probabilities)
    assert not np.array_equal(again[0].probabilities, again[2].probabilities)  # other noise for the second prompt
    for text in one:
        assert np.all((text.probabilities > 0) & (text.probabilities <= 1))
        assert np.all((text.green_chances >= 0.25 - 1e-9) & (text.green_chances < 1))
    # Surprisal is entropy on average: 2 x 60 tokens of standard deviation about 2 nats; five sigma.
    (text,) = planning.profiles(model, [prompt], texts_per_prompt=1, tokens=240, green=None, seed=5)
    assert text.green_chances is None
    gap = -np.log(text.probabilities) - text.entropies
    assert abs(gap.mean()) < 5 * gap.std() / np.sqrt(240)


def test_plan_of_the_bundled_model(model, prompt):
    made = planning.plan_tokens(model, [prompt], texts_per_prompt=3, tokens=40, alpha=1e-3, power=0.9, temperature=0.6)
    assert (made.texts, made.longest) == (3, 40)
    tokens = {one.test: one.tokens for one in made.tests}
    assert list(tokens) == list(planning.TESTS) == list(NAMES)
    assert tokens["ump"] <= tokens["race"] <= tokens["gumbel-model-aware"] <= tokens["gumbel-sum"]
    # Sampling settings matter: a colder model needs more tokens.
    colder = planning.plan_tokens(
        model, [prompt], texts_per_prompt=3, tokens=40, alpha=1e-3, power=0.9, temperature=0.3, tests=["ump"]
    )
    assert colder.entropy < made.entropy
    assert colder.tests[0].tokens > tokens["ump"]


def command(*arguments, stdin=None):
    import typer

    app = typer.Typer()
    app.command()(plan_command)
    return CliRunner().invoke(app, [*map(str, arguments)], input=stdin)


def test_the_command_writes_json_and_a_plot(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(f'{{"prompt": "{PROMPT}"}}\n\n{{"prompt": "In the evening"}}\n{{"prompt": "Never"}}\n')
    arguments = [prompts, "--prompts", 2, "--texts", 2, "--tokens", 10, "--alpha", 1e-3, "--temperature", 0.8, "--json"]
    done = command(*arguments, "--plot", tmp_path / "a.svg")
    assert done.exit_code == 0, done.output
    shown = json.loads(done.stdout)
    assert (shown["schema"], shown["texts"], shown["longest"]) == ("assay.plan/1", 4, 10)
    assert shown["sampling"]["temperature"] == 0.8
    assert [one["test"] for one in shown["tests"]] == list(planning.TESTS)
    assert all(len(one["curve"]) == len(shown["lengths"]) for one in shown["tests"])
    assert "first 2 are used" in " ".join(done.stderr.split())
    picture = (tmp_path / "a.svg").read_bytes()
    assert picture.startswith(b"<?xml")
    again = command(*arguments, "--plot", tmp_path / "b.svg")
    assert json.loads(again.stdout) == shown
    assert (tmp_path / "b.svg").read_bytes() == picture


def test_the_table_for_people(monkeypatch):
    monkeypatch.setattr("assay._cli_plan.wants_json", lambda asked: asked)
    done = command("-", "--texts", 1, "--tokens", 6, "--temperature", 0.5, stdin=f"{PROMPT}\n")
    assert done.exit_code == 0, done.output
    for name in NAMES.values():
        assert name in done.stdout
    assert "more than 6" in done.stdout
    assert re.search(r"1 texts, \d\.\d\d nats", done.stdout)


def test_prompts_of_every_kind(tmp_path):
    lines = tmp_path / "a.txt"
    lines.write_text("\ufeffone\n\n  \ntwo words\n", encoding="utf-8")
    assert read_prompts(str(lines)) == ["one", "two words"]
    rows = tmp_path / "b.ndjson"
    rows.write_text('{"q": "x", "prompt": "y"}\n', encoding="utf-8")
    assert read_prompts(str(rows), "q") == ["x"]


@pytest.mark.parametrize(
    ("content", "name", "options", "message", "code"),
    [
        ("\n \n", "p.txt", [], "no prompt found", 2),
        ("x", "p.csv", [], "must be in a .txt, .jsonl or .ndjson file", 2),
        ("{", "p.jsonl", [], "line 1: not JSON", 2),
        ('{"a": "b"}', "p.jsonl", [], "no text in field 'prompt'", 2),
        ("x", "p.txt", ["--plot", "p.png"], "ends in .svg", 2),
        ("x", "p.txt", ["--power", "1"], "power must be in (0, 1)", 2),
        ("x", "p.txt", ["--alpha", "0"], "alpha must be in (0, 1)", 2),
        ("x", "p.txt", ["--temperature", "0"], "temperature must be a positive number", 2),
        ("x", "p.txt", ["--tokens", "100000"], "the model reads 256 tokens", 2),
        ("x", "p.txt", ["--model", "./nowhere"], "there is no folder", 2),
        (None, "p.txt", [], "No such file", 1),
    ],
)
def test_refusals_of_the_command(tmp_path: Path, content, name, options, message, code):
    path = tmp_path / name
    if content is not None:
        path.write_text(content, encoding="utf-8")
    done = command(path, "--texts", 1, "--tokens", 4, *options)
    assert done.exit_code == code, done.output
    assert message in " ".join(re.sub("[│╭╮╰╯─]", " ", done.stderr).split())


def test_refusals_of_the_functions(model, prompt):
    with pytest.raises(ValueError, match="at least one prompt"):
        planning.profiles(model, [])
    with pytest.raises(ValueError, match="at least one token id"):
        planning.profiles(model, [[]], tokens=3)
    with pytest.raises(ValueError, match="rows must be an integer"):
        planning.profiles(model, [prompt], texts_per_prompt=0, tokens=3)
    with pytest.raises(ValueError, match="test must be one of"):
        planning.plan_tokens(model, [prompt], texts_per_prompt=1, tokens=3, tests=["nope"])
