"""Sizes as people write them."""

from __future__ import annotations

import re


def parse_size(text: str) -> int:
    """Bytes of '8GiB', '512MB', '4096'. Raises ValueError for anything else."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*(?:([KMGT])(I?)B|B)?\s*", text.upper())
    if match is None:
        raise ValueError(f"{text!r} is not a size such as 8GiB or 500MB")
    number, unit, binary = match.groups()
    power = " KMGT".index(unit) if unit else 0
    return int(float(number) * (1024 if binary else 1000) ** power)
