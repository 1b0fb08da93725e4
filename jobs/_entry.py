"""How every job ends: mistakes in one line each and exit code 2, everything else its own code."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

from depthvar.errors import InputError

EXIT_DONE = 0
EXIT_INCOMPLETE = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def run_job(main: Callable[[], int]) -> NoReturn:
    """Run `main` and exit with its code; an `InputError` becomes `error:` lines and code 2.

    Files that cannot be read or written, a store that does not answer: one line and code 1.
    Ctrl-C at a moment when nothing has to be put in order ends the job with code 130.
    """
    try:
        code = main()
    except InputError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        code = EXIT_BAD_INPUT
    except OSError as error:
        reason = " ".join(str(error).split())
        print(f"error: {type(error).__name__}: {reason}", file=sys.stderr)
        print("nothing that was committed is lost: run the same command again", file=sys.stderr)
        code = EXIT_INCOMPLETE
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        code = EXIT_INTERRUPTED
    sys.exit(code)
