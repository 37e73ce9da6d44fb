"""Words of error messages."""

from __future__ import annotations

from collections.abc import Sequence


def few(names: Sequence[str], what: str, limit: int = 3) -> str:
    if not names:
        return ""
    return f"{len(names)} {what} ({', '.join(names[:limit])}{', ...' if len(names) > limit else ''})"
