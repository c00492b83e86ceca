"""The errors a user meets, and the exit codes of the command line.

0 done · 2 bad input or usage · 3 internal error (a bug: nothing was written) · 4 nothing to prune
5 not faster on its target · 6 refused or wrong on its target (nothing was written)
"""

from __future__ import annotations


def printable(text: str) -> str:
    """The text with control characters and half surrogates escaped: names in a model are not trusted to
    move the cursor, recolour the terminal or start a line of their own."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class OnnxPruneError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line returns."""

    exit_code = 2


class UserError(OnnxPruneError):
    """Something about the input, the plan or an option; the message says what to do."""


class Unreachable(UserError):
    """What a target asks for lies beyond everything that can be removed; the message gives the least possible."""


class InternalError(OnnxPruneError):
    """The tool produced something it cannot stand behind. Please report it."""

    exit_code = 3


class NothingToPrune(OnnxPruneError):
    """Nothing is prunable or nothing was removed; the message counts the reasons."""

    exit_code = 4


class NotFaster(OnnxPruneError):
    """The result is not faster than the original on its target; the message gives the times."""

    exit_code = 5


class WrongOnTarget(OnnxPruneError):
    """A target that takes the original refuses the result, or computes it otherwise than the CPU, where it is proven."""

    exit_code = 6
