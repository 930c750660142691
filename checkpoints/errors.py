"""The one exception of this package."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written as asked.

    The message names the file, the tensor where there is one, what was expected, what was found and what to
    do about it.
    """
