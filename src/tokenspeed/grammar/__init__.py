"""Owns what a text may go on with under a constraint; never looks at a logit."""

from tokenspeed.grammar.compiler import CompiledConstraint, ConstraintCompiler
from tokenspeed.grammar.matcher import Grammar, Matcher
from tokenspeed.grammar.outcomes import Refusal
from tokenspeed.grammar.stack import deep_stacks
from tokenspeed.grammar.tokens import TokenTable

__all__ = [
    "CompiledConstraint",
    "ConstraintCompiler",
    "Grammar",
    "Matcher",
    "Refusal",
    "TokenTable",
    "deep_stacks",
]
