"""Happens-before between warps over shared memory, by the granule of the kernel's narrowest shared access.

Every warp has a clock, and knows of every other warp the latest clock it is ordered after (a vector clock). A
granule of shared memory remembers its last write (clock and warp) and, per warp, its last read. An access
races when such a record by another warp is later than what the accessing warp knows of it. A block-wide barrier
lifts everyone's knowledge to now; `floor` is the time up to which all is known to all, so that the common case
is one comparison. Named barriers and mbarriers join vector clocks of those who take part.

Asynchronous work has two special marks. A clock of PENDING is on bytes that a copy in flight will write or that a
matrix product in flight may still read. Bytes that a bulk copy delivered belong to the agent `ASYNC`, whose clock
warps learn from the mbarrier that the copy completed on, and from nothing else.

Proxies: `fenced` is, per warp, the clock up to which its ordinary writes are visible to asynchronous readers.
"""

import numpy as np

from .errors import RaceFault

AGENT_BITS = 6
ASYNC = (1 << AGENT_BITS) - 1
AGENT_MASK = ASYNC
PENDING = (1 << (32 - AGENT_BITS)) - 1
ASYNC_START = 1 << 25  # asynchronous clocks lie above every floor, so that they never pass by it


class RaceDetector:
    def __init__(self, blocks, warps, shared_bytes, granule, enabled):
        if warps >= ASYNC:
            raise ValueError(f"{warps} warps a block, at most {ASYNC - 1}")
        self.enabled, self.granule, self.warps, self.blocks = enabled, granule, warps, blocks
        self.granules = shared_bytes // granule
        shape = blocks * self.granules
        self.writes = np.zeros(shape, np.uint32)
        self.reads = np.zeros(shape * warps if enabled else 0, np.uint32)
        self.write_pc = np.zeros(shape if enabled else 0, np.int32)
        self.reset()

    def reset(self):
        """Forget everything: new blocks start with unwritten shared memory."""
        self.writes[:] = 0
        self.reads[:] = 0
        self.clock = np.ones((self.blocks, self.warps), np.int64)
        # The last column is the asynchronous agent's.
        self.knows = np.zeros((self.blocks, self.warps, self.warps + 1), np.int64)
        self.floor = np.zeros(self.blocks, np.int64)
        self.fenced = np.zeros((self.blocks, self.warps), np.int64)
        self.async_clock = np.full(self.blocks, ASYNC_START, np.int64)

    def stamp(self, block, warp):
        return ((self.clock[block, warp] << AGENT_BITS) | warp).astype(np.uint32)

    # --- what orders warps ---------------------------------------------------------------------------------------

    def barrier(self, blocks):
        """Every warp of these blocks met: all that happened so far is ordered before all that follows."""
        latest = self.clock[blocks].max(axis=1)
        self.floor[blocks] = latest
        known_async = self.knows[blocks, :, -1].max(axis=1)
        self.knows[blocks] = latest[:, None, None]
        self.knows[blocks, :, -1] = known_async[:, None]
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

    def fence_proxy(self, block, warp):
        """A proxy fence by these warps: ordinary writes they made or know of become visible to async readers."""
        known = self.knows[block, warp][:, :-1].copy()
        known[np.arange(len(warp)), warp] = self.clock[block, warp]
        np.maximum.at(self.fenced, block, known)
        self.clock[block, warp] += 1

    # --- accesses ------------------------------------------------------------------------------------------------

    def read(self, rows, width, block, warp, check_init=True, asynchronous=False):
        """Record reads of `width` bytes at `rows` (in units of width, the block's offset included).

        Returns (mask of bad elements or None, what is wrong). Asynchronous reads stay PENDING until `finish_reads`.
        """
        span = width // self.granule
        seen = self.writes.reshape(-1, span)[rows]
        if check_init and not seen.all():
            return (seen == 0).any(1), "unwritten"
        if not self.enabled:
            return None, ""
        bad = self._unordered(seen, block, warp)
        if bad is not None:
            return bad, "write"
        if asynchronous:
            agent = (seen & AGENT_MASK).astype(np.int64)
            visible = self.fenced[block[:, None], np.minimum(agent, self.warps - 1)]
            bad = ((agent != ASYNC) & ((seen >> AGENT_BITS) > visible)).any(1)
            if bad.any():
                return bad, "proxy"
        now = PENDING if asynchronous else self.clock[block, warp][:, None]
        self.reads.reshape(-1, span)[self._read_rows(rows, span, block, warp)] = now
        return None, ""

    def finish_reads(self, rows, width, block, warp):
        """Asynchronous reads have completed: from now on they are reads that this warp has made."""
        if self.enabled:
            span = width // self.granule
            at = self._read_rows(rows, span, block, warp)
            self.reads.reshape(-1, span)[at] = self.clock[block, warp][:, None]

    def resume_reads(self, rows, width, block, warp):
        """Mark reads that are still in flight again, after others of the same bytes finished."""
        if self.enabled:
            span = width // self.granule
            self.reads.reshape(-1, span)[self._read_rows(rows, span, block, warp)] = PENDING

    def write(self, rows, width, block, warp, pc, pending=False):
        """Record writes; returns (mask of bad elements or None, what is wrong)."""
        span = width // self.granule
        shadow = self.writes.reshape(-1, span)
        if not self.enabled:
            shadow[rows] = np.uint32((PENDING if pending else 1) << AGENT_BITS)
            return None, ""
        bad = self._unordered(shadow[rows], block, warp)
        if bad is not None:
            return bad, "write"
        bad = self._unordered_reads(rows, span, block, warp)
        if bad is not None:
            return bad, "read"
        stamps = self.stamp(block, warp)
        if pending:
            stamps = np.uint32(PENDING << AGENT_BITS) | warp.astype(np.uint32)
        shadow[rows] = stamps[:, None]
        self.write_pc.reshape(-1, span)[rows] = pc
        lost = (shadow[rows] != stamps[:, None]).any(1)
        return (lost, "same") if lost.any() else (None, "")

    def land(self, rows, width, block, warp):
        """A pending copy has arrived, or a synchronising store happened: it counts as a write by `warp` now."""
        span = width // self.granule
        stamps = self.stamp(block, warp)[:, None] if self.enabled else np.uint32(1 << AGENT_BITS)
        self.writes.reshape(-1, span)[rows] = stamps

    def deliver(self, rows, width, block):
        """A bulk copy has arrived in one block: its bytes belong to the asynchronous agent. Returns its clock."""
        span = width // self.granule
        clock = self.async_clock[block] if self.enabled else 1
        self.async_clock[block] += 1
        self.writes.reshape(-1, span)[rows] = np.uint32(int(clock) << AGENT_BITS | ASYNC)
        return int(clock)

    def _read_rows(self, rows, span, block, warp):
        stride = self.granules // span
        return (block * self.warps + warp) * stride + rows - block * stride

    def _unordered(self, seen, block, warp):
        """Mask of rows whose last write the warp isn't ordered after, or None."""
        if not ((seen >> AGENT_BITS) > self.floor[block][:, None]).any():
            return None
        clock, agent = (seen >> AGENT_BITS).astype(np.int64), (seen & AGENT_MASK).astype(np.int64)
        column = np.where(agent == ASYNC, self.warps, agent)
        late = clock > self.knows[block[:, None], warp[:, None], column]
        bad = ((clock == PENDING) | (late & (agent != warp[:, None]))).any(1)
        return bad if bad.any() else None

    def _unordered_reads(self, rows, span, block, warp):
        stride = self.granules // span
        base = block * (self.warps * stride) + rows - block * stride
        others = self.reads.reshape(-1, span)[base[:, None] + np.arange(self.warps) * stride]
        late = others > self.floor[block][:, None, None]
        if not late.any():
            return None
        late &= others > self.knows[block, warp][:, : self.warps, None]
        mine = others[np.arange(len(rows)), warp] == PENDING
        late[np.arange(len(rows)), warp] = mine
        bad = late.any((1, 2))
        return bad if bad.any() else None

    # --- explaining ----------------------------------------------------------------------------------------------

    def explain(self, rows, width, block, warp, bad, kind, program, instr, address):
        """The exception for a finding: who collided with whom, at which bytes."""
        i = int(np.flatnonzero(bad)[0])
        span = width // self.granule
        who = f"block {int(block[i])} of the group, warp {int(warp[i])}"
        at = f"shared address {int(address[i]):#x} ({width} bytes)"
        if kind == "same":
            return RaceFault(
                f"{who} and another warp write different values to {at} in this instruction", instr
            )
        if kind == "read":
            stride = self.granules // span
            local = rows[i] - block[i] * stride
            seen = self.reads.reshape(-1, span)[
                (block[i] * self.warps + np.arange(self.warps)) * stride + local
            ]
            if (seen == PENDING).any():
                return RaceFault(f"{who} overwrites {at} while a wgmma in flight may still read it", instr)
            readers = np.flatnonzero((seen > self.floor[block[i]]).any(1)).tolist()
            return RaceFault(
                f"{who} writes {at}, which warp {readers} has read with no barrier between", instr
            )
        last = int(self.writes.reshape(-1, span)[rows[i]].max())
        there = program[int(self.write_pc.reshape(-1, span)[rows[i]].max())]
        there = f"line {there.line}: {there.text}"
        if kind == "proxy":
            return RaceFault(
                f"{at} was written by {there}; no fence.proxy.async makes that visible here", instr
            )
        if last >> AGENT_BITS == PENDING:
            return RaceFault(f"{who} touches {at} while the copy of {there} has not been waited for", instr)
        if last & AGENT_MASK == ASYNC:
            return RaceFault(f"{who} touches {at} without having waited for the mbarrier of {there}", instr)
        return RaceFault(
            f"{who} touches {at}, written by warp {last & AGENT_MASK} ({there}), no barrier between", instr
        )
