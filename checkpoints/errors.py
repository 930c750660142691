"""The one exception and the one warning of this package, and the remedy that most of their messages share."""

REDOWNLOAD = "Download the file again."


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or cannot be written as requested.

    The message names the file, the tensor if the problem is in one, the expected and the found value, and the
    remedy.
    """


class CheckpointWarning(UserWarning):
    """A checkpoint is loaded, but something in it has no effect or replaces what its settings say.

    The message names the file and the key or tensor, and says what is done instead.
    """
