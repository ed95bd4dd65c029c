"""The CPU kernels' grid in one run: `python benchmarks/bench_cpu.py`, options as of `fastattn bench`."""

import sys

from fastattn.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "--backend", "cpu", *sys.argv[1:]]))
