"""How tasks and task pairs are named: in files and tags, and for people."""

from __future__ import annotations

import re
import zlib


def safe_name(name: str) -> str:
    """A task name for file names and logger tags: anything unusual becomes ``_`` and a checksum is added.

    >>> safe_name("math"), safe_name("a/b")
    ('math', 'a_b-07f4401c')
    """
    plain = re.sub(r"[^A-Za-z0-9.-]+|^\.+", "_", name)[:60]
    return plain if plain == name else f"{plain}-{zlib.crc32(name.encode('utf-8', 'surrogatepass')):08x}"


def pair_key(a: str, b: str) -> str:
    """A task pair in files, tags and options: the task that is hurt first.

    >>> pair_key("math", "code")
    'math__code'
    """
    return f"{safe_name(a)}__{safe_name(b)}"


def printable(name: str) -> str:
    """A task name for people: what would move the cursor or break the line is replaced."""
    return "".join(
        character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in name
    )


def readable(name: str) -> str:
    """A task name in a sentence: quoted, unless it is one plain word.

    >>> readable("math"), readable("word problems"), readable("3")
    ('math', '"word problems"', '"3"')
    """
    return name if re.fullmatch(r"[^\W\d][\w.-]*", name) else f'"{printable(name)}"'


def pair_label(a: str, b: str) -> str:
    """A task pair for people, the way it acts: the right one pushes on the left one.

    >>> pair_label("math", "code")
    'math <- code'
    """
    return f"{readable(a)} <- {readable(b)}"
