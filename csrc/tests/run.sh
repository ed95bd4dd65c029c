#!/usr/bin/env bash
# Builds and runs the C++ tests: run.sh [plain] [asan] [tsan] [aarch64_short] [aarch64]. Called by the Makefile,
# which has built the library before.
set -euo pipefail
cd "$(dirname "$0")/../.."
fuzz_seconds=${FASTATTN_FUZZ_SECONDS:-10}
fuzz_seed=${FASTATTN_FUZZ_SEED:-$(date +%s)} # new problems in each run

build() { # name, then arguments of CMake
  local tree=build/tests-$1
  shift
  cmake -S csrc/tests -B "$tree" -G Ninja -DCMAKE_MAKE_PROGRAM="$(command -v ninja)" "$@" >/dev/null
  cmake --build "$tree" -- --quiet
}

isas() { # binary, then a prefix (an emulator): the instruction sets of its library that this machine has
  local list
  list=$("${@:2}" "$1" --isas)
  echo "${list//,/ }"
}

each_isa() { # binary
  for isa in $(isas "$1"); do
    FASTATTN_CPU_ISA=$isa "$1"
  done
}

# The kernels as they are installed, on all instruction sets.
plain() {
  cmake --build build/native --target fastattn_cpu_poisoned -- --quiet
  local library=("$PWD"/build/native/libfastattn_cpu_poisoned.*)
  build plain -DFASTATTN_LIBRARY="${library[0]}"
  each_isa build/tests-plain/abi_tests
}

# What sanitizers see does not need every instruction set: the best one of this machine, and those above it
# emulated. libFuzzer where clang brings it; the seeded driver everywhere.
asan() {
  local above
  above=$(emulated)
  build asan -DFASTATTN_SANITIZE=address,undefined -DFASTATTN_EMULATE_WIDE="${above:+ON}" \
    -DFASTATTN_ISAS="$(best);$above"
  FASTATTN_TEST_CASES=40 each_isa build/tests-asan/abi_tests
  fuzz
  if echo 'int main(){}' | clang++ -fsanitize=fuzzer-no-link,address -x c++ - -o /dev/null 2>/dev/null; then
    build fuzz -DCMAKE_CXX_COMPILER=clang++ -DFASTATTN_SANITIZE=address,undefined -DFASTATTN_LIBFUZZER=ON \
      -DFASTATTN_ISAS="$(best)"
    mkdir -p build/tests-fuzz/corpus
    build/tests-asan/fuzz_problem --corpus build/tests-fuzz/corpus
    if ! build/tests-fuzz/fuzz_problem -max_total_time="$fuzz_seconds" -max_len=400 -seed="$fuzz_seed" \
      -artifact_prefix=build/tests-fuzz/ build/tests-fuzz/corpus 2>build/tests-fuzz/log; then
      tail -n 60 build/tests-fuzz/log
      return 1
    fi
    echo "libFuzzer: nothing found in $fuzz_seconds s"
  else
    echo "libFuzzer: skipped, clang++ is not there or has no fuzzer runtime"
  fi
}

# Each instruction set gets its share of the time, and problems of its own.
fuzz() {
  local all seed=$fuzz_seed
  read -ra all <<<"$(isas build/tests-asan/abi_tests)"
  for isa in "${all[@]}"; do
    FASTATTN_CPU_ISA=$isa build/tests-asan/fuzz_problem $((fuzz_seconds / ${#all[@]} + 1)) $((seed++))
  done
}

tsan() {
  build tsan -DFASTATTN_SANITIZE=thread -DFASTATTN_ISAS="$(best)"
  FASTATTN_TEST_CASES=20 build/tests-tsan/abi_tests threads neighbours plain_shapes
}

best() { # of the library that plain built its tests for
  local all
  all=$(isas build/tests-plain/abi_tests)
  echo "${all##* }"
}

emulated() { # what this machine runs in software only
  case $(best) in
  avx2) echo "emulated512;emulated512_bf16;emulated512_amx" ;;
  avx512*) echo "emulated512_bf16;emulated512_amx" ;;
  esac
}

aarch64() { emulate_aarch64; }
aarch64_short() { FASTATTN_TEST_CASES=20 emulate_aarch64 random hidden_dropout rotary; }

emulate_aarch64() { # names of tests; none: all, for minutes
  local compiler=aarch64-linux-gnu-g++ binary=build/tests-aarch64/abi_tests
  local emulator=(qemu-aarch64 -cpu max -L /usr/aarch64-linux-gnu)
  if ! command -v "$compiler" >/dev/null || ! command -v "${emulator[0]}" >/dev/null; then
    echo "skipped: $compiler and ${emulator[0]} are needed (Debian: g++-aarch64-linux-gnu, qemu-user)"
    return
  fi
  build aarch64 -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER="$compiler"
  for isa in $(isas "$binary" "${emulator[@]}"); do
    FASTATTN_TEST_CASES=${FASTATTN_TEST_CASES:-40} FASTATTN_CPU_ISA=$isa "${emulator[@]}" "$binary" "$@"
  done
}

for name in "$@"; do
  echo "-- $name"
  "$name"
done
