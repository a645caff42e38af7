"""The one exception whose message is meant for a user, not for a developer."""

import difflib
from collections.abc import Iterable

# Names that an error lists.
SHOWN = 10


class UserError(Exception):
    """Bad input: one sentence that names what is wrong, where, and what would be accepted.

    The command line prints it without a traceback and exits with code 2.
    """


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a `name` that is not in `known`: suggests the nearest, or lists them, at most `SHOWN`."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    more = f" and {len(known) - SHOWN} more" if len(known) > SHOWN else ""
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known[:SHOWN]) or 'none'}{more}."
    return UserError(f"unknown {kind} {name!r}: {hint}")
