"""The project's own warning category and exception."""


class EBIPLAWarning(UserWarning):
    """Something about a fit deserves a look: the message says what, and which argument to change."""


class ModelError(ValueError):
    """The model or its arguments cannot be fitted: the message names the site and the remedy."""
