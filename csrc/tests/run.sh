#!/usr/bin/env bash
# Builds and runs the C++ tests: run.sh [plain] [asan] [tsan] [aarch64]. Called by the Makefile.
set -euo pipefail
cd "$(dirname "$0")/../.."
fuzz_seconds=${FASTATTN_FUZZ_SECONDS:-10}

build() { # name, then arguments of CMake
  local tree=build/tests-$1
  shift
  cmake -S csrc/tests -B "$tree" -G Ninja -DCMAKE_MAKE_PROGRAM="$(command -v ninja)" "$@" >/dev/null
  cmake --build "$tree" -- --quiet
}

each_isa() { # name, then a prefix (an emulator)
  local binary=build/tests-$1/abi_tests isas
  shift
  isas=$("$@" "$binary" --isas)
  for isa in ${isas//,/ }; do
    FASTATTN_CPU_ISA=$isa "$@" "$binary"
  done
}

plain() {
  build plain
  each_isa plain
}

# libFuzzer where clang brings it, the seeded random driver elsewhere.
asan() {
  build asan -DFASTATTN_SANITIZE=address,undefined
  FASTATTN_TEST_CASES=40 each_isa asan
  if command -v clang++ >/dev/null && echo 'int main(){}' | clang++ -fsanitize=fuzzer-no-link,address -x c++ - -o /dev/null 2>/dev/null; then
    build fuzz -DCMAKE_CXX_COMPILER=clang++ -DFASTATTN_SANITIZE=address,undefined -DFASTATTN_LIBFUZZER=ON
    build/tests-fuzz/fuzz_problem -max_total_time="$fuzz_seconds" -max_len=400 -seed=1 -print_final_stats=0 -verbosity=0
  fi
  build/tests-asan/fuzz_problem "$fuzz_seconds"
}

tsan() {
  build tsan -DFASTATTN_SANITIZE=thread
  FASTATTN_TEST_CASES=30 build/tests-tsan/abi_tests threads plain
}

aarch64() {
  local compiler=aarch64-linux-gnu-g++ root=/usr/aarch64-linux-gnu
  if ! command -v "$compiler" >/dev/null || ! command -v qemu-aarch64 >/dev/null; then
    echo "skipped: $compiler and qemu-aarch64 are needed (Debian: g++-aarch64-linux-gnu, qemu-user)"
    return
  fi
  build aarch64 -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER="$compiler"
  FASTATTN_TEST_CASES=40 each_isa aarch64 qemu-aarch64 -cpu max -L "$root"
}

for name in "$@"; do
  echo "-- $name"
  "$name"
done
