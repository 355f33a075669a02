"""What may become of a constraint."""

from dataclasses import dataclass

from tokenspeed.core.constraint import ConstraintKind
from tokenspeed.core.errors import InvalidParameter, RequestError
from tokenspeed.grammar.matcher import Grammar

__all__ = ["Key", "Outcome", "Refusal"]

Key = tuple[ConstraintKind, str]
"""A constraint: its kind, and its text."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why there is no grammar. Kept, as an error with its traceback should not be.

    Attributes:
        reason: for people.
        of_request: whether the constraint is to blame, so that to try again is of no use.
    """

    reason: str
    of_request: bool = True

    def error(self) -> RequestError:
        """As something to raise."""
        return (InvalidParameter if self.of_request else RequestError)(self.reason)


Outcome = Grammar | Refusal
