"""Which files a path, a directory or a glob stands for."""

import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from evenstep.data.containers import ARCHIVE, suffixes
from evenstep.data.formats import KINDS, is_known
from evenstep.data.left_out import BadInput, LeftOut, printable
from evenstep.errors import EvenstepError

_OTHERS = "files of other kinds"


def excluded(name: str, patterns: Sequence[str]) -> bool:
    """Does one of ``patterns`` match ``name`` (with ``/``), its end from a folder on, or one of its folders?"""
    pieces = name.strip("/").split("/")
    ends = ["/".join(pieces[i:]) for i in range(len(pieces))]
    return any(
        fnmatchcase(candidate, pattern)
        for pattern in (pattern.strip("/") for pattern in patterns)
        for candidate in (*ends, *pieces, f"/{name.strip('/')}")
    )


def find_files(rest: str, exclude: Sequence[str], left_out: LeftOut) -> list[Path]:
    """The files of ``text:REST``, each real file once, sorted. EvenstepError where there are none."""
    try:
        target = Path(rest).expanduser()
        if target.is_dir():
            found = list(_files_below(target, left_out))
            kept = _kept(found, target, exclude, left_out)
            known = [path for path in kept if is_known(path) or suffixes(path) == (ARCHIVE, [])]
            others = sorted({*kept} - {*known})
            if others:
                left_out.add(_OTHERS, others[0], len(others))
            if not known and kept:
                raise _no_known(target, others)
        else:
            found = [target] if target.is_file() else list(_matching(target))
            kept = known = _kept(found, Path(), exclude, left_out)
        real = sorted({path.resolve() for path in known})
    except (OSError, RuntimeError, ValueError) as error:  # too long a name, a user that does not exist, a zero
        if isinstance(error, EvenstepError):
            raise
        why = getattr(error, "strerror", None) or printable(error)
        raise EvenstepError(f"cannot look for '{printable(rest)[:200]}': {why[:200]}; check the path") from error
    if found and not kept:
        raise EvenstepError(
            f"data.exclude {','.join(exclude)} leaves out all {len(found)} files of '{rest}'; narrow it"
        )
    if not real and target.is_dir():
        raise _no_known(target, [])
    if not real:
        what = "no file matches" if glob.has_magic(rest) else "no such file or directory:"
        raise EvenstepError(
            f"{what} '{printable(rest)}' (looked from {Path.cwd()}); check the path, and quote a glob in the shell"
        )
    return real


def _kept(found: list[Path], root: Path, exclude: Sequence[str], left_out: LeftOut) -> list[Path]:
    out = [path for path in found if exclude and excluded(_below(path, root), exclude)]
    if out:
        left_out.add("files by data.exclude", out[0], len(out))
    return sorted({*found} - {*out})


def _below(path: Path, root: Path) -> str:
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


def _no_known(folder: Path, others: list[Path]) -> EvenstepError:
    kinds = Counter(path.suffix.lower() or "no suffix" for path in others)
    there = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5)) or "no files"
    return EvenstepError(
        f"no file below {folder} ends in {', '.join(KINDS)} or {ARCHIVE} (there are: {there}); name files of other "
        "kinds by a glob"
    )


def _files_below(folder: Path, left_out: LeftOut, hidden: bool = False) -> Iterator[Path]:
    """Every file below ``folder``, folder by folder in the order of their names. A link to a folder that it lies in is
    not followed."""

    def visit(path: str, above: frozenset[tuple[int, int]]) -> Iterator[Path]:
        try:
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError as error:
            message = f"cannot read the folder {path}: {error.strerror}; give yourself the right to, or another source"
            left_out.bad(BadInput("folders that cannot be read", path, message))
            return
        for entry in entries:
            if entry.name.startswith(".") and not hidden:
                left_out.add("hidden files and folders", entry.path)
            elif os.path.isdir(entry.path):
                facts = os.stat(entry.path)
                if (identity := (facts.st_dev, facts.st_ino)) not in above:
                    yield from visit(entry.path, above | {identity})
            elif os.path.isfile(entry.path):
                yield Path(entry.path)
            else:
                left_out.add("links to nothing and other things that are no files", entry.path)

    facts = os.stat(folder)
    yield from visit(str(folder), frozenset({(facts.st_dev, facts.st_ino)}))


def _matching(pattern: Path) -> Iterator[Path]:
    """The files that a glob matches. ``**`` is followed here: Python's own glob runs in circles through links."""
    pieces = pattern.parts
    if "**" not in pieces:
        yield from (path for path in map(Path, glob.glob(str(pattern))) if path.is_file())
        return
    at = pieces.index("**")
    hidden = any(piece.startswith(".") for piece in pieces[at:])
    for start in glob.glob(str(Path(*pieces[:at]))) if at else ["."]:
        if os.path.isdir(start):
            for path in _files_below(Path(start), LeftOut("skip"), hidden):
                if _fits(path.relative_to(start).parts, pieces[at:]):
                    yield path


def _fits(names: tuple[str, ...], pieces: tuple[str, ...]) -> bool:
    """Do the names of a path match the pieces of a glob, as in Python's glob?"""
    if not pieces:
        return not names
    if pieces[0] == "**":
        return any(
            _fits(names[i:], pieces[1:])
            for i in range(len(names) + 1)
            if not any(name.startswith(".") for name in names[:i])
        )
    if not names or (names[0].startswith(".") and not pieces[0].startswith(".")):
        return False
    return fnmatchcase(names[0], pieces[0]) and _fits(names[1:], pieces[1:])
