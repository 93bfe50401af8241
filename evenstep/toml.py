"""Reading TOML in the encodings that editors write."""

from __future__ import annotations

import codecs
import tomllib
from typing import Any


def parse_toml(content: bytes) -> dict[str, Any]:
    """TOML in UTF-8, or as editors and shells of Windows save it: with a byte order mark, in UTF-8 or UTF-16.
    ValueError for what is neither."""
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return tomllib.loads(content.decode("utf-16" if wide else "utf-8-sig"))
