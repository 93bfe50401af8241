"""The one exception that the command line turns into a single line of text."""


class EvenstepError(ValueError):
    """Something the user can mend: the message says what was given, what is allowed and what to do.

    The command line prints the message alone (no stack trace without ``--debug``) and exits with status 2.
    """


def nearest(given: str, allowed: "list[str] | tuple[str, ...]") -> str:
    """``"; did you mean 'x'?"`` for the closest allowed name, or an empty string when nothing is close."""
    import difflib

    close = difflib.get_close_matches(given, list(allowed), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""
