"""Groups of asynchronous operations, as cp.async, wgmma and bulk copies commit and wait for them, per thread."""

import numpy as np


class Groups:
    """How many groups each thread has committed; operations carry the number of the group they belong to."""

    def __init__(self, machine):
        self.machine = machine
        machine.hooks_reset.append(self.reset)
        self.reset()

    def reset(self):
        self.committed = np.zeros(self.machine.threads, np.int64)

    def commit(self):
        self.committed[self.machine.active()] += 1

    def current(self, threads):
        """The group that operations issued now will belong to."""
        return self.committed[threads].copy()

    def done(self, threads, group, pending):
        """Which operations a wait by the active threads covers that leaves `pending` groups in flight (None: all)."""
        active = self.machine.mask_array()[threads]
        return active if pending is None else active & (group < self.committed[threads] - pending)


class PendingReads:
    """Reads of shared memory (16 bytes each) that go on until their group has been waited for."""

    def __init__(self, machine, groups):
        self.machine, self.groups, self.flying = machine, groups, []
        machine.hooks_reset.append(self.flying.clear)

    def note(self, off, threads, instr):
        self.machine.shared.note_read(off, 16, threads, instr, asynchronous=True)
        self.flying.append((off, threads, self.groups.current(threads)))

    def wait(self, pending):
        m, races, kept = self.machine, self.machine.shared.races, []
        for off, threads, group in self.flying:
            done = self.groups.done(threads, group, pending)
            races.finish_reads(off[done] // 16, 16, m.block_of[threads[done]], m.warp_of[threads[done]])
            if not done.all():
                kept.append((off[~done], threads[~done], group[~done]))
        self.flying[:] = kept
        for off, threads, _ in kept:
            races.resume_reads(off // 16, 16, m.block_of[threads], m.warp_of[threads])
