"""Happens-before between warps over shared memory, at the granularity of the kernel's narrowest shared access.

Every warp has a clock, and knows of every other warp the latest clock it is ordered after (a vector clock). A
granule of shared memory remembers its last write (clock and warp) and, per warp, its last read. An access races
when such a record by another warp is later than what the accessing warp knows of it. A block-wide barrier lifts
everyone's knowledge to now; `floor` is the time up to which all is known to all, so that the common case is one
comparison. Named barriers and mbarriers join vector clocks of those who take part.

A clock of PENDING marks bytes of an asynchronous copy in flight: nobody may touch them until it was waited for.
"""

import numpy as np

from .errors import RaceFault

AGENT_BITS = 6
AGENTS = 1 << AGENT_BITS
AGENT_MASK = AGENTS - 1
PENDING = (1 << (32 - AGENT_BITS)) - 1


class RaceDetector:
    def __init__(self, blocks, warps, shared_bytes, granule, enabled):
        if warps > AGENTS:
            raise ValueError(f"{warps} warps a block, at most {AGENTS}")
        self.enabled, self.granule, self.warps, self.blocks = enabled, granule, warps, blocks
        self.granules = shared_bytes // granule
        shape = blocks * self.granules
        self.writes = np.zeros(shape, np.uint32)
        self.reads = np.zeros((blocks * warps * self.granules if enabled else 0,), np.uint32)
        self.write_pc = np.zeros(shape if enabled else 0, np.int32)
        self.reset()

    def reset(self):
        """Forget everything: new blocks start with unwritten shared memory."""
        self.writes[:] = 0
        self.reads[:] = 0
        self.clock = np.ones((self.blocks, self.warps), np.int64)
        self.knows = np.zeros((self.blocks, self.warps, self.warps), np.int64)
        self.floor = np.zeros(self.blocks, np.int64)

    def stamp(self, block, warp):
        return ((self.clock[block, warp] << AGENT_BITS) | warp).astype(np.uint32)

    def barrier(self, blocks):
        """Every warp of these blocks met: all that happened so far is ordered before all that follows."""
        latest = self.clock[blocks].max(axis=1)
        self.floor[blocks] = latest
        self.knows[blocks] = latest[:, None, None]
        self.clock[blocks] = latest[:, None] + 1

    def release(self, block, warp):
        """What `warp` passes on when it arrives somewhere: its knowledge and its own past."""
        known = self.knows[block, warp].copy()
        known[warp] = self.clock[block, warp]
        self.clock[block, warp] += 1
        return known

    def acquire(self, block, warp, known):
        """`warp` is now ordered after everything in `known`."""
        np.maximum(self.knows[block, warp], known, out=self.knows[block, warp])

    def read(self, rows, width, block, warp, instr, check_init=True):
        """Record reads of `width` bytes at row `rows` (in units of width, block offset included)."""
        span = width // self.granule
        seen = self.writes.reshape(-1, span)[rows]
        if check_init and not seen.all():
            return (seen == 0).any(1), "unwritten"
        if not self.enabled:
            return None, ""
        if ((seen >> AGENT_BITS) > self.floor[block][:, None]).any():
            bad = self._unordered(seen, block[:, None], warp[:, None]).any(1)
            if bad.any():
                return bad, "write"
        stride = self.granules // span
        local = rows - block * stride
        self.reads.reshape(-1, span)[(block * self.warps + warp) * stride + local] = self.clock[block, warp][:, None]
        return None, ""

    def write(self, rows, width, block, warp, pc, instr, pending=False):
        """Record writes; returns (bad mask, kind) when one races."""
        span = width // self.granule
        shadow = self.writes.reshape(-1, span)
        if not self.enabled:
            shadow[rows] = PENDING << AGENT_BITS if pending else 1 << AGENT_BITS
            return None, ""
        seen = shadow[rows]
        floor = self.floor[block]
        if ((seen >> AGENT_BITS) > floor[:, None]).any():
            bad = self._unordered(seen, block[:, None], warp[:, None]).any(1)
            if bad.any():
                return bad, "write"
        stride = self.granules // span
        local = rows - block * stride
        base = block * (self.warps * stride) + local
        others = self.reads.reshape(-1, span)[base[:, None] + np.arange(self.warps) * stride]
        late = others > floor[:, None, None]
        late[np.arange(len(rows)), warp] = False
        if late.any():
            bad = (others > self.knows[block, warp][:, :, None]) & late
            if bad.any():
                return bad.any((1, 2)), "read"
        mine = np.uint32(PENDING << AGENT_BITS) | warp.astype(np.uint32) if pending else self.stamp(block, warp)
        shadow[rows] = mine[:, None]
        self.write_pc.reshape(-1, span)[rows] = pc
        lost = shadow[rows] != mine[:, None]
        if lost.any():
            return lost.any(1), "same"
        return None, ""

    def land(self, rows, width, block, warp):
        """A pending copy has arrived: from now on it counts as a write by `warp`."""
        span = width // self.granule
        self.writes.reshape(-1, span)[rows] = (
            self.stamp(block, warp)[:, None] if self.enabled else np.uint32(1 << AGENT_BITS)
        )

    def _unordered(self, seen, block, warp):
        clock, agent = (seen >> AGENT_BITS).astype(np.int64), (seen & AGENT_MASK).astype(np.int64)
        pending = clock == PENDING
        agent = np.minimum(agent, self.warps - 1)
        return pending | ((agent != warp) & (clock > self.knows[block, warp, agent]))

    def blame(self, rows, width, block, bad, kind):
        """Which record the first bad element collided with: (instruction index or None, warp, still in flight)."""
        i = int(np.flatnonzero(bad)[0])
        span = width // self.granule
        if kind == "read":
            stride = self.granules // span
            local = rows[i] - block[i] * stride
            who = self.reads.reshape(-1, span)[(block[i] * self.warps + np.arange(self.warps)) * stride + local]
            return i, None, np.flatnonzero((who > self.floor[block[i]]).any(1)).tolist(), False
        seen = self.writes.reshape(-1, span)[rows[i]]
        last = int(seen.max())
        pc = int(self.write_pc.reshape(-1, span)[rows[i]].max())
        return i, pc, [last & AGENT_MASK], (last >> AGENT_BITS) == PENDING


def fault(detector, rows, width, block, warp, bad, kind, program, instr, address):
    """Turn a finding into the exception that explains it."""
    i, pc, warps, in_flight = detector.blame(rows, width, block, bad, kind)
    who = f"block {int(block[i])}, warp {int(warp[i])}"
    at = f"shared address {int(address[i]):#x} ({width} bytes)"
    there = f"line {program[pc].line}: {program[pc].text}" if pc is not None else "an earlier read"
    if in_flight:
        raise RaceFault(f"{who} touches {at} while the asynchronous copy of {there} has not been waited for", instr)
    if kind == "same":
        raise RaceFault(f"{who} and another warp write different values to {at} in the same instruction", instr)
    verb = {"write": "was written", "read": "was read"}[kind]
    raise RaceFault(f"{who} touches {at}, which {verb} by warp {warps} ({there}) with no barrier between", instr)
