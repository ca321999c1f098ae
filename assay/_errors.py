"""The errors that Assay raises on bad input: the argument, what is accepted, what came, what to do."""

from __future__ import annotations


class AssayError(Exception):
    """Base of every error that Assay raises on purpose."""


class UnknownKeyError(AssayError, LookupError):
    """A key id that is not in the keyring."""


class RevokedKeyError(AssayError, ValueError):
    """A key that may no longer be used for what was asked."""


class KeyringError(AssayError, ValueError):
    """A keyring file that cannot be opened: wrong passphrase, damaged, or not a keyring."""


class TextError(AssayError, ValueError):
    """A text that is not valid Unicode or not valid UTF-8."""


class GenerationError(AssayError, ValueError):
    """A generation mode in which the watermark would be silently absent or wrong."""


class RunError(AssayError, RuntimeError):
    """A corpus run that cannot start or resume as asked."""


class CalibrationError(AssayError, ValueError):
    """A calibration file that cannot be read, or a scorer that is not the calibrated one."""


class StateError(AssayError, ValueError):
    """A checkpoint of an online object that is damaged, held by another process, or not at the step that was named."""


class MissingDependencyError(AssayError, ImportError):
    """An optional dependency that the call needs and that is not installed."""
