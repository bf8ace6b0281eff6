"""The project's own warning category and exceptions."""

import sys
import warnings


class EBIPLAWarning(UserWarning):
    """Something about a fit deserves a look: the message says what, and which argument to change."""


class ModelError(ValueError):
    """The model or its arguments cannot be fitted: the message names the site and the remedy."""


class CheckpointError(ValueError):
    """A file of a checkpoint directory cannot be used: the message names it and says what to do."""


def warn(message: str) -> None:
    """Warn with an :class:`EBIPLAWarning` that points at the caller's line outside this package."""
    inside, level, frame = f"{__package__.partition('.')[0]}.", 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(inside):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, EBIPLAWarning, stacklevel=level)


def x64_hint(theirs: object, ours: object) -> str:
    """Say what to do where two types differ in width as ``jax_enable_x64`` makes them, else nothing.

    >>> x64_hint("float64", "float32")
    'it was made with jax_enable_x64=True: call numpyro.enable_x64(True) first'
    >>> x64_hint("float64", "int32")
    ''
    """
    for single, double in (("float32", "float64"), ("complex64", "complex128"), ("int32", "int64")):
        if {str(theirs), str(ours)} == {single, double}:
            was = str(theirs) == double
            return f"it was made with jax_enable_x64={was}: call numpyro.enable_x64({was}) first"
    return ""
