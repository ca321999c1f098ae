"""The `assay` command, also as `python -m assay`; Ctrl-C while it is being loaded ends it as quietly as later."""

from __future__ import annotations


def main() -> None:
    """Load the command and run it."""
    try:
        from assay.cli import main as command
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    command()


if __name__ == "__main__":
    main()
