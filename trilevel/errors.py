"""The one error tree of trilevel, and the import of optional parts.

Every message says what was given, what is needed and what to do. The command line turns any `TrilevelError` into one
line on standard error and exit code 2; servers map the classes to HTTP and gRPC codes in one table.
"""

from __future__ import annotations

import importlib
from types import ModuleType


class TrilevelError(Exception):
    """Base of everything trilevel raises on purpose."""


class ConfigError(TrilevelError, ValueError):
    """A configuration value is out of range, unknown or contradicts another."""


class ShapeError(TrilevelError, ValueError):
    """A tensor has the wrong shape, type or device."""


class InputError(TrilevelError, ValueError):
    """A document, data set or file cannot be used."""


class CheckpointError(TrilevelError, ValueError):
    """A checkpoint is missing, damaged or belongs to another model."""


class ArtifactError(TrilevelError, ValueError):
    """An artifact is missing, damaged, of an unknown format, or gives other answers than it was made to give."""


class CertificateError(TrilevelError, ValueError):
    """A bound on the loss cannot be proved, or a certificate is damaged or of something else."""


class QualityError(TrilevelError):
    """A result is below the quality that was asked for, and is not written."""


class ImplementationError(TrilevelError, RuntimeError):
    """An implementation or runtime was asked for by name and cannot do what was asked."""


class MissingExtraError(TrilevelError, ImportError):
    """An optional dependency is not installed."""


def require(module: str, *, extra: str) -> ModuleType:
    """Import `module`, which the extra `extra` brings, or say how to install it.

    Raises:
        MissingExtraError: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        # a package that is there but broken must not be reported as absent
        absent = isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == package
        state = "is not installed" if absent else f"cannot be imported ({error})"
        raise MissingExtraError(
            f"{package!r} {state}; it is needed here and comes with the extra {extra!r}: "
            f"pip install 'trilevel[{extra}]'."
        ) from error
