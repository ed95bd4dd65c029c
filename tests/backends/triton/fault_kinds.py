"""What is planted in compiled kernels, and what each fault must be noticed by.

A fault is a pattern in the PTX, what stands in its place, and the outcomes that tell of it: the simulator's
error for a fault of that kind, or wrong results where nothing but the numbers can be wrong.

A fault does no harm everywhere: a copy may be predicated off in the problem at hand, a value may reach no
result. Where one goes unnoticed, its *probe* is planted: what nobody could miss (an address a terabyte away,
an infinite value) if the place had any effect. A place whose probe goes unnoticed too doesn't count.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

MEMORY, RACE, RESULTS = "MemoryFault", "RaceFault", "wrong results"
Replace = Callable[[re.Match], str]


@dataclass(frozen=True)
class Fault:
    """noticed_by: the outcomes that may tell of it. probe: see above.

    spare: whether the compiler may leave one that nothing needs, so that without it nothing is wrong.
    """

    pattern: str
    replacement: Replace
    noticed_by: frozenset[str]
    probe: Replace | None = None
    spare: bool = False


def plant(ptx: str, place: re.Match, replacement: Replace) -> str:
    return ptx[: place.start()] + replacement(place) + ptx[place.end() :]


def _fault(pattern: str, replacement: Replace, *noticed_by: str, probe=None, spare=False) -> Fault:
    return Fault(pattern, replacement, frozenset(noticed_by), probe, spare)


def _further(by: int) -> Replace:
    return lambda m: f"{m[1]}{int(m[2] or 0) + by}"


def _without(m: re.Match) -> str:
    return ";"


def _exchanged(m: re.Match) -> str:
    return f"{m[1]}{m[4]}{m[3]}{m[2]}"


def _descriptor(change: str) -> Replace:
    """The same product with B's descriptor put through `change`."""
    return lambda m: f"{{ .reg .b64 %planted; {change.format(m[2])}; {m[1]}%planted{m[3]} }}"


_FAR = 1 << 40
_LOAD = r"((?:ld\.global\S* \{[^}]*\}|cp\.async\.c[ag]\.shared\.global \[[^\]]*\]), \[ %rd\d+ \+ )(\d+)"
_STORE = r"(st\.global\S* \[ %rd\d+ \+ )(\d+)"
_WGMMA = r"(wgmma\.mma_async[^{]*\{[^}]*\}, (?:\{[^}]*\}|%rd\d+), )(%rd\d+)([^;]*;)"

FAULTS = {
    "barrier removed": _fault(r"bar\.sync[^;]*;", _without, RACE, spare=True),
    "one group too few waited for": _fault(r"(cp\.async\.wait_group\s+)(\d+)", _further(1), RACE),
    # What is read instead was never written, or is what an earlier copy left in its place of the ring.
    "copy left out": _fault(
        r"(?:@%p\d+ )?(cp\.async\.c[ag]\.shared\.global \[[^\]]*\], \[ %rd\d+ \+ )(\d+)([^;]*;)",
        _without, MEMORY, RESULTS, probe=lambda m: f"{m[0][: m.start(2) - m.start()]}{_FAR}{m[3]}",
    ),
    "load misaligned": _fault(_LOAD, _further(1), MEMORY, probe=_further(_FAR)),
    "store misaligned": _fault(_STORE, _further(1), MEMORY, probe=_further(_FAR)),
    "load 16 bytes off": _fault(_LOAD, _further(16), MEMORY, RESULTS, probe=_further(_FAR)),
    "store 16 bytes off": _fault(_STORE, _further(16), MEMORY, RESULTS, probe=_further(_FAR)),
    # The probe is a load by whatever lanes the mask keeps from storing.
    "store not masked": _fault(
        r"@(%p\d+) (st\.global\S* \[ (%rd\d+) \+ )", lambda m: m[2], MEMORY, RESULTS,
        probe=lambda m: (
            f"{{ .reg .b32 %planted; @!{m[1]} ld.global.b32 {{ %planted }}, [ {m[3]} + {_FAR} ]; }} {m[0]}"
        ),
    ),
    "lanes of a sum exchanged": _fault(
        r"(shfl\.sync\.bfly\.b32 \s*)(%r\d+)(, %r\d+, )(\d+)([^;]*;)(?=[^;]*add\.f32)",
        lambda m: f"{m[1]}{m[2]}{m[3]}{int(m[4]) * 2 % 31}{m[5]}", RESULTS,
        probe=lambda m: f"mov.b32 {m[2]}, 0x7f800000;",
    ),
    "mma: fragment of A exchanged": _fault(
        r"(mma\.sync[^{]*\{[^}]*\}, \{ )(%r\d+)(, )(%r\d+)", _exchanged, RESULTS
    ),
    "mma: fragment of B exchanged": _fault(
        r"(mma\.sync[^{]*\{[^}]*\}, \{[^}]*\}, \{ )(%r\d+)(, )(%r\d+)", _exchanged, RESULTS
    ),
    "ldmatrix: 16 bytes off": _fault(
        r"(ldmatrix[^{]*\{[^}]*\}, \[%r\d+)(?:\+(\d+))?", lambda m: f"{m[1]}+{int(m[2] or 0) ^ 16}",
        RESULTS, MEMORY, RACE,
    ),
    "wgmma: fragment of A exchanged": _fault(
        r"(wgmma\.mma_async[^{]*\{[^}]*\}, \{)(%r\d+)(,)(%r\d+)", _exchanged, RESULTS
    ),
    "wgmma: descriptor 32 bytes off": _fault(
        _WGMMA, _descriptor("xor.b64 %planted, {}, 2"), RESULTS, MEMORY, RACE
    ),
    "wgmma: descriptor's stride wrong": _fault(
        _WGMMA, _descriptor(f"xor.b64 %planted, {{}}, {0b1100000 << 32}"), RESULTS, MEMORY, RACE
    ),
    "wgmma: descriptor's swizzle wrong": _fault(
        _WGMMA, _descriptor(f"xor.b64 %planted, {{}}, {-1 << 62}"), RESULTS, MEMORY, RACE
    ),
    "wgmma: fence of registers removed": _fault(r"wgmma\.fence[^;]*;", _without, RACE, spare=True),
    "wgmma: proxy fence removed": _fault(r"fence\.proxy\.async[^;]*;", _without, RACE, spare=True),
    "wgmma not waited for": _fault(r"wgmma\.wait_group\.sync\.aligned[^;]*;", _without, RACE),
}  # fmt: skip


def places(name: str, ptx: str, most: int) -> list[re.Match]:
    """Up to `most` places for a fault, evenly over the kernel."""
    found = list(re.finditer(FAULTS[name].pattern, ptx))
    if name == "one group too few waited for" and found:
        found.pop()  # after the last loop, where only copies that were predicated off are outstanding
    return found[:: -(-len(found) // most)] if found else []
