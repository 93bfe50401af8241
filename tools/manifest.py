"""List what an upload would publish: `python tools/manifest.py dist` prints the files of each archive there, and sizes.
It fails if an archive has files that belong to the repository alone. `make dist` ends with it.
"""

import sys
import tarfile
import zipfile
from pathlib import Path

PRIVATE = ("tests", "lab", "benchmarks", "docs", "tools", "examples")
"""Folders of the repository that no archive holds."""


def contents(archive):
    """{name: bytes} of the files of a wheel or of a source distribution, without the folder that holds the latter."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return {entry.filename: entry.file_size for entry in wheel.infolist() if not entry.is_dir()}
    with tarfile.open(archive) as sdist:
        return {entry.name.partition("/")[2]: entry.size for entry in sdist if entry.isfile()}


def unwanted(names):
    """The names that must not be published: private folders, and in them or elsewhere what Python or a build leaves."""
    return sorted(
        name
        for name in names
        if name.startswith(tuple(f"{folder}/" for folder in PRIVATE)) or "__pycache__" in name or name.endswith(".o")
    )


def manifest(archive):
    files = contents(archive)
    lines = [f"{archive.name}: {len(files)} files, {sum(files.values()):,} bytes, {archive.stat().st_size:,} packed"]
    return [*lines, *(f"{size:>10,}  {name}" for name, size in sorted(files.items()))]


if __name__ == "__main__":
    archives = sorted(each for each in Path(sys.argv[1]).iterdir() if each.name.endswith((".whl", ".tar.gz")))
    bad = []
    for archive in archives:
        print("\n".join(manifest(archive)))
        bad += [f"{archive.name}: {name} is no part of the package" for name in unwanted(contents(archive))]
    sys.exit("\n".join(bad) or (0 if archives else f"{sys.argv[1]} has no archive"))
