"""The one exception that reaches a user as a single line."""

from __future__ import annotations


class UserError(Exception):
    """Bad input, said in one line: which file and key, what is wrong, what would be right.

    The command line prints the message without a traceback and exits with status 2.
    """
