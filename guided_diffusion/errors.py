"""Mistakes of the user's, told in one line."""


class UserError(Exception):
    """A mistake the user can mend: shown as one clear line, without a traceback, exit status 1."""
