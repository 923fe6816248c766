"""Errors that a user can fix: one exception, and the wrapper that prints it as one line."""

import functools
import os
import signal
import socket
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn, ParamSpec, TypeVar

EXIT_CODE = 2
BROKEN_PIPE = 141  # exit code of a process that SIGPIPE ends
STORE_TIMEOUT = 5  # seconds to find the store of a job, which may have ended

Params, Result = ParamSpec("Params"), TypeVar("Result")


class UserError(Exception):
    """An error that the user can fix. The message is one line: the file, flag or value at fault, and how to fix it."""


class TrainingFailed(UserError):
    """Training diverged or a lambda did not learn: a result of the hyperparameters, not a wrong input."""


def one_line_errors(main: Callable[Params, Result]) -> Callable[Params, Result]:
    """Wrap a script's `main`: a `UserError` prints its one line on stderr and exits with code 2, Ctrl-C prints one line
    and exits with code 130, both without a traceback. A reader of stdout that leaves early, as in `| head`, ends the
    script silently with code 141.

    With several processes only the first to fail prints, since the others fail as a consequence.
    """

    @functools.wraps(main)
    def wrapper(*args: Params.args, **kwargs: Params.kwargs) -> Result:
        try:
            return main(*args, **kwargs)
        except UserError as error:
            if failed_before() == 0:
                print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            leave()
        except KeyboardInterrupt:
            if failed_before() == 0:
                print("stopped by SIGINT", file=sys.stderr)
            leave(128 + signal.SIGINT)
        except Exception as error:
            if isinstance(error, BrokenPipeError) and is_stdout_closed():
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still in its buffer
                leave(BROKEN_PIPE)
            if failed_before() == 0:
                raise
            leave()

    return wrapper


def is_stdout_closed() -> bool:
    """Whether the reader of stdout has left. A broken pipe may also be one to another process."""
    try:
        print(flush=True)  # flushing alone does not tell: the buffer may be empty
    except BrokenPipeError:
        return True
    return False


def world_size() -> int:
    """Number of processes of this job, from the environment of torchrun; 1 without it or if it is no number."""
    try:
        return int(os.environ.get("WORLD_SIZE", 1))
    except ValueError:
        return 1


def failed_before() -> int:
    """How many processes of this job failed before this one, counted in the store of torch.distributed; 0 if there is
    no store."""
    if world_size() == 1:
        return 0
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        socket.create_connection((address, port), STORE_TIMEOUT).close()  # TCPStore would repeat and log its tries
        from torch.distributed import TCPStore

        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=STORE_TIMEOUT))
        return store.add("failed processes", 1) - 1
    except (KeyError, ValueError, OverflowError, OSError, RuntimeError):  # no store, or it ended with its process
        return 0


def leave(code: int = EXIT_CODE) -> NoReturn:
    """Exit; with several processes immediately, since an orderly exit would wait for the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    if world_size() > 1:
        os._exit(code)
    sys.exit(code)
