"""`assay plan`: how many tokens until a marked text is found, on your prompts, with your model.

The table or JSON goes to stdout, progress and messages to stderr. Exit codes: 0 planned, 1 refused or failed, 2 usage.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from assay._cli_output import AsJson, refusals, say, wants_json, write_json

if TYPE_CHECKING:
    from assay.watermark.power import Plan

SCHEMA = "assay.plan/1"

NAMES = {
    "ump": "UMP limit; the sequence scheme reaches it",
    "race": "one exponential race over whole texts",
    "gumbel-model-aware": "Gumbel, model-aware test",
    "gumbel-e-value": "Gumbel, model-aware e-value (streaming)",
    "gumbel-sum": "Gumbel, sum test (no model)",
    "green-list": "green list, exact binomial test",
}


def plan(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH",
            help="Files of prompts, or - for stdin: .txt with a prompt per line, .jsonl with one per row.",
        ),
    ],
    *,
    model: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="The model: folder or hub id; default the bundled one.", show_default=False),
    ] = None,
    alpha: Annotated[float, typer.Option(help="Level: a text is found when its p-value is below this.")] = 1e-6,
    power: Annotated[float, typer.Option(help="Chance to find a marked text.")] = 0.95,
    temperature: Annotated[float, typer.Option(help="Temperature of the sampling.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Top-k of the sampling.", show_default=False)] = None,
    top_p: Annotated[float | None, typer.Option(help="Top-p of the sampling.", show_default=False)] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Length of the sampled texts; longer finds weaker tests.")] = 200,
    texts: Annotated[int, typer.Option(min=1, help="Texts sampled for each prompt.")] = 4,
    prompts: Annotated[int, typer.Option(min=1, help="Use the first so many prompts.")] = 16,
    prompt_column: Annotated[str, typer.Option(metavar="NAME", help="JSON field that holds the prompt.")] = "prompt",
    gamma: Annotated[float, typer.Option(help="Green list: share of green tokens.")] = 0.25,
    delta: Annotated[float, typer.Option(help="Green list: bonus on the logits of green tokens.")] = 2.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampled texts.")] = 0,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="Also draw the curves, as SVG.")] = None,
    as_json: AsJson = False,
) -> None:
    """How many tokens each test needs, on your prompts, with your model."""
    if plot is not None and plot.suffix.lower() != ".svg":
        raise typer.BadParameter(f"--plot must name a file that ends in .svg, got {str(plot)!r}.")
    with refusals():
        found = [prompt for path in paths for prompt in read_prompts(path, prompt_column)]
        if not found:
            raise ValueError(f"{', '.join(paths)}: no prompt found. Put one on each line.")
        if len(found) > prompts:
            say(f"{len(found):,} prompts found, the first {prompts:,} are used; --prompts uses more.")
        from assay.detection.planning import plan_tokens
        from assay.models import load_model, load_tokenizer_for_generation

        loaded, tokenizer = load_model(model), load_tokenizer_for_generation(model)
        ids = [tokenizer(prompt)["input_ids"] for prompt in found[:prompts]]
        say(f"sampling {len(ids) * texts:,} texts of {tokens:,} tokens with {model or 'the bundled model'} ...")
        made = plan_tokens(
            loaded,
            ids,
            alpha=alpha,
            power=power,
            gamma=gamma,
            delta=delta,
            texts_per_prompt=texts,
            tokens=tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
        )
        if plot is not None:
            draw(made, plot)
            say(f"curves: {plot}")
    if wants_json(as_json):
        sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "model": model}
        write_json({**as_dict(made), "sampling": sampling})
    else:
        _show(made)


def read_prompts(path: str, column: str = "prompt") -> list[str]:
    """The prompts of one file: the lines of a text, or a field of JSON rows; blank ones are left out.

    Raises
    ------
    ValueError
        If the file is of another kind, or a row is not JSON or lacks the field; the message names the line.
    """
    import orjson

    from assay.detection.text import decode_text

    kind = "" if path == "-" else Path(path).suffix.lower()
    if kind not in ("", ".txt", ".jsonl", ".ndjson"):
        raise ValueError(f"{path}: prompts must be in a .txt, .jsonl or .ndjson file, got {kind!r}.")
    data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    lines = decode_text(data).removeprefix("\ufeff").splitlines()
    if kind in ("", ".txt"):
        return [line for line in lines if line.strip()]
    out = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}).") from None
        value = row.get(column) if isinstance(row, dict) else None
        if not isinstance(value, str):
            raise ValueError(f"{path}, line {number}: no text in field {column!r}. Name it with --prompt-column.")
        if value.strip():
            out.append(value)
    return out


def as_dict(made: Plan) -> dict[str, Any]:
    """The plan, ready for JSON; numbers that do not exist are null."""
    return {
        "schema": SCHEMA,
        "alpha": made.alpha,
        "power": 1.0 - made.beta,
        "texts": made.texts,
        "longest": made.longest,
        "entropy_nats_per_token": made.entropy,
        "lengths": made.lengths.tolist(),
        "tests": [
            {
                "test": one.test,
                "tokens": one.tokens,
                "power": 1.0 - one.type2_error,
                "standard_error": one.standard_error if one.standard_error == one.standard_error else None,
                "curve": (1.0 - one.curve).tolist(),
            }
            for one in made.tests
        ],
    }


def _show(made: Plan) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"Tokens until {1.0 - made.beta:.3g} of marked texts have p < {made.alpha:.3g}", title_justify="left"
    )
    table.add_column("test")
    for name in ("tokens", "times the limit", "power there"):
        table.add_column(name, justify="right")
    limit = next((one.tokens for one in made.tests if one.test == "ump"), None)
    for one in made.tests:
        times = "" if limit is None or one.tokens is None else f"{one.tokens / limit:.1f}"
        error = "" if one.standard_error != one.standard_error else f" ± {one.standard_error:.2g}"
        table.add_row(
            NAMES[one.test],
            f"more than {made.longest}" if one.tokens is None else str(one.tokens),
            times,
            f"{1.0 - one.type2_error:.3f}{error}",
        )
    console = Console()
    console.width = max(console.width, 100)
    console.print(table)
    console.print(
        f"{made.texts} texts, {made.entropy:.2f} nats of entropy per token. Tokens in repeated contexts carry no mark "
        "and come on top.",
        highlight=False,
    )
    if any(one.tokens is None for one in made.tests):
        console.print(f"Sample longer texts (--tokens) to see past {made.longest}.", highlight=False)


def draw(made: Plan, path: Path) -> None:
    """Power against length, one line per test; the same file for the same plan."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.hashsalt": "assay.plan", "svg.fonttype": "path"}):
        figure, axes = pyplot.subplots(figsize=(7.2, 4.2), layout="constrained")
        for one in made.tests:
            (line,) = axes.plot(made.lengths, 1.0 - one.curve, linewidth=1.6, label=NAMES[one.test])
            if one.tokens is not None:
                axes.plot([one.tokens], [1.0 - one.type2_error], marker="o", markersize=5, color=line.get_color())
        axes.axhline(1.0 - made.beta, color="0.5", linewidth=0.8, linestyle="--")
        axes.set_xscale("log")
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel(f"tokens (entropy {made.entropy:.2f} nats each)")
        axes.set_ylabel(f"share of marked texts with p < {made.alpha:.0e}")
        axes.grid(visible=True, linewidth=0.3)
        axes.legend(fontsize="small")
        figure.savefig(path, format="svg", metadata={"Date": None})
        pyplot.close(figure)
