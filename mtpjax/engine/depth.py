"""How many tokens are drafted in the next call of the decode loop: the depth, chosen on the host.

The text does not depend on the depth, so a choice can only cost time. A program is compiled for each of a few depths.
`DepthController` expects of a depth d, from n running requests with limits of their own,

    tokens per second = sum over requests of (1 + s_1 + ... + s_min(d, limit)) / seconds of a round at depth d

where s_j is the probability that drafts 1...j are all accepted, and takes the best. The seconds are measured. The
acceptance of a request comes from its own rounds so far, with those of all requests as a prior.

What is not chosen is not measured, so now and then a call explores a neighbouring depth. A call that explores is
charged what it took more than the chosen depth would have, and all of them together get no more than `EXPLORED` of the
time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

DEPTHS = (0, 1, 3, 6)  # among which "auto" chooses, up to its maximum
# Steps of the calls that measure each depth at the start. Of equal calls the fastest counts: a program's first call may
# take many times as long as later ones.
MEASURE_STEPS = (2, 2, 8, 8)
EXPLORE_STEPS = 8  # of a call that explores
EXPLORED = 0.015  # share of the time that exploring may cost
MAX_SAVED = 2.0  # calls that may explore in a row, after a long time without
FORGET = 0.98  # weight of a round of a request after another one
FORGET_ALL = 0.97  # the same for a round of any request in the prior
PRIOR_ROUNDS = 4.0  # rounds that the prior of a request weighs
FIRST_ACCEPTANCE, FIRST_ROUNDS = 0.75, 4.0  # prior of the first request, and the rounds that it weighs
COST_RATE = 0.3  # weight of a new measurement of the seconds of a round, from a call that is not short
COMMON = 0.5  # share of a change that other depths are expected to see as well, as when the machine gets slower
LARGEST_CHANGE = 1.5  # of the seconds of a round by one measurement; outliers count no more


def auto_depths(max_depth: int) -> tuple[int, ...]:
    """Return the depths that are compiled for a maximum, ascending; 0 and the maximum are among them."""
    return tuple(sorted({d for d in DEPTHS if d < max_depth} | {0, max_depth}))


def depth_for(limits: np.ndarray, depths: tuple[int, ...]) -> int:
    """Return the least of `depths`, ascending, that is not below any of the requests' limits."""
    needed = int(limits.max(initial=0))
    return next((d for d in depths if d >= needed), depths[-1])


class RoundCosts:
    """Seconds of a round by depth, for one number of slots.

    Attributes:
        seconds: of a round at each depth; NaN where nothing has been measured.
        call_seconds: what a call takes beside its rounds.
        to_measure: pairs of a depth's index and a number of steps that are still to be measured at the start.
    """

    def __init__(self, num_depths: int):
        self.seconds, self.call_seconds = np.full(num_depths, np.nan), 0.0
        self.to_measure = [(i, steps) for steps in MEASURE_STEPS for i in range(num_depths)]
        self._fastest: list[dict[int, float]] = [{} for _ in range(num_depths)]  # seconds of a call, by its steps

    def measured(self, index: int, num_steps: int, seconds: float) -> None:
        """Take one of the measurements of the start into account; of equal calls the fastest counts."""
        fastest = self._fastest[index]
        fastest[num_steps] = min(seconds, fastest.get(num_steps, seconds))
        if any(i == index for i, _ in self.to_measure):
            return
        beside = []
        for by_steps in filter(None, self._fastest):
            few, many = min(by_steps), max(by_steps)
            if few < many:
                rest = by_steps[few] - few * (by_steps[many] - by_steps[few]) / (many - few)
                beside.append(float(np.clip(rest, 0, 0.5 * by_steps[few])))
        self.call_seconds = float(np.median(beside)) if beside else 0.0
        many = max(fastest)
        self.seconds[index] = max(fastest[many] - self.call_seconds, 0.5 * fastest[many]) / many

    def refine(self, index: int, num_steps: int, seconds: float) -> None:
        """Take an ordinary call into account."""
        a_round = max(seconds - self.call_seconds, 1e-9) / num_steps
        rate = COST_RATE * min(1.0, num_steps / EXPLORE_STEPS)
        change = np.clip(a_round / self.seconds[index], 1 / LARGEST_CHANGE, LARGEST_CHANGE) ** rate
        own = self.seconds[index] * change
        self.seconds *= change**COMMON
        self.seconds[index] = own


class DepthController:
    """What one engine has learned about depths; it outlives the batches.

    Args:
        depths: that programs are compiled for, ascending; the first is 0.

    Attributes:
        seconds: of all calls so far, without those that measured at the start.
        explored_seconds: what exploring has cost so far.
        saved_seconds: what it may cost now.
    """

    def __init__(self, depths: tuple[int, ...]):
        self.depths = depths
        self.seconds = self.explored_seconds = self.saved_seconds = 0.0
        self.explore_deeper = True  # next time; else a shallower depth
        self._costs: dict[int, RoundCosts] = {}
        self._accepted, self._tried = np.zeros(depths[-1]), np.zeros(depths[-1])

    def costs(self, num_slots: int) -> RoundCosts:
        """Return the seconds of a round in a batch of `num_slots` slots."""
        return self._costs.setdefault(num_slots, RoundCosts(len(self.depths)))

    def for_batch(self, num_slots: int) -> BatchDepths:
        """Make what chooses for one batch."""
        return BatchDepths(self, num_slots)

    def prior(self) -> np.ndarray:
        """Return the probability that a draft is accepted if all before it are, by position, over all requests.

        A position of which little is known is taken to be like the one before it.
        """
        p, before = np.empty(len(self._tried)), FIRST_ACCEPTANCE
        for j, (accepted, tried) in enumerate(zip(self._accepted, self._tried, strict=True)):
            p[j] = before = (accepted + FIRST_ROUNDS * before) / (tried + FIRST_ROUNDS)
        return p

    def learn(self, tried: np.ndarray, accepted: np.ndarray) -> None:
        """Add drafts of any requests, by position."""
        forget = FORGET_ALL ** tried[0]
        self._tried, self._accepted = self._tried * forget + tried, self._accepted * forget + accepted


@dataclass(frozen=True)
class Choice:
    """What the next call does.

    Attributes:
        depth: tokens that are drafted in a step.
        step_limit: steps at most; None: as many as usual.
    """

    depth: int
    step_limit: int | None


class BatchDepths:
    """Chooses the depth of each call for one batch, and learns from what came of it."""

    def __init__(self, controller: DepthController, num_slots: int):
        self.controller, self.costs = controller, controller.costs(num_slots)
        self._accepted = np.zeros((num_slots, controller.depths[-1]))
        self._tried = np.zeros_like(self._accepted)
        self._purpose = ""  # of the call that was chosen last: "measure", "explore" or ""
        self._speed = 0.0  # expected tokens per second of the best depth

    def start(self, slots: list[int]) -> None:
        """Forget what is known of the requests that had these slots."""
        self._accepted[slots] = self._tried[slots] = 0

    def survival(self) -> np.ndarray:
        """Return for each slot the probability that drafts 1...j are all accepted, `[B, max_depth]`."""
        prior = self.controller.prior()
        p = (self._accepted + PRIOR_ROUNDS * prior) / (self._tried + PRIOR_ROUNDS)
        return np.cumprod(p, axis=1)

    def tokens_per_round(self, running: np.ndarray, limits: np.ndarray) -> np.ndarray:
        """Return how many tokens a round gives at each depth, all running requests together."""
        survival = self.survival() * (np.arange(self._tried.shape[1]) < limits[:, None])
        return np.array([(1 + survival[:, :d].sum(1))[running].sum() for d in self.controller.depths])

    def choose(self, running: np.ndarray, limits: np.ndarray, step_limit: int | None = None) -> Choice:
        """Choose the depth of the next call.

        Args:
            running: slots whose requests run, bool `[B]`.
            limits: drafts that each request allows, `[B]`.
            step_limit: steps of the call at most; None: as many as usual.
        """
        depths = self.controller.depths
        largest = depths.index(depth_for(limits[running], depths))
        self._purpose = ""
        if (todo := next((m for m in self.costs.to_measure if m[0] <= largest), None)) is not None:
            self._purpose, (index, steps) = "measure", todo
            return Choice(depths[index], steps if step_limit is None else min(steps, step_limit))
        tokens = self.tokens_per_round(running, limits)
        speeds = (tokens / self.costs.seconds)[: largest + 1]
        best = int(speeds.argmax())
        self._speed = float(speeds[best])
        most = np.array([(1 + np.minimum(limits, d))[running].sum() for d in depths])  # tokens of a round
        other = self._neighbour(best, largest, tokens, most)
        if other is not None and self.controller.saved_seconds >= self._price(best, other, tokens):
            self._purpose = "explore"
            self.controller.explore_deeper = other < best
            return Choice(depths[other], EXPLORE_STEPS if step_limit is None else min(EXPLORE_STEPS, step_limit))
        return Choice(depths[best], step_limit)

    def _neighbour(self, best: int, largest: int, tokens: np.ndarray, most: np.ndarray) -> int | None:
        """Return the index of the depth that is explored next, or None.

        A deeper one that would be too slow even if all of its further drafts were accepted is not worth a look.
        """
        deeper = best + 1
        can_win = deeper <= largest and (
            (tokens[best] + most[deeper] - most[best]) / self.costs.seconds[deeper] > self._speed
        )
        if can_win and (self.controller.explore_deeper or best == 0):
            return deeper
        return best - 1 if best else None

    def _price(self, best: int, other: int, tokens: np.ndarray) -> float:
        """Return the seconds that a call may lose which explores the depth `other`.

        A deeper round gives at least the tokens of the best one, a shallower one about what is expected.
        """
        least = tokens[best] if other > best else tokens[other]
        lost = self.costs.seconds[other] - least / self._speed
        return float(EXPLORE_STEPS * lost + self.costs.call_seconds)

    def observe(
        self, depth: int, num_steps: np.ndarray, accepted: np.ndarray, limits: np.ndarray, seconds: float
    ) -> None:
        """Learn from a call of the loop.

        Args:
            depth: that it had.
            num_steps: steps of each request in it, `[B]`.
            accepted: steps in it that accepted the draft at each position, `[B, max_depth]`.
            limits: drafts that each request allows, `[B]`.
            seconds: that it took.
        """
        loop_steps = int(num_steps.max(initial=0))
        if not loop_steps:
            return
        positions = np.arange(self._tried.shape[1])
        reached = np.concatenate([num_steps[:, None], accepted[:, :-1]], axis=1)
        tried = np.where(positions < np.minimum(limits, depth)[:, None], reached, 0)
        forget = FORGET ** tried[:, :1]
        self._tried, self._accepted = self._tried * forget + tried, self._accepted * forget + accepted
        self.controller.learn(tried.sum(0), accepted.sum(0))
        index, controller = self.controller.depths.index(depth), self.controller
        if self._purpose == "measure":
            self.costs.to_measure.remove(next(m for m in self.costs.to_measure if m[0] == index))
            self.costs.measured(index, loop_steps, seconds)
            return
        self.costs.refine(index, loop_steps, seconds)
        controller.seconds += seconds
        controller.saved_seconds += EXPLORED * seconds
        if self._purpose == "explore":
            tokens = num_steps.sum() + accepted.sum()
            price = max(seconds - float(tokens) / self._speed, 0.0)
            controller.explored_seconds += price
            controller.saved_seconds -= price
        most = MAX_SAVED * EXPLORE_STEPS * float(np.nanmax(self.costs.seconds))
        controller.saved_seconds = min(controller.saved_seconds, most)
