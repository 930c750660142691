"""`Engine`: any number of requests through the slots of one loop. The host sees tokens in chunks, never per step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from mtpjax.engine.model_runner import ModelRunner
from mtpjax.engine.request import Request, Result
from mtpjax.engine.scheduler import Slots, TokenCallback

WINDOW = 64  # batches of requests that are read ahead and sorted by length


class Engine(ModelRunner):
    """Slots that fall free are filled again while the others go on. Requests with one prompt have it read once, if together.

    A job uses one program per prompt-chunk bucket, one that makes an empty cache, and one loop; with more requests than slots, or
    shared prompts, one more that makes a cache and one that puts what was read into the slots.
    """

    def run(self, requests: Sequence[Request], batch: int, on_tokens: TokenCallback | None = None) -> list[Result]:
        """Generate for all requests, `batch` side by side. Results in the order given."""
        results = {r.request.index: r for r in self.stream(requests, batch, on_tokens, window=len(requests))}
        return [results[r.index] for r in requests]

    def stream(
        self,
        requests: Iterable[Request],
        batch: int,
        on_tokens: TokenCallback | None = None,
        *,
        window: int | None = None,
    ) -> Iterator[Result]:
        """Generate for all requests, `batch` side by side, longest prompts first. Results as they are done.

        Args:
            on_tokens: called with a result and its new tokens after each chunk of the loop.
            window: requests that are read ahead and sorted by the length of their prompts.
        """
        source = iter(requests)

        def ahead() -> deque[Request]:
            """Longest prompts first, and equal ones together."""
            some = islice(source, max(window or WINDOW * batch, batch + 1))
            return deque(sorted(some, key=lambda r: (-len(r.prompt), r.prompt)))

        queue = ahead()
        prompts, admit = len({r.prompt for r in queue}), self.admit or max(1, batch // 4)
        one_batch = prompts == len(queue) <= batch or admit >= batch
        width = batch if one_batch else min(prompts, admit)
        slots = Slots(self, batch, width)
        while True:
            # All slots are one batch, or as many are filled together as prompts are read together.
            while (queue := queue or ahead()) and slots.idle >= slots.needed(len(queue)):
                group: list[Request] = []
                different = 0  # equal prompts stand together in the queue
                while queue and len(group) < slots.idle:
                    different += not group or queue[0].prompt != group[-1].prompt
                    if different > width:
                        break
                    group.append(queue.popleft())
                yield from slots.admit(group)
            if slots.idle == batch:
                return
            yield from slots.decode(slots.needed(len(queue)) if queue else batch, on_tokens)
