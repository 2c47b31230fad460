"""What --pseudonymise writes in place of names: hashes with a random salt of the output folder.

The salt lies in the folder, readable by its owner alone, so that the same command resumes. Without
it nobody can tell, by trying, which name a pseudonym stands for; delete it before passing on the
folder.
"""

import hashlib
import hmac
import logging
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medclip_jax import files
from medclip_jax.errors import WorkdirError
from medclip_jax.inference import inputs
from medclip_jax.inference.inputs import Item
from medclip_jax.io.nifti_header import files_of

SALT_FILE = ".pseudonyms"
SALT_BYTES = 32
NAMED = f"*-{'[0-9a-f]' * inputs.HASH}.json"  # results under inputs.safe_name
# "/", "3", "7.5"; a longer number may be a patient's
IN_SENTENCES = re.compile(r"\W?|\d{1,4}([.,]\d{1,4})?")


def salt_of(output: Path) -> bytes:
    """The salt of an output folder; a new one where there is none.

    Raises WorkdirError if it cannot be written, is damaged, or lacks where results are: the same
    names would then get other pseudonyms; also where results with names are.
    """
    path = output / SALT_FILE
    with files.disk_errors(path):
        output.mkdir(parents=True, exist_ok=True)
        if next(output.glob(NAMED), None):
            raise WorkdirError(
                f"{output} holds results with names, of a call without --pseudonymise: "
                "predict into a new folder"
            )
        if not os.path.lexists(path):
            if next(output.glob("results*.csv"), None):
                raise WorkdirError(
                    f"{output} holds results and no {SALT_FILE}: restore it, or predict into a new "
                    "folder"
                )
            new = output / f".{secrets.token_hex(8)}.tmp"
            with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(secrets.token_hex(SALT_BYTES).encode())
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(new, path)  # whole, or of another process that was faster
            except FileExistsError:
                pass
            finally:
                new.unlink()
        raw = files.read_regular(path, 2 * SALT_BYTES)
    if not re.fullmatch(rb"[0-9a-f]{%d}" % (2 * SALT_BYTES), raw):
        raise WorkdirError(
            f"{path} is damaged: restore it, or predict into a new folder for new pseudonyms."
        )
    return bytes.fromhex(raw.decode())


def pseudonym(text: str, salt: bytes) -> str:
    """A "p", so that no spreadsheet takes it for a number, and 16 hexadecimal digits."""
    digest = hmac.new(salt, text.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()
    return f"p{digest[:16]}"


def rename(items: Iterable[Item], salt: bytes) -> list[Item]:
    """The same items under pseudonyms, also where a user sees them, without UIDs."""
    renamed = []
    for item in items:
        name = pseudonym(item.output, salt)
        names = tuple(pseudonym(own, salt) for own in item.names)
        place = pseudonym(item.place, salt) if item.place else ""
        renamed.append(Item(name, item.paths, item.kind, name, names, (), item.error, place))
    return renamed


def without_names(message: str, paths: Sequence[str], name: str) -> str:
    """A message with `name` for every path, and without what a library says in brackets.

    A file's name alone is replaced, too, unless it may be a number or a sign of the sentence.
    """
    voxels = [str(file) for path in paths for file in files_of(Path(path))[1:]]  # of pairs
    instead: dict[str, str] = {}
    for path in (*paths, *voxels):
        whole = os.path.abspath(path)
        instead |= dict.fromkeys((path, whole, os.path.basename(whole)), name)
        instead |= {os.path.dirname(whole): "..."}
    instead |= {inputs.printable(part): text for part, text in instead.items()}
    names = {part: text for part, text in instead.items() if not IN_SENTENCES.fullmatch(part)}
    message = inputs.replaced(message, names)
    while (shorter := re.sub(r" ?\([^()]*\)", "", message)) != message:
        message = shorter
    return message


class _Nameless(logging.Filter):
    """Takes the names of inputs out of what is logged."""

    def __init__(self, names: dict[str, str], folders: set[str]):
        super().__init__()
        self.names, self.folders = names, folders

    def _hidden(self, arg: Any) -> Any:
        is_name = isinstance(arg, str | os.PathLike)  # a number is none, though files have numbers
        return self.names.get(str(arg), arg) if is_name else arg

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(map(self._hidden, record.args))
        text = record.getMessage()
        if any(folder in text for folder in self.folders):
            record.msg, record.args = "a message that names an input is left out", ()
        return True


@contextmanager
def nameless_log(items: Iterable[Item]) -> Iterator[None]:
    """Meanwhile no log line names a file of these items, or a folder with one of them."""
    names = {path: item.output for item in items for path in item.paths}
    names |= {os.path.basename(path): name for path, name in names.items()}
    folders = {os.path.dirname(path) for path in names if os.path.isabs(path)} - {"/"}
    hide = _Nameless(names, folders)
    handlers = logging.getLogger().handlers[:]
    for handler in handlers:
        handler.addFilter(hide)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(hide)
