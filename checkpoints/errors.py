"""The one exception of this package, and the remedy that most of its messages share."""

REDOWNLOAD = "Download the file again."


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or cannot be written as requested.

    The message names the file, the tensor if the problem is in one, the expected and the found value, and the
    remedy.
    """
