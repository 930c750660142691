"""The controller of depths, with simulated costs and acceptances: it finds the best depth, and exploring is bounded."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mtpjax.engine.depth import EXPLORED, MEASURE_STEPS, Choice, DepthController, RoundCosts

CHEAP = {0: 1e-3, 1: 1.3e-3, 3: 1.8e-3, 6: 2.6e-3}  # seconds of a round, as of a model whose weights take the time
DEAR = {0: 1e-3, 1: 1.9e-3, 3: 3.7e-3, 6: 6.5e-3}  # as of a processor that rows take the time of
CALL = 0.2e-3  # seconds of a call beside its rounds
MANY = 12_000  # tokens


class World:
    """Slots whose drafts are accepted with a probability, and a clock."""

    def __init__(self, costs: dict[int, float], acceptance: float, slots: int = 1, seed: int = 0):
        self.costs, self.acceptance, self.slots = costs, acceptance, slots
        self.rng = np.random.default_rng(seed)
        self.controller = DepthController(tuple(costs))
        self.used = dict.fromkeys(costs, 0)

    def best_speed(self) -> float:
        return max(self.run(fixed=depth) for depth in self.costs)

    def run(self, num_tokens: int = MANY, fixed: int | None = None) -> float:
        """Generate texts of 200 tokens, with a fixed depth or those that are chosen. Returns the tokens per second."""
        self.used = dict.fromkeys(self.costs, 0)
        total, seconds = 0, 0.0
        while total < num_tokens:
            batch, left, limit = self.controller.for_batch(self.slots), np.full(self.slots, 200), 4
            limits = np.full(self.slots, max(self.costs))
            while (left > 0).any():
                choice = batch.choose(left > 0, limits, limit) if fixed is None else Choice(fixed, limit)
                steps, accepted = np.zeros(self.slots, int), np.zeros((self.slots, max(self.costs)), int)
                for _ in range(choice.step_limit or 32):
                    running = left > 0
                    if not running.any():
                        break
                    right = self.rng.random((self.slots, choice.depth)) < self.acceptance
                    was_accepted = np.cumprod(right, axis=1) * running[:, None]
                    steps += running
                    accepted[:, : choice.depth] += was_accepted
                    new = np.minimum(was_accepted.sum(1) + running, np.maximum(left, 0))
                    left, total = left - new, total + int(new.sum())
                took = steps.max() * self.costs[choice.depth] * np.exp(0.05 * self.rng.normal()) + CALL
                if fixed is None:
                    batch.observe(choice.depth, steps, accepted, limits, took)
                seconds, limit = seconds + took, 32
                self.used[choice.depth] += int(steps.max())
        return total / seconds


@pytest.mark.fast
@pytest.mark.parametrize("costs", [CHEAP, DEAR])
@pytest.mark.parametrize("acceptance", [0.0, 0.5, 0.8, 0.95])
def test_the_controller_finds_the_best_depth(costs: dict[int, float], acceptance: float) -> None:
    """A batch of one, so that no slot waits for another. The first run measures."""
    world = World(costs, acceptance)
    world.run(2000)
    speed = world.run()
    assert speed > 0.95 * world.best_speed()
    controller = world.controller
    assert controller.explored_seconds < 1.2 * EXPLORED * controller.seconds


@pytest.mark.fast
def test_depth_falls_to_zero_if_drafts_never_pay_and_exploring_is_bounded() -> None:
    world = World(DEAR, 0.1)
    world.run(2000)
    world.run()
    assert sum(world.used.values()) > 5000 and world.used[0] > 0.95 * sum(world.used.values()) and not world.used[6]


@pytest.mark.slow
@pytest.mark.fast
def test_the_controller_follows_a_workload_that_changes() -> None:
    world = World(CHEAP, 0.95)
    for acceptance in (0.95, 0.0, 0.95, 0.6, 0.0):
        world.acceptance = acceptance
        assert world.run(6000) > 0.9 * world.best_speed()
    world.costs = {0: 1e-3, 1: 1.05e-3, 3: 1.1e-3, 6: 1.2e-3}  # drafts have become cheap
    world.acceptance = 0.9
    world.run(6000)
    assert world.run(6000) > 0.93 * world.best_speed()


@pytest.mark.fast
def test_the_number_of_running_requests_counts() -> None:
    """Requests whose drafts are accepted weigh against those whose drafts are not."""
    controller = DepthController((0, 3))
    batch = controller.for_batch(4)
    limits, running = np.full(4, 3), np.ones(4, bool)
    costs = controller.costs(4)
    while costs.to_measure:
        choice = batch.choose(running, limits)
        none = np.zeros((4, 3), int)
        batch.observe(choice.depth, np.full(4, choice.step_limit), none, limits, {0: 1.0, 3: 2.0}[choice.depth] * 8)
    costs.seconds[:] = 1.0, 2.0
    steps = np.full(4, 200)
    accepted = np.array([[0] * 3, [0] * 3, [0] * 3, [200] * 3])
    for _ in range(3):
        batch._purpose = ""
        batch.observe(3, steps, accepted, limits, 400.0)
    costs.seconds[:] = 1.0, 2.0
    controller.saved_seconds = 0.0
    assert batch.choose(running, limits).depth == 0  # 7 tokens for 2 against 4 for 1
    assert batch.choose(np.array([False, False, False, True]), limits).depth == 3
    assert batch.choose(np.array([False, True, False, True]), limits).depth == 3  # 5 for 2 against 2 for 1
    limits[3] = 1
    assert batch.choose(np.array([False, False, False, True]), limits).depth in (0, 3)
    limits[3] = 0
    assert batch.choose(np.array([False, False, False, True]), limits).depth == 0


@pytest.mark.fast
def test_the_first_call_of_a_program_may_take_long() -> None:
    """The memory of a new program is touched for the first time; what calls take beside their rounds is not that."""
    costs = RoundCosts(2)
    for number, (index, steps) in enumerate(list(costs.to_measure)):
        costs.to_measure.pop(0)
        costs.measured(index, steps, (1.0, 3.0)[index] * steps + 0.5 + (60.0 if number < 2 else 0.0))
    assert costs.call_seconds == pytest.approx(0.5) and costs.seconds == pytest.approx([1, 3])


@pytest.mark.fast
def test_the_start_measures_every_depth_and_the_calls_beside() -> None:
    costs = RoundCosts(2)
    for index, steps in list(costs.to_measure):
        costs.to_measure.pop(0)
        costs.measured(index, steps, (1.0, 3.0)[index] * steps + 0.5)
    assert costs.call_seconds == pytest.approx(0.5) and costs.seconds == pytest.approx([1, 3])
    assert len(MEASURE_STEPS) == 4
    costs.refine(0, 32, 32 * 2.0 + 0.5)  # slower: the others are believed to be slower as well, but less
    assert 1 < costs.seconds[0] < 1.2 and 3 < costs.seconds[1] < 3 * costs.seconds[0]
    costs.refine(0, 32, 1e6)
    assert costs.seconds[0] < 1.4


@pytest.mark.fast
@pytest.mark.parametrize(
    "bug",
    [
        ("prior", lambda self: np.full(6, 0.99)),
        ("learn", lambda *_: None),
    ],
)
def test_the_simulation_sees_a_controller_that_does_not_learn(
    bug: tuple[str, Callable[..., Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each new request then starts with drafts that never pay."""
    monkeypatch.setattr(DepthController, *bug)
    world = World(CHEAP, 0.0)
    world.run(2000)
    assert world.run() < 0.95 * world.best_speed()
