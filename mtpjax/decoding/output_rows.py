"""`OutputRows`: which rows of a step leave the trunk. A static mask, fixed when the step is traced.

Everything behind the trunk that is not needed for every row (the LM head; the final norm when MTP is off) is applied
to the selected rows only. A prompt chunk without output rows therefore has no LM head in its program at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float


@dataclass(frozen=True)
class OutputRows:
    """A selection of rows of a chunk. It is hashable and can be a static argument of a jitted step.

    The engine reads prompts with `none()`, and verifies and scores with `all()`. `last()` and `at(...)` serve
    measurements, which compare prompt chunks with different output rows.

    Attributes:
        rows: the selected rows; None: all. Negative rows count from the end of the chunk.
    """

    rows: tuple[int, ...] | None

    @classmethod
    def none(cls) -> OutputRows:
        """Select no row."""
        return cls(())

    @classmethod
    def last(cls) -> OutputRows:
        """Select the last row."""
        return cls((-1,))

    @classmethod
    def all(cls) -> OutputRows:
        """Select all rows."""
        return cls(None)

    @classmethod
    def at(cls, *rows: int) -> OutputRows:
        """Select these rows, in this order."""
        return cls(tuple(rows))

    def count(self, chunk_rows: int) -> int:
        """Return how many rows of a chunk of `chunk_rows` rows are selected."""
        return chunk_rows if self.rows is None else len(self.rows)

    def num_trailing_rows(self, chunk_rows: int) -> int:
        """Return the number n for which the last n of `chunk_rows` rows of a chunk hold all output rows."""
        if self.rows is None:
            return chunk_rows
        return max((chunk_rows - row % chunk_rows for row in self.rows), default=0)

    def take(self, hidden: Float[Array, "B T D"], chunk_rows: int | None = None) -> Float[Array, "B R D"]:
        """Slice the output rows. Their number R is static; without output rows the result is empty.

        Args:
            hidden: all rows of the chunk, or its last ones, `num_trailing_rows` of them or more.
            chunk_rows: rows of the chunk; None: `hidden` has them all.

        Raises:
            IndexError: a row is outside the chunk.
        """
        if self.rows is None:
            return hidden
        chunk_rows = hidden.shape[1] if chunk_rows is None else chunk_rows
        for row in self.rows:
            if not -chunk_rows <= row < chunk_rows:
                raise IndexError(f"output row {row} is outside a chunk of {chunk_rows} rows")
        if not self.rows:
            return hidden[:, :0]
        missing = chunk_rows - hidden.shape[1]
        indices = [row % chunk_rows - missing for row in self.rows]
        return jnp.concatenate([hidden[:, i : i + 1] for i in indices], axis=1)


NO_ROWS = OutputRows.none()
