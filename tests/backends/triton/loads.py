"""Which tensor each load of a compiled kernel reads, and how wide: followed back through the PTX."""

import re
from collections import Counter

_PARAMETER = re.compile(r"ld\.param\.b64\s+(%rd\d+), \[\w+_param_(\d+)\]")
_LOAD = re.compile(
    r"(?:ld\.global(?:\.\w+)*?(?:\.v(?P<lanes>\d))?\.b(?P<bits>\d+) \{[^}]*\}|"
    r"cp\.async\.c[ag]\.shared\.global \[[^\]]*\]), \[ (?P<address>%rd\d+) \+ \d+ \](?:, 0x(?P<copied>\w+))?"
)
_DEFINED = re.compile(r"^\s*(?:@\S+ )?(?:add|sub|mad|mov|selp|shl|cvta|or)\.\S+\s+(%rd\d+), ([^;]*);", re.M)


def widths(ptx: str, parameters: list[str]) -> dict[str, Counter]:
    """By the pointer parameter they read from: bytes of each load, and how many there are.

    parameters: names in the order of the launch. Addresses are sums of a pointer and offsets, and an offset
    is no pointer's unless it was loaded, where this stops.
    """
    origin = {register: {parameters[int(index)]} for register, index in _PARAMETER.findall(ptx)
              if int(index) < len(parameters)}  # fmt: skip
    steps = [(to, re.findall(r"%rd\d+", operands)) for to, operands in _DEFINED.findall(ptx)]
    changed = True
    while changed:  # loops carry addresses round
        changed = False
        for to, operands in steps:
            found = set().union(*(origin.get(x, set()) for x in operands)) - origin.get(to, set())
            if found:
                origin.setdefault(to, set()).update(found)
                changed = True
    loads = {}
    for load in _LOAD.finditer(ptx):
        (pointer,) = (x for x in origin[load["address"]] if x.startswith("p_"))
        size = int(load["copied"], 16) if load["copied"] else int(load["lanes"] or 1) * int(load["bits"]) // 8
        loads.setdefault(pointer, Counter())[size] += 1
    return loads
