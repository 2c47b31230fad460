"""How every script ends at a user's mistake, and a kind of flag."""

import argparse
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial

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


def positive(text: str, kind: type = float, wanted: str = "a number above 0"):
    """The value of a flag that is more than 0."""
    with suppress(ValueError):
        if 0 < kind(text) < 1 << 53:  # written so that NaN is refused
            return kind(text)
    raise argparse.ArgumentTypeError(f"{text!r}: give {wanted}")


count = partial(positive, kind=int, wanted="a whole number of 1 or more")
