"""`SharedPrefixes`: reads the prompts of a run, common beginnings of those that wait once."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import jax
from jax import Array

from mtpjax.engine.prefix_cache import PrefixCache
from mtpjax.engine.prefix_tree import PrefixTree
from mtpjax.engine.prompt_chunks import PastTokens
from mtpjax.engine.request import Request
from mtpjax.engine.scheduler import PrefillGroup, Scheduler
from mtpjax.model.cache import Cache


class SharedPrefixes:
    """The tree of the waiting requests of one run, and the entries that they share.

    Args:
        cache: entries of this run and of others.
        scheduler: of the run; its waiting requests count.
    """

    def __init__(self, cache: PrefixCache, scheduler: Scheduler):
        self.cache, self.scheduler, self.tree = cache, scheduler, PrefixTree()

    def prefill(
        self, prompts: Sequence[Sequence[int]], group: PrefillGroup, cache: Cache, mtp_prompt_tokens: int | None
    ) -> tuple[Cache, Array, int]:
        """Read the rows of a group of prompts.

        Args:
            prompts: the rows of each sequence of the batch, first those of the group; the others are empty.
            group: the requests; they get their `num_cached_tokens`.
            cache: of the batch, empty; consumed.
            mtp_prompt_tokens: as in `ModelRunner.prefill`.

        Returns:
            the cache, the hidden states of the last rows, and the number of prompt tokens read; the last token of a
            prompt, which the decode loop reads, counts.
        """
        runner, requests = self.cache.runner, [state.request for state in group.states]
        known = {r.index: r for r in (*requests, *self.scheduler.waiting)}
        self.tree.retain(known)  # requests that were cancelled while they waited share nothing
        new = [r for index, r in known.items() if index not in self.tree]
        self.tree.add((r.index, r.prompt_token_ids[:-1]) for r in new)
        if len(new) > len(requests):
            self._keep_branches_together(requests)
        read_before = self.cache.num_tokens_read
        past, rest = [PastTokens()] * len(prompts), list(prompts)
        whole: list[tuple[int, Array]] = []
        for i in range(len(group.prompts)):
            index = next(r.index for r, row in zip(requests, group.prompt_rows, strict=True) if row == i)
            entry = self.cache.read(prompts[i], self.tree.branches(index), self.tree.count)
            if entry is not None:
                cache = runner.put_sequence(cache, entry.sequence, i)
                past[i], rest[i] = entry.past, prompts[i][entry.past.length :]
                if not rest[i]:
                    whole.append((i, entry.hidden))
        self.tree.remove(r.index for r in requests)
        for state, row in zip(group.states, group.prompt_rows, strict=True):
            state.num_cached_tokens = past[row].length
        cache, hidden, _ = runner.prefill(rest, cache=cache, mtp_prompt_tokens=mtp_prompt_tokens, past=past)
        for i, last_hidden in whole:
            hidden = runner.put_hidden(hidden, last_hidden, i)
        num_read = sum(map(len, rest)) + len(group.prompts) + self.cache.num_tokens_read - read_before
        return jax.block_until_ready(cache), hidden, num_read

    def _keep_branches_together(self, starting: Sequence[Request]) -> None:
        """Let the waiting requests of a branch start one after the other, if not all branches fit into the cache.

        Branches of the requests that start now come first; each other one where its longest prompt would.
        """
        waiting = self.scheduler.waiting
        paths = {r.index: self.tree.branches(r.index) for r in waiting}
        lengths = {b.key: b.length for path in paths.values() for b in path}
        if sum(map(self.cache.bytes_of, lengths.values())) <= self.cache.max_bytes:
            return
        first = {branch.key: -1 for r in starting for branch in self.tree.branches(r.index)}
        for place, request in enumerate(waiting):
            for branch in paths[request.index]:
                first.setdefault(branch.key, place)
        places = {r.index: [*(first[b.key] for b in paths[r.index]), place] for place, r in enumerate(waiting)}
        self.scheduler.waiting = deque(sorted(waiting, key=lambda r: places[r.index]))
