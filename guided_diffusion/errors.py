"""Mistakes of the user's, told in one line."""

import difflib
from collections.abc import Collection


class UserError(Exception):
    """A mistake the user can mend: shown as one clear line, without a traceback, exit status 1."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def printable(text: str) -> str:
    """Text for a terminal: what would move the cursor or change colours, or cannot be shown, escaped."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def suggestion(name: str, known: Collection[str]) -> str:
    """What to say of a name that is not known: the one most like it, or all that there are."""
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"did you mean '{nearest[0]}'?" if nearest else f"there are {', '.join(known)}"


def message_of(error: Exception) -> str:
    """The one-line message for an error; its type's name if it has none."""
    if isinstance(error, (FileExistsError, NotADirectoryError)) and error.filename:
        return f"{error.filename} is a file, and a folder is wanted"
    return " ".join(str(error).split("\n")) or type(error).__name__
