"""`EvenstepError`, the exception that the command line turns into a single line of text, and parts of such lines."""


class EvenstepError(ValueError):
    """Something the user can mend: the message says what was given, what is allowed and what to do.

    The command line prints the message alone (no stack trace without ``--debug``) and exits with status 2.
    """


def nearest(given: str, allowed: "list[str] | tuple[str, ...]") -> str:
    """``"; did you mean 'x'?"`` for the closest allowed name, or an empty string when nothing is close."""
    import difflib

    # Dashes would make all flags alike, and "did you mean what you said?" helps nobody.
    others = {name.lstrip("-"): name for name in allowed if name != given}
    close = difflib.get_close_matches(given.lstrip("-"), others, n=1, cutoff=0.6)
    return f"; did you mean '{others[close[0]]}'?" if close else ""


def first_line(problem: BaseException) -> str:
    """The first line of the message of an exception, or the name of its type where the message is empty."""
    return next(iter(str(problem).splitlines()), "") or type(problem).__name__
