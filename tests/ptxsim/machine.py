"""The scheduler: all threads of a group of blocks run one program, vectorised, diverging by masks.

At every moment one set of threads (the mask) shares one program counter. The set with the smallest one runs next,
until it branches apart, waits, or reaches a place where others stand: that reconverges structured control flow.
A set that keeps jumping backwards while others could run is set aside for a while, so spin loops make progress.
Warp-wide instructions (.sync) wait until the warp's living threads have all arrived at them.
"""

from dataclasses import dataclass

import numpy as np

from . import instr as _handlers  # noqa: F401  (importing registers every instruction)
from .decode import bind
from .errors import Deadlock, PtxError, Timeout, UnsupportedInstruction
from .operands import Operands
from .parser import Not
from .report import Report
from .shared import SharedMemory
from .wgmma_registers import WgmmaRegisters

RUN, YIELDED, AT_BARRIER, AT_WARP, AT_MBARRIER, AT_REGISTERS, EXITED = range(7)
WAITS = {
    AT_BARRIER: "at a barrier",
    AT_WARP: "for the rest of its warp",
    AT_MBARRIER: "for an mbarrier phase",
    AT_REGISTERS: "for registers that others of their block would have to give",
}
RESCHEDULE = -1
SPIN_LIMIT = 16
NEVER = np.iinfo(np.int32).max


@dataclass(frozen=True)
class Options:
    """How strictly and for how long to run.

    detect_races: shared-memory race detection. check_uninitialised: a read of shared bytes nobody wrote is a fault.
    statistics: also count bank conflicts and global-memory sectors (slower). max_steps: instructions issued per
    group of blocks before Timeout. group_threads: how many threads run at once (speed and memory only).
    """

    detect_races: bool = True
    check_uninitialised: bool = True
    statistics: bool = False
    max_steps: int = 20_000_000
    group_threads: int = 4096


class Machine:
    """One group of `blocks` blocks of `kernel`, bound and ready to run any block indices of the grid."""

    def __init__(self, kernel, layout, blocks, block_dim, grid, memory, options, report=None):
        self.kernel, self.blocks, self.options, self.memory = kernel, blocks, options, memory
        self.block_dim, self.grid, self.layout = block_dim, grid, layout
        self.block_threads = int(np.prod(block_dim))
        self.warps = -(-self.block_threads // 32)
        self.padded = self.warps * 32
        self.threads = blocks * self.padded
        every = np.arange(self.threads)
        self.block_of, self.lane_of = every // self.padded, every % 32
        self.warp_of = every % self.padded // 32
        self.everyone = every
        self.specials = self._specials()
        self.operands = Operands(kernel, self.threads, layout.symbols, self.specials)
        self.shared = SharedMemory(self, layout.shared_size, layout.granule, options.detect_races)
        self.local = np.empty(self.threads * max(layout.local_size, 1), np.uint8)
        self.report = report or Report(kernel)
        self.hooks_exit, self.hooks_reset, self.hooks_stuck = [], [], []
        uses_wgmma = any(instr.op == "wgmma" for instr in kernel.instrs)
        self.wgmma_registers = WgmmaRegisters(self) if uses_wgmma else None
        self.code = self._bind()

    # --- what handlers use -------------------------------------------------------------------------------------

    def src(self, operand, typ, instr):
        return self.operands.src(operand, typ, instr)

    def dst(self, operand, typ, instr):
        return self.operands.dst(operand, typ, instr)

    def put(self, dst, values):
        """Assign to a register where threads are active."""
        if self.where is True:
            dst[...] = values
        else:
            np.copyto(dst, values, where=self.where)

    def active(self):
        """Indices of active threads."""
        if self._active is None:
            self._active = self.everyone if self.mask is True else np.flatnonzero(self.mask)
        return self._active

    def active_warps(self):
        """Global indices of warps with any active thread."""
        if self._warps is None:
            grid = (
                np.ones((self.blocks * self.warps,), bool)
                if self.mask is True
                else self.mask.reshape(-1, 32).any(1)
            )
            self._warps = np.flatnonzero(grid)
        return self._warps

    def set_mask(self, mask):
        self.mask = mask
        self.where = True
        if mask is not True and not (mask | self.gone).all():
            self.where = mask
        self._active = self._warps = None
        self._spans = {}

    def _whole(self, span):
        """Whether the mask holds all or none of the living threads of every warp (or warpgroup)."""
        if span not in self._spans:
            met = (self.mask | self.gone).reshape(-1, span).all(1)
            some = self.mask.reshape(-1, span).any(1)
            self._spans[span] = bool((met | ~some).all())
        return self._spans[span]

    def mask_array(self):
        return np.ones(self.threads, bool) if self.mask is True else self.mask

    def thread_name(self, t):
        bx, by, bz = self._unravel(int(self.block_ids[self.block_of[t]]), self.grid)
        x, y, z = self._unravel(int(t) % self.padded, self.block_dim)
        return f"block ({bx},{by},{bz}) thread ({x},{y},{z})"

    def park(self, threads, status, pc):
        """Active threads (a bool array) stop here and continue at pc once somebody sets their status to RUN."""
        self.status[threads] = status
        self.pcs[threads] = pc

    def converge(self, index, member=None, span=32):
        """For warp-wide instructions: restrict the mask to warps whose living threads have all arrived here.

        `member`: the instruction's membermask values, if only the lanes in it must meet. `span`: 128 for warpgroups.
        Returns False when none is complete, so that the caller must return RESCHEDULE.
        """
        if self.where is True or (not self.warps_wait and self._whole(span)):
            return True
        waiting = (self.status == AT_WARP) & (self.pcs == index)
        here = self.mask | waiting
        met = here | self.gone
        if member is not None:
            lanes = np.uint32(1) << self.lane_of.astype(np.uint32)
            masks = np.broadcast_to(member, self.threads)
            wanted = np.bitwise_or.reduce(np.where(here, masks, np.uint32(0)).reshape(-1, 32), axis=1)
            met = met | ((np.repeat(wanted, 32) & lanes) == 0)
        whole = met.reshape(-1, span).all(1)
        ready = here & np.repeat(whole, span)
        partial = here & ~ready
        if partial.any():
            self.park(partial, AT_WARP, index)
            self.warps_wait = True
        elif waiting.any():
            self.warps_wait = bool(((self.status == AT_WARP) & ~ready).any())
        if not ready.any():
            return False
        self.status[ready] = RUN
        if partial.any() or waiting.any():
            self.set_mask(ready)
        return True

    # --- running -----------------------------------------------------------------------------------------------

    def run(self, block_ids):
        """Run the blocks with these linear indices (at most `blocks` of them) to their end."""
        self._start(np.asarray(block_ids))
        limit_steps = self.options.max_steps
        while True:
            pc = self._schedule()
            if pc is None:
                return self.report
            self._run_from(pc)
            if self.steps > limit_steps:
                raise Timeout(f"more than {limit_steps} instructions", self.kernel.instrs[pc])

    def _run_from(self, pc):
        code, start = self.code, pc
        try:
            while True:
                action = code[pc]()
                pc += 1
                if action is None:
                    if pc == self.limit:
                        self.pcs[self.mask_array()] = pc
                        return
                    continue
                self._account(start, pc)
                if action == RESCHEDULE:
                    start = pc
                    return
                if action < pc:
                    self.spins += 1
                    if self.spins > SPIN_LIMIT and self._set_aside(action):
                        start = pc
                        return
                    if self.steps > self.options.max_steps:
                        raise Timeout(
                            f"more than {self.options.max_steps} instructions", self.kernel.instrs[pc - 1]
                        )
                pc = start = action
                if pc >= self.limit:
                    self.pcs[self.mask_array()] = pc
                    return
        except PtxError:
            raise
        except Exception as e:
            raise PtxError(
                f"the simulator failed here: {type(e).__name__}: {e}", self.kernel.instrs[pc]
            ) from e
        finally:
            if pc != start:
                self._account(start, pc)

    def _account(self, start, end):
        self.steps += end - start
        self.report.issued(start, end, len(self.active_warps()))

    def _set_aside(self, target):
        if self.limit == NEVER and not (self.status == YIELDED).any():
            self.spins = 0
            return False
        mask = self.mask_array()
        self.status[mask] = YIELDED
        self.pcs[mask] = target
        return True

    def _schedule(self):
        runnable = self.status == RUN
        if not runnable.any():
            yielded = self.status == YIELDED
            if yielded.any():
                self.status[yielded] = RUN
                runnable = yielded
            elif (self.status == EXITED).all():
                return None
            elif sum(hook() for hook in self.hooks_stuck):  # every hook runs
                return self._schedule()
            else:
                self._deadlock()
        pcs = self.pcs[runnable]
        pc = int(pcs.min())
        mask = runnable & (self.pcs == pc)
        others = pcs[pcs != pc]
        self.limit = int(others.min()) if others.size else NEVER
        self.spins = 0
        self.set_mask(True if mask.all() else mask)
        return pc

    def _deadlock(self):
        lines = []
        for status, text in WAITS.items():
            for pc in np.unique(self.pcs[self.status == status]):
                who = np.flatnonzero((self.status == status) & (self.pcs == pc))
                instr = self.kernel.instrs[max(int(pc) - (status == AT_BARRIER), 0)]
                lines.append(
                    f"{len(who)} threads wait {text} at line {instr.line}: {instr.text}; first {self.thread_name(who[0])}"
                )
        raise Deadlock("no thread can run:\n  " + "\n  ".join(lines))

    def exit_threads(self):
        mask = self.mask_array()
        self.status[mask] = EXITED
        self.gone |= mask
        for hook in self.hooks_exit:
            hook()
        return RESCHEDULE

    def _start(self, block_ids):
        self.block_ids = np.resize(block_ids, self.blocks)
        present = np.arange(self.blocks) < len(block_ids)
        inside = np.tile(np.arange(self.padded) < self.block_threads, self.blocks) & np.repeat(
            present, self.padded
        )
        self.gone = ~inside
        self.status = np.where(inside, RUN, EXITED).astype(np.int8)
        self.pcs = np.zeros(self.threads, np.int32)
        self.steps = self.spins = 0
        self.warps_wait = False
        self.operands.reset()
        self.shared.reset()
        self.local[:] = 0xFF
        for hook in self.hooks_reset:
            hook()
        for axis, values in zip("xyz", self._unravel(self.block_ids, self.grid), strict=True):
            self.specials[f"%ctaid.{axis}"][:] = np.repeat(values, self.padded)
        self.report.blocks += len(block_ids)

    # --- building ----------------------------------------------------------------------------------------------

    def _bind(self):
        failures, code = {}, []
        for index, instr in enumerate(self.kernel.instrs):
            try:
                code.append(self._bind_one(instr, index))
            except UnsupportedInstruction as e:
                failures.setdefault(instr.name, e)
            except (KeyError, ValueError, IndexError, TypeError, AttributeError) as e:
                e = UnsupportedInstruction(f"operands not understood ({type(e).__name__}: {e})", instr)
                failures.setdefault(instr.name, e)
        if len(failures) == 1:
            raise next(iter(failures.values()))
        if failures:
            raise UnsupportedInstruction(
                f"{len(failures)} instructions:\n" + "\n".join(map(str, failures.values()))
            )
        code.append(self.exit_threads)
        return code

    def _bind_one(self, instr, index):
        from .instr.control import bind_branch

        if instr.op == "bra":
            return bind_branch(self, instr, index)
        body = bind(self, instr, index)
        if self.wgmma_registers is not None and instr.op != "wgmma":
            body = self.wgmma_registers.watch(instr, body)
        if instr.guard is None:
            return body
        negate = isinstance(instr.guard, Not)
        array = self.src(instr.guard.reg if negate else instr.guard, "pred", instr)
        return self._guarded(body, array, negate, index)

    def _guarded(self, body, array, negate, index):
        def run():
            wanted = ~array if negate else array
            mask = wanted.copy() if self.mask is True else wanted & self.mask
            if not mask.any():
                return None
            whole = self.mask
            if mask.all():
                return body()
            self.set_mask(mask)
            action = body()
            if action is None:
                if self.mask is mask:
                    self.set_mask(whole)
                else:  # converge() left threads behind or picked some up
                    self.set_mask(self.mask_array() | ((True if whole is True else whole) & ~wanted))
                return None
            # Some of the guarded threads left (exit, barrier): the others continue behind this instruction.
            rest = (np.ones(self.threads, bool) if whole is True else whole) & ~wanted
            self.pcs[rest] = index + 1
            return action

        return run

    def _specials(self):
        n = self.threads
        inside = np.tile(np.arange(self.padded), self.blocks)
        tid = self._unravel(inside, self.block_dim)
        u32 = np.uint32
        s = {"%laneid": self.lane_of.astype(u32), "%warpid": self.warp_of.astype(u32)}
        for axis, t, size, grid in zip("xyz", tid, self.block_dim, self.grid, strict=True):
            s[f"%tid.{axis}"] = t.astype(u32)
            s[f"%ntid.{axis}"] = np.full(n, size, u32)
            s[f"%ctaid.{axis}"] = np.zeros(n, u32)
            s[f"%nctaid.{axis}"] = np.full(n, grid, u32)
            s[f"%cluster_ctaid.{axis}"] = np.zeros(n, u32)
            s[f"%cluster_nctaid.{axis}"] = np.ones(n, u32)
        lane = self.lane_of.astype(np.uint64)
        one = np.uint64(1)
        s["%lanemask_eq"] = (one << lane).astype(u32)
        s["%lanemask_lt"] = ((one << lane) - one).astype(u32)
        s["%lanemask_le"] = ((one << (lane + one)) - one).astype(u32)
        s["%lanemask_gt"] = ~s["%lanemask_le"]
        s["%lanemask_ge"] = ~s["%lanemask_lt"]
        for name, value in (("%cluster_ctarank", 0), ("%cluster_nctarank", 1), ("%smid", 0), ("%nsmid", 1)):
            s[name] = np.full(n, value, u32)
        for name in ("%clock", "%clock_hi", "%globaltimer_lo", "%gridid"):
            s[name] = np.zeros(n, u32)
        for name in ("%clock64", "%globaltimer"):
            s[name] = np.zeros(n, np.uint64)
        s["%dynamic_smem_size"] = np.full(n, self.layout.dynamic_size, u32)
        s["%total_smem_size"] = np.full(n, self.layout.shared_size, u32)
        return s

    @staticmethod
    def _unravel(linear, dims):
        x, y, _ = dims
        return linear % x, linear // x % y, linear // (x * y)
