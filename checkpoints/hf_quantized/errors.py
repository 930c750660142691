"""The problems of a quantised checkpoint, without its file name, which the reader of the folder adds."""


class UnsupportedQuantizationError(ValueError):
    """A setting or tensor of a quantised checkpoint is not supported. The message names it."""


class ScaleShapeError(ValueError):
    """Scales or zero points do not fit their weight of `rows` x `columns`. `expected` describes shapes that fit."""

    def __init__(self, rows: int, columns: int, expected: str) -> None:
        self.problem = f"scales do not fit a weight of {rows} x {columns}"
        self.expected = expected
        super().__init__(f"{self.problem}; expected {expected}")
