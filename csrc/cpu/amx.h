// The instructions of AMX: eight tile registers of 16 rows of 64 bytes, and a product of two of them added to
// a third. Where the compiler's target has none the same in software, one function for each instruction, so
// that everything above this file can be tested on any machine.
//
// Tile registers are numbers in the instruction, hence macros with literal arguments. Strides are in 32-bit
// units.
#ifndef FASTATTN_CPU_AMX_H
#define FASTATTN_CPU_AMX_H

#include "vec.h"

namespace fastattn::FASTATTN_ISA_NS {

constexpr int kTileRows = 16;  // and 32-bit units of a row
static_assert(W == kTileRows, "a row of a tile is a vector");

struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64, "what ldtilecfg reads");

#if defined(__AMX_TILE__) && defined(__AMX_BF16__)

FASTATTN_ALWAYS void load_tile_config(const TileConfig& config) {
  asm volatile("ldtilecfg %0" ::"m"(config));
}
FASTATTN_ALWAYS void release_tiles() { asm volatile("tilerelease"); }

// Memory clobbers: a tile is read and written behind the compiler's back.
#define FASTATTN_TILE_ZERO(t) asm volatile("tilezero %%tmm" #t::)
#define FASTATTN_TILE_LOAD(t, from, stride) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #t::"r"(from), "r"((int64_t)(stride) * 4) : "memory")
#define FASTATTN_TILE_STORE(t, to, stride) \
  asm volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"(to), "r"((int64_t)(stride) * 4) : "memory")
#define FASTATTN_TILE_DOT(c, a, b) asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c::)

#else

struct Tiles {
  vu rows[8][kTileRows];
  bool configured;  // the instructions fault without
};
inline Tiles& tiles() {
  static thread_local Tiles registers;
  return registers;
}
inline Tiles& configured_tiles() {
  if (!tiles().configured) __builtin_trap();
  return tiles();
}
inline void load_tile_config(const TileConfig& config) {
  for (int t = 0; t < 8; ++t)
    if (config.palette != 1 || config.row_bytes[t] != 64 || config.rows[t] != 16) __builtin_trap();
  __builtin_memset(tiles().rows, 0, sizeof tiles().rows);
  tiles().configured = true;
}
inline void release_tiles() { tiles().configured = false; }
inline void tile_zero(int t) { __builtin_memset(configured_tiles().rows[t], 0, sizeof(vu) * kTileRows); }
inline void tile_load(int t, const void* from, int64_t stride) {
  for (int i = 0; i < kTileRows; ++i)
    configured_tiles().rows[t][i] = load_as<vu>((const uint32_t*)from + i * stride);
}
inline void tile_store(int t, void* to, int64_t stride) {
  for (int i = 0; i < kTileRows; ++i) store((uint32_t*)to + i * stride, configured_tiles().rows[t][i]);
}
// As Intel's manual has it: even and odd products are summed apart, then both are added to c.
inline void tile_dot(int c, int a, int b) {
  Tiles& t = configured_tiles();
  for (int i = 0; i < kTileRows; ++i) {
    vf even = {}, odd = {};
    for (int k = 0; k < kTileRows; ++k) {
      const uint32_t pair = t.rows[a][i][k];
      even += as_float(splat(pair << 16)) * as_float(t.rows[b][k] << 16);
      odd += as_float(splat(pair & 0xFFFF0000u)) * as_float(t.rows[b][k] & 0xFFFF0000u);
    }
    t.rows[c][i] = as_uint((vf)t.rows[c][i] + (even + odd));
  }
}
#define FASTATTN_TILE_ZERO(t) tile_zero(t)
#define FASTATTN_TILE_LOAD(t, from, stride) tile_load(t, from, stride)
#define FASTATTN_TILE_STORE(t, to, stride) tile_store(t, to, stride)
#define FASTATTN_TILE_DOT(c, a, b) tile_dot(c, a, b)

#endif

// Tile registers in the one shape that is used here, for as long as a worker runs.
class TileRegisters {
 public:
  TileRegisters() { load_tile_config(TileConfig()); }
  ~TileRegisters() { release_tiles(); }
  TileRegisters(const TileRegisters&) = delete;
};

}  // namespace fastattn::FASTATTN_ISA_NS

#endif  // FASTATTN_CPU_AMX_H
