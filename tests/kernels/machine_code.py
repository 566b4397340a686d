"""Machine code as cuobjdump --dump-sass prints it."""

from __future__ import annotations


def sass(*lines: str) -> str:
    """An instruction at every 16 bytes, its encoding behind."""
    return "\n".join(f"        /*{16 * i:04x}*/  {line} ;   /* 0x0123 */" for i, line in enumerate(lines))
