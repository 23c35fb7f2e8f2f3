"""The one error class that means "the input cannot be used": the value, the rule with numbers, the
remedy."""

from __future__ import annotations


class UsageError(ValueError):
    """Input of the user that cannot be used; the command line prints it and exits with 2."""
