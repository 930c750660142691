"""`OutputRows`: which rows of a step leave the trunk. A static mask, fixed when the step is traced.

Everything behind the trunk that is not needed for every row (the LM head; the final norm when MTP is off) is applied to
the selected rows only, so a prompt chunk without output rows has no head in its program at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float


@dataclass(frozen=True)
class OutputRows:
    """`OutputRows.none()`, `.last()`, `.all()` or `.at(rows)`; hashable, so a static argument of a jitted step.

    `rows` is None for all rows; negative rows count from the end of the chunk.
    """

    rows: tuple[int, ...] | None

    @classmethod
    def none(cls) -> OutputRows:
        return cls(())

    @classmethod
    def last(cls) -> OutputRows:
        return cls((-1,))

    @classmethod
    def all(cls) -> OutputRows:
        return cls(None)

    @classmethod
    def at(cls, *rows: int) -> OutputRows:
        return cls(tuple(rows))

    def count(self, chunk: int) -> int:
        """Rows selected from a chunk of `chunk` rows."""
        return chunk if self.rows is None else len(self.rows)

    def reach(self, chunk: int) -> int:
        """How many of the last rows of a chunk of `chunk` rows hold all output rows."""
        return chunk if self.rows is None else max((chunk - row % chunk for row in self.rows), default=0)

    def take(self, hidden: Float[Array, "B T D"], chunk: int | None = None) -> Float[Array, "B R D"]:
        """Slice the output rows; R is static. An empty array when there are none.

        Args:
            chunk: rows of the chunk, if `hidden` has only the last ones of it (`reach` of them or more).

        Raises:
            IndexError: a row outside the chunk.
        """
        if self.rows is None:
            return hidden
        chunk = hidden.shape[1] if chunk is None else chunk
        missing = chunk - hidden.shape[1]
        for row in self.rows:
            if not -chunk <= row < chunk:
                raise IndexError(f"output row {row} is outside a chunk of {chunk} rows")
        if not self.rows:
            return hidden[:, :0]
        return jnp.concatenate([hidden[:, at : at + 1] for row in self.rows for at in [row % chunk - missing]], axis=1)


NO_ROWS = OutputRows.none()
