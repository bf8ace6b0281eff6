"""The project's own warning category and exceptions."""


class EBIPLAWarning(UserWarning):
    """Something about a fit deserves a look: the message says what, and which argument to change."""


class ModelError(ValueError):
    """The model or its arguments cannot be fitted: the message names the site and the remedy."""


class CheckpointError(ValueError):
    """A file of a checkpoint directory cannot be used: the message names it and says what to do."""
