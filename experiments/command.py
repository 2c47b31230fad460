"""How every script ends at a user's mistake, and a kind of flag."""

import argparse
import sys
from collections.abc import Callable

from medclip_jax.errors import UserError


def run(main: Callable[[], int | None]) -> None:
    """Run a script; what its user can correct is one sentence and exit code 2, no traceback."""
    try:
        sys.exit(main())
    except (UserError, OSError, SystemExit) as error:
        said = error.code if isinstance(error, SystemExit) else str(error)
        if not isinstance(said, str):  # a code
            raise
        print(f"error: {said}", file=sys.stderr)
        sys.exit(2)


def count(text: str) -> int:
    """The value of a flag that is 1 or more."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number of 1 or more")
    return int(text)
