"""What travels between the devices of a compiled program."""

import math
import re

KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
_LINE = re.compile(rf"= (\S.*?) ({'|'.join(KINDS)})(?:-start)?\(")


def collectives(compiled) -> list[tuple[str, int]]:
    """(kind, elements of the largest array in what it returns) of each collective, on one device."""
    found = []
    for line in compiled.as_text().splitlines():
        if match := _LINE.search(line):
            shapes = re.findall(r"\[([\d,]*)\]", match[1])
            found.append((match[2], max(math.prod(int(n) for n in s.split(",") if n) for s in shapes)))
    return found
