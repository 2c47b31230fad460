"""Walking what a user names: every file that is there, and why a thing there cannot be opened.

Nothing but regular files is for reading: a pipe would be waited for. Links are followed only within
the folder that was named, and each folder is walked once, so that no loop has an effect.
"""

import os
import stat
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from glob import has_magic
from typing import NamedTuple

# leftovers of systems and servers, besides all names that begin with a dot
JUNK = {"__macosx", "@eadir", "$recycle.bin", "system volume information", "#recycle"}
FOLDER = "folder"


class Entry(NamedTuple):
    """A path that the walk came to."""

    path: str
    error: str = ""  # why it cannot be opened
    named: bool = False  # by its ending or itself, so that its kind does not matter
    literal: bool = False  # itself


def entries(name: str, visited: set[tuple[int, int]], follow: bool) -> tuple[str, list[Entry]]:
    """(folder from which sources are told, what a path or a glob pattern names).

    Args:
      visited: folders that were walked already; those of this walk are added.
      follow: also links that lead out of the folder.
    """
    if os.path.lexists(name) or not has_magic(name):
        path = os.path.abspath(name)
        if not os.path.isdir(name):
            what = _what(path) if name else "is not there"
            return os.path.dirname(path), [Entry(path, what, True, True)]
        return os.path.dirname(path), list(_walk(path, (), visited, follow))
    parts = name.split("/")
    first = next(i for i, part in enumerate(parts) if has_magic(part))
    base = "/".join(parts[:first]) or ("/" if first else ".")
    root, pattern = os.path.abspath(base), tuple(filter(None, parts[first:]))
    if not os.path.lexists(base):
        return root, []
    return (os.path.dirname(root) if first else root), list(_walk(root, pattern, set(), follow))


def _walk(
    root: str, pattern: Sequence[str], visited: set[tuple[int, int]], follow: bool
) -> Iterator[Entry]:
    """Files below a folder that fit a pattern, and all that cannot be opened.

    Folders that links lead to come last, so that things have their own names where they have one.
    """
    real = os.path.realpath(root)
    last = pattern[-1] if pattern and pattern[-1].strip("*?.") else ""
    folders, links = [root], list[str]()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        try:
            status = os.stat(folder)
            identity = status.st_dev, status.st_ino
            if identity in visited:
                continue
            visited.add(identity)
            with os.scandir(folder) as listing:
                inside = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            yield Entry(folder, f"a folder that cannot be listed ({error.strerror})")
            continue
        below: list[str] = []
        for entry in inside:
            parts = entry.path[len(root.rstrip("/")) + 1 :].split("/")
            if is_hidden(entry.name) or not _may_fit(parts, pattern):
                continue
            what = _what(entry.path, None if follow else real)
            if what == FOLDER:
                (links if entry.is_symlink() else below).append(entry.path)
            elif _fits(parts, pattern):
                named = bool(last) and fnmatchcase(entry.name, last)
                yield Entry(entry.path, what, named and len(parts) == len(pattern))
        folders += reversed(below)


def is_hidden(name: str) -> bool:
    """Whether a name in a folder is not for users: hidden, or a system's own."""
    return name.startswith(".") or name.lower() in JUNK


def _what(path: str, real: str | None = None) -> str:
    """FOLDER, "" for a regular file, else why it is not opened.

    Args:
      real: folder, without links, out of which no link may lead; None: any may.
    """
    try:
        if os.path.islink(path):
            target = os.path.realpath(path, strict=True)
            if real is not None and not f"{target}/".startswith(real.rstrip("/") + "/"):
                return "a link out of the folder that was named: not followed (--follow_links)"
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return "a link to what is not there" if os.path.islink(path) else "is not there"
    except (OSError, ValueError) as error:
        return f"cannot be opened ({getattr(error, 'strerror', error)})"
    if stat.S_ISDIR(mode):
        return FOLDER
    return "" if stat.S_ISREG(mode) else "no regular file: a pipe, a device or a socket"


def _fits(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a path fits a pattern, or lies in a folder that does."""
    if not pattern:
        return True
    if pattern[0] == "**":
        return any(_fits(parts[i:], pattern[1:]) for i in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])


def _may_fit(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a path, or one below it, may fit."""
    if not parts or not pattern or pattern[0] == "**":
        return True
    return fnmatchcase(parts[0], pattern[0]) and _may_fit(parts[1:], pattern[1:])
