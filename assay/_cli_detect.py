"""`assay detect`: test one text, or a corpus into a folder of results.

Results go to stdout, as JSON when it is not a terminal or with --json; progress and messages go to stderr.
Exit codes: 0 every document tested, 1 refused or failed, 2 usage, 3 finished with rejects, 130 interrupted; after 1 and
130 the same command resumes a corpus run.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from assay._cli_keyring import DEFAULT_KEYRING, KeyringPath, PassphraseFile, open_keyring
from assay._cli_output import AsJson, refusals, say, wants_json, write_json

if TYPE_CHECKING:
    from assay.detection.corpus import RunSummary
    from assay.detection.result import TestResult
    from assay.watermark.keyring import Keyring
    from assay.watermark.keys import SecretKey


def detect(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH",
            help="Without --out: one text file, or - for stdin. With it: files, folders, patterns "
            "(.txt, .jsonl, .ndjson, each also .gz or .zst, and .parquet), URIs such as s3://bucket/folder.",
        ),
    ],
    *,
    key: Annotated[
        list[str] | None,
        typer.Option("--key", metavar="ID", help='Id of the key; repeat it, or "all" for every usable key.'),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FOLDER", help="Test a corpus and put the results here.")
    ] = None,
    keyring: KeyringPath = DEFAULT_KEYRING,
    passphrase_file: PassphraseFile = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="The generator's tokenizer: folder, tokenizer.json or hub id; default that of --model, else the "
            "bundled model's.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help='The model that may have written the texts, for more power; folder, hub id or "default".',
        ),
    ] = None,
    prompt: Annotated[
        Path | None, typer.Option("--prompt-file", metavar="PATH", help="One text only: its prompt, if known.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="With --model: the temperature it was sampled at.")] = 1.0,
    text_column: Annotated[
        str, typer.Option(metavar="NAME", help="JSON field or Parquet column that holds the text.")
    ] = "text",
    id_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="Field of the document's id; default file and row.")
    ] = None,
    source_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="Field that reports group by; default the file.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; default all cores.", show_default=False)
    ] = None,
    engine: Annotated[
        Literal["local", "ray"],
        typer.Option(help="With --out: processes here, or a Ray cluster whose machines share it."),
    ] = "local",
    address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="With --engine ray: the cluster; default RAY_ADDRESS, else one on this machine for the run.",
        ),
    ] = None,
    copy_to: Annotated[
        str | None,
        typer.Option("--copy-to", metavar="URI", help="With --out: copy the results to an object store at the end."),
    ] = None,
    fdr: Annotated[float, typer.Option(help="False discovery rate of the flags.")] = 0.01,
    null: Annotated[
        str,
        typer.Option(help='"no-key": is a mark there? "human": could a human have written it? Needs --calibration.'),
    ] = "no-key",
    calibration: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --null human: what `assay calibrate` wrote.")
    ] = None,
    other_model: Annotated[
        str | None, typer.Option(metavar="PATH", help="With --null human: the second model of the calibration.")
    ] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        typer.Option(help="With --out: where a model runs; auto takes GPUs where there are some."),
    ] = "auto",
    shard_rows: Annotated[int, typer.Option(min=1, help="Documents in a shard, the unit of resuming.")] = 2000,
    as_json: AsJson = False,
) -> None:
    """Test texts for the mark of a key, or against "a human wrote it"."""
    if null not in ("no-key", "human"):
        raise typer.BadParameter(f'--null must be "no-key" or "human", got {null!r}.')
    if (null == "human") != (calibration is not None):
        raise typer.BadParameter("--null human and --calibration FILE go together.")
    if calibration is not None:
        _check_human(key, tokenizer, prompt, temperature)
    elif not key:
        raise typer.BadParameter('give --key ID, or "all"; or --null human with a calibration.')
    elif out is None and len(paths) != 1:
        raise typer.BadParameter("give --out FOLDER to test several files, or one text file to print its result.")
    elif out is not None and prompt is not None:
        raise typer.BadParameter("--prompt-file is for one text.")
    if calibration is None and model is None and temperature != 1.0:
        raise typer.BadParameter("--temperature is for --model, whose probabilities it belongs to.")
    if out is not None and "-" in paths:
        raise typer.BadParameter("- is one text; a corpus (--out) is read from files. A file named - is ./-")
    if address is not None and engine != "ray":
        raise typer.BadParameter("--address is for --engine ray.")
    if out is None and (engine != "local" or copy_to is not None):
        raise typer.BadParameter("--engine and --copy-to are for a corpus: give --out FOLDER.")
    if device != "auto" and (out is None or (calibration is None and model is None)):
        raise typer.BadParameter("--device is for --model or --null human with --out FOLDER.")
    options: dict[str, Any] = {
        "text_column": text_column,
        "id_column": id_column,
        "source_column": source_column,
        "device": device,
        "workers": workers,
        "engine": engine,
        "ray_address": address,
        "copy_to": copy_to,
        "fdr": fdr,
        "shard_rows": shard_rows,
    }
    with refusals():
        if calibration is not None and out is None:
            from assay._cli_human import detect_human

            code = detect_human(
                paths,
                calibration,
                model=model,
                other_model=other_model,
                text_column=text_column,
                id_column=id_column,
                group_column=source_column,
                fdr=fdr,
                as_json=as_json,
            )
            raise typer.Exit(code)
        keys = [] if key is None else _keys(open_keyring(keyring, passphrase_file), key)
        if out is None:
            result = _detect_one(paths[0], keys, tokenizer, model=model, prompt=prompt, temperature=temperature)
            _show_result(result, as_json=as_json)
            return
        try:
            if calibration is None:
                from assay.detection.corpus import run

                summary = run(
                    paths, keys, out=out, tokenizer=tokenizer, model=model, temperature=temperature, **options
                )
            else:
                from assay.conformal.human_corpus import run_human

                summary = run_human(paths, calibration, out=out, model=model, other_model=other_model, **options)
        except KeyboardInterrupt:
            say(f"interrupted; the same command resumes the run in {out}")
            raise typer.Exit(130) from None
    _show_summary(summary, as_json=as_json)
    raise typer.Exit(summary.exit_code)


def _check_human(key: list[str] | None, tokenizer: str | None, prompt: Path | None, temperature: float) -> None:
    """Refuse what cannot go with --null human."""
    if key:
        raise typer.BadParameter("--key is for marks; --null human needs none.")
    foreign = {
        "--tokenizer": tokenizer is not None,
        "--prompt-file": prompt is not None,
        "--temperature": temperature != 1.0,
    }
    if any(foreign.values()):
        given = ", ".join(name for name, there in foreign.items() if there)
        raise typer.BadParameter(f"{given} cannot go with --null human, which reads texts as they were calibrated.")


def _keys(keyring: Keyring, ids: list[str]) -> list[SecretKey]:
    if "all" in ids:
        if len(ids) > 1:
            raise typer.BadParameter('--key must be ids or "all" alone.')
        return list(keyring.for_detection())
    keys = [keyring[id] for id in dict.fromkeys(ids)]
    for one in keys:
        if one.state == "revoked":
            say(f"warning: key {one.id!r} is revoked; whoever learned it could have made its mark.")
    return keys


def _detect_one(
    path: str,
    keys: list[SecretKey],
    tokenizer: str | None,
    *,
    model: str | None,
    prompt: Path | None,
    temperature: float,
) -> TestResult:
    from assay.detection import detect as detect_text
    from assay.detection.corpus.reading import read_packed
    from assay.detection.corpus.sources import format_of
    from assay.detection.text import decode_text

    if path == "-":
        data = sys.stdin.buffer.read()
    else:
        file = Path(path)
        if file.is_dir() or format_of(file) not in (None, "text"):
            raise typer.BadParameter(f"{path} is a corpus: give --out FOLDER for its results.")
        data = read_packed(file)
    # A byte order mark says how the file is encoded and is no part of the text.
    return detect_text(
        decode_text(data).removeprefix("\ufeff"),
        keys,
        tokenizer=tokenizer,
        model=model,
        prompt=None if prompt is None else decode_text(prompt.read_bytes()).removeprefix("\ufeff"),
        temperature=temperature,
    )


def _show_result(result: TestResult, *, as_json: bool) -> None:
    if wants_json(as_json):
        # Beside what is kept exactly: the number and the sentence to quote.
        write_json(result.to_dict() | {"pvalue": result.pvalue, "sentence": result.sentence()})
        return
    typer.echo(result.sentence())
    typer.echo(repr(result))


def _show_summary(summary: RunSummary, *, as_json: bool) -> None:
    if summary.already_finished:
        say(f"this run, begun {summary.started}, was finished already; nothing was tested again")
    if summary.files_skipped:
        say(f"{summary.files_skipped:,} files were left out: their names end in no format that is read")
    if wants_json(as_json):
        write_json(summary.to_dict())
        return
    typer.echo(
        f"{summary.documents:,} documents read, {summary.flagged:,} flagged at a false discovery rate of "
        f"{summary.fdr:.3g}."
    )
    if summary.rejects:
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in summary.rejects_by_reason.items())
        typer.echo(f"{summary.rejects:,} rejected ({reasons}), listed in {summary.out / 'rejects.jsonl'}.")
    typer.echo(
        f"{summary.n_tokens:,} tokens, {summary.n_scored:,} of them counted; {summary.seconds:.1f} s, "
        f"{summary.documents_per_second:,.0f} documents/s, {summary.tokens_per_second:,.0f} tokens/s."
    )
    typer.echo(f"Results: {summary.out / 'results.parquet'}")
