"""Faults that a user can mend: one exception, and the wrapper that prints it as one line."""

import functools
import sys


class UserError(Exception):
    """Raised where a fault is found. The message is one line that names the culprit and the mend."""


def one_line_errors(main):
    """Wrap a script's `main`: a `UserError` ends in its one line on stderr and exit code 2, without a traceback."""

    @functools.wraps(main)
    def wrapper(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            sys.exit(2)

    return wrapper
