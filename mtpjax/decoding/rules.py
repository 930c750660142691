"""What `LLM(acceptance=...)` may be, and the rule of the loop that it means."""

from __future__ import annotations

from mtpjax.decoding.acceptance import Acceptance, SimulatedAcceptance, exact_match
from mtpjax.decoding.rejection import rejection_rule

AcceptanceArgument = SimulatedAcceptance | str | None
COUPLED, REJECTION = "coupled", "rejection"


def acceptance_rule(
    acceptance: AcceptanceArgument, num_speculative_tokens: int, has_mtp_drafter: bool
) -> tuple[Acceptance, str]:
    """Return the rule, and its name in `Metrics.acceptance`.

    Args:
        acceptance: "coupled" or None: `exact_match`; "rejection"; or a simulated rule.
        num_speculative_tokens: drafts of a step.
        has_mtp_drafter: whether the MTP head drafts. The distribution that another drafter draws from is not known.

    Raises:
        ValueError: another value; "rejection" with a drafter of the caller's own.
    """
    if acceptance is None or acceptance == COUPLED:
        return exact_match, "real"
    if acceptance == REJECTION:
        if not has_mtp_drafter:
            raise ValueError(
                'acceptance="rejection" needs the distribution that drafts are drawn from, and a drafter of your own '
                'gives drafts only; leave out drafter=, or use acceptance="coupled"'
            )
        return rejection_rule, "rejection"
    if isinstance(acceptance, SimulatedAcceptance):
        if not num_speculative_tokens:
            return exact_match, "real"
        return acceptance.truncate(num_speculative_tokens), "simulated"
    raise ValueError(f'acceptance is {acceptance!r}; expected "coupled", "rejection" or a SimulatedAcceptance')
