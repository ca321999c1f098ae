"""Power on your prompts with your model: sample texts, take the law of every token, and plan the number of tokens.

Given the sampled texts each test's Type II error is exact (see `assay.watermark.power.plan`); what is left is the
spread over texts, which the plan states as a standard error. Source of the theory: Huang et al. (2023),
arXiv:2312.07930, section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from assay.watermark.power import TESTS as TESTS
from assay.watermark.power import Plan, Test, TextProfile, green_chances, plan

Floats = npt.NDArray[np.float64]


def profiles(
    model: Any,
    prompts: Sequence[Sequence[int] | npt.NDArray[np.integer[Any]]],
    *,
    texts_per_prompt: int = 4,
    tokens: int = 200,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    green: tuple[float, float] | None = (0.25, 2.0),
    seed: int = 0,
    progress: Callable[[int], None] = lambda count: None,
) -> list[TextProfile]:
    """Texts sampled from a model, as `power.plan` reads them.

    The texts are not marked: a mark without distortion does not change their law. The end of sequence is never drawn,
    as with transformers' `min_new_tokens`, so that all texts have the length asked for.

    Parameters
    ----------
    model
        A transformers causal language model, such as `assay.models.load_model` returns.
    prompts
        Token ids, one integer array of shape (n,), n >= 1, per prompt.
    texts_per_prompt
        Texts sampled for each prompt, >= 1.
    tokens
        Length of each text, >= 1.
    temperature, top_k, top_p, min_p
        The decoding rule; see `assay.detect`.
    green
        (gamma, delta) of the green list, for its test; None leaves it out.
    seed
        Of the samples.
    progress
        Called after each prompt with the number of prompts done.

    Returns
    -------
    One profile per text, prompt after prompt.

    Raises
    ------
    ValueError
        If there is no prompt, an argument is out of range, or prompt and text pass what the model can read.
    """
    from assay.kernels.scoring.continuations import continuations
    from assay.kernels.scoring.decoding import Decoding

    if len(prompts) == 0:
        raise ValueError("prompts must hold at least one prompt, got none.")
    decoding = Decoding(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    found: list[TextProfile] = []
    for number, prompt in enumerate(prompts):
        rng = np.random.default_rng((seed, number))
        columns: list[tuple[Floats, Floats, Floats]] = []

        def choose(
            _: npt.NDArray[np.int64],
            law: npt.NDArray[np.float32],
            rng: np.random.Generator = rng,
            columns: list[tuple[Floats, Floats, Floats]] = columns,
        ) -> npt.NDArray[np.int64]:
            p = np.exp(law.astype(np.float64))
            p /= p.sum(axis=1, keepdims=True)
            # The place of a uniform number in the cumulated law; never a token of probability zero.
            cumulated = np.cumsum(p, axis=1)
            u = rng.random((len(p), 1)) * cumulated[:, -1:]
            drawn: npt.NDArray[np.int64] = np.sum(cumulated <= u, axis=1, dtype=np.int64)
            entropy = -np.sum(np.where(p > 0.0, p * np.log(np.where(p > 0.0, p, 1.0)), 0.0), axis=1) + 0.0
            chances = np.empty(0) if green is None else green_chances(p, *green)
            columns.append((p[np.arange(len(p)), drawn], entropy, chances))
            return drawn

        continuations(
            model,
            prompt,
            choose,
            rows=texts_per_prompt,
            tokens=tokens,
            decoding=decoding,
            banned=_end_of_sequence(model),
        )
        p, entropies, chances = (np.array(column).T for column in zip(*columns, strict=True))
        found += [
            TextProfile(p[row], entropies[row], None if green is None else chances[row])
            for row in range(texts_per_prompt)
        ]
        progress(number + 1)
    return found


def plan_tokens(
    model: Any,
    prompts: Sequence[Sequence[int] | npt.NDArray[np.integer[Any]]],
    *,
    alpha: float = 1e-6,
    power: float = 0.95,
    tests: Sequence[Test] = TESTS,
    gamma: float = 0.25,
    delta: float = 2.0,
    texts_per_prompt: int = 4,
    tokens: int = 200,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 0,
    progress: Callable[[int], None] = lambda count: None,
) -> Plan:
    """How many tokens each test needs until it finds a marked text with the chance asked for.

    Parameters
    ----------
    model, prompts, texts_per_prompt, tokens, temperature, top_k, top_p, min_p, seed, progress
        As in `profiles`.
    alpha
        Level of the test, in (0, 1).
    power
        Chance to find a marked text, 1 - Type II error, in (0, 1).
    tests
        Names out of `power.TESTS`.
    gamma, delta
        Green list: chance of a token to be green, and the bonus on its logit.

    Raises
    ------
    ValueError
        As `profiles` and `power.plan`.
    """
    if not 0.0 < power < 1.0:
        raise ValueError(f"power must be in (0, 1), got {power}.")
    sampled = profiles(
        model,
        prompts,
        texts_per_prompt=texts_per_prompt,
        tokens=tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        green=(gamma, delta) if "green-list" in tests else None,
        seed=seed,
        progress=progress,
    )
    return plan(sampled, alpha, 1.0 - power, tests, gamma=gamma)


def _end_of_sequence(model: Any) -> list[int]:
    """Ids that end a text, as the model's generation settings name them."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if found is None:
        found = model.config.get_text_config().eos_token_id
    if found is None:
        return []
    return [int(one) for one in found] if isinstance(found, (list, tuple)) else [int(found)]
