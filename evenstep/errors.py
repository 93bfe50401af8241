"""`EvenstepError`, the exception that the command line turns into a single line of text, and parts of such lines."""


class EvenstepError(ValueError):
    """An error that the user can correct. Its message is one line: what was given, what is allowed, and what to do.

    The command line prints only the message (with ``--debug`` a stack trace) and exits with status 2.
    """


def nearest(given: str, allowed: "list[str] | tuple[str, ...]") -> str:
    """``"; did you mean 'x'?"`` for the closest allowed name, or an empty string when nothing is close."""
    import difflib

    # Leading dashes would make all flags similar. The given name itself may be allowed elsewhere and is no suggestion.
    others = {name.lstrip("-"): name for name in allowed if name != given}
    # The option of another section, or one without its section: model.seq_len and seq_len are train.seq_len.
    last = given.lstrip("-").rpartition(".")[2]
    moved = [name for name in others if "." in name and name.rpartition(".")[2] == last]
    if len(moved) == 1:
        return f"; did you mean '{others[moved[0]]}'?"
    close = difflib.get_close_matches(given.lstrip("-"), others, n=1, cutoff=0.6)
    return f"; did you mean '{others[close[0]]}'?" if close else ""


def first_line(problem: BaseException) -> str:
    """The first line of the message of an exception, or the name of its type where the message is empty."""
    return next(iter(str(problem).splitlines()), "") or type(problem).__name__
