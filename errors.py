"""Faults that a user can mend: one exception, and the wrapper that prints it as one line."""

import functools
import os
import sys


class UserError(Exception):
    """Raised where a fault is found. The message is one line that names the culprit and the mend."""


def one_line_errors(main):
    """Wrap a script's `main`: a `UserError` ends in its one line on stderr and exit code 2, without a traceback.

    Of several processes the first to fail speaks for all. Torchrun then ends the others; what they raise when their
    neighbour is gone says nothing new and is not printed.
    """

    @functools.wraps(main)
    def wrapper(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as error:
            if failed_before() == 0:
                print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            leave()
        except Exception:
            if failed_before() == 0:
                raise
            leave()

    return wrapper


def failed_before() -> int:
    """How many processes of this job failed before this one; counted in the store by which they found each other."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0
    from torch.distributed import TCPStore

    try:
        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        return store.add("failed processes", 1) - 1
    except (KeyError, RuntimeError):  # no store, or gone with the process that held it
        return 0


def leave():
    """Exit with code 2; one of several processes at once, since an orderly exit waits for those that wait for it."""
    sys.stdout.flush()
    sys.stderr.flush()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        os._exit(2)
    sys.exit(2)
