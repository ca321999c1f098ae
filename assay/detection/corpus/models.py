"""Models in the workers of a corpus run: opened on a device that works, and told apart from the documents they read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from assay._errors import RunError
from assay.detection.corpus.subject import Device, Test, WorkerBroken
from assay.kernels.scoring.devices import check_usable

if TYPE_CHECKING:
    from assay.detection.corpus.reading import Document


@contextmanager
def usable(device: Device) -> Iterator[None]:
    """Load models and try them inside: a device that cannot be used ends the run with a message for the user.

    Raises
    ------
    MissingDependencyError, ValueError
        Without torch, or if torch cannot use the device.
    RunError
        If the model does not run on it.
    """
    check_usable(device)
    try:
        yield
    except RuntimeError as error:  # what torch raises where memory or the device fails
        raise RunError(f"device: the model cannot be used on {device!r}: {str(error).splitlines()[0]}") from error


def blaming_the_device(test: Test, device: Device) -> Test:
    """The same test, which ends the process after a fault of its GPU that is no document's.

    Memory that did not suffice is the document's fault; after any other the context is lost, and every later document
    would fail in this process as well.
    """

    def guarded(documents: Sequence[Document]) -> Mapping[str, Any]:
        try:
            return test(documents)
        except RuntimeError as error:
            if device == "cpu" or "out of memory" in str(error).lower():
                raise
            raise WorkerBroken from error

    return guarded
