"""Which devices a library's list of architectures serves.

The list is CMake's: "80" is machine code for sm_80 and its PTX, "80-real" the machine code alone,
"80-virtual" the PTX alone. Machine code runs on devices of the same major compute capability that are not
older; PTX on every device that is not older, once the driver has translated it. "90a" is for 9.0 and nothing
else: Hopper's kernels stand beside the others, never in their place.
"""

from __future__ import annotations

from typing import NamedTuple

OLDEST = 80


class Built(NamedTuple):
    """A list of architectures, taken apart. Numbers are 10 * major + minor of a compute capability."""

    machine_code: tuple[int, ...]
    ptx: tuple[int, ...]
    hopper: bool

    @classmethod
    def parse(cls, architectures: str) -> Built:
        """Of a list such as "80,90a-real"."""
        machine_code, ptx, hopper = [], [], False
        for entry in architectures.split(","):
            number, _, kind = entry.partition("-")
            if number.endswith("a"):
                hopper = True
                continue
            if kind in ("", "real"):
                machine_code.append(int(number))
            if kind in ("", "virtual"):
                ptx.append(int(number))
        return cls(tuple(sorted(machine_code)), tuple(sorted(ptx)), hopper)

    def __str__(self) -> str:
        parts = [f"machine code for {_names(self.machine_code)}"] if self.machine_code else []
        parts += [f"PTX of {_names(self.ptx)}"] if self.ptx else []
        parts += ["kernels of Hopper's own (sm_90a)"] if self.hopper else []
        return ", ".join(parts)

    def has_machine_code(self, capability: int) -> bool:
        """Whether such a device runs it as it is."""
        return any(sm // 10 == capability // 10 and sm <= capability for sm in self.machine_code)

    def why_not(self, capability: int, toolkit: int, driver: int) -> str | None:
        """Why a device of this capability cannot run it, or None.

        toolkit and driver are versions of CUDA, 1000 * major + 10 * minor: what compiled the library,
        and what the driver knows. A driver translates PTX of its own CUDA version and of older ones.
        """
        if capability < OLDEST:
            return f"needs compute capability 8.0 or newer, this device has {capability / 10}"
        if self.has_machine_code(capability):
            return None
        rebuild = f"fastattn build-cuda --architectures {capability}"
        if not any(sm <= capability for sm in self.ptx):
            return f"is built for other devices ({self}) than one of {capability / 10}: {rebuild}"
        if driver < toolkit:
            return (
                f"has PTX of CUDA {version(toolkit)} for a device of {capability / 10}, which a driver of "
                f"CUDA {version(driver)} does not translate: a newer driver, or {rebuild}"
            )
        return None


def version(number: int) -> str:
    """13020 as "13.2"."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _names(numbers: tuple[int, ...]) -> str:
    return ", ".join(f"sm_{number}" for number in numbers)
