// The tile instructions of AMX in plain C++, so that the code written for them is tested where there are none.
//
// Names and meaning are those of <immintrin.h>; what the processor would refuse ends the process with the reason. The
// arithmetic is the processor's: denormals count as zero, even and odd products are summed apart and added at the end.
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>

namespace trilevel {
namespace amx {

constexpr int TILES = 8, ROWS = 16, ROW_BYTES = 64;

struct Tile {
  int rows = 0, row_bytes = 0;
  uint8_t data[ROWS][ROW_BYTES] = {};
};

struct State {
  bool is_configured = false;
  Tile tiles[TILES];
};

inline State& state() {
  static thread_local State of_this_thread;
  return of_this_thread;
}

inline void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "AMX: %s\n", what);
  std::abort();
}

inline Tile& tile(int index) {
  require(state().is_configured, "a tile is used before _tile_loadconfig");
  require(index >= 0 && index < TILES, "there are eight tiles");
  Tile& found = state().tiles[index];
  require(found.rows > 0 && found.row_bytes > 0, "a tile is used that the configuration leaves empty");
  return found;
}

// 64 bytes: palette, start row, 14 reserved, bytes a row of tile 0..15 (16 bits each), rows of tile 0..15
inline void load_config(const void* config) {
  const uint8_t* bytes = static_cast<const uint8_t*>(config);
  require(bytes[0] == 1, "the palette is 1");
  require(bytes[1] == 0, "the start row is 0");
  for (int i = 2; i < 16; i++) require(bytes[i] == 0, "reserved bytes are 0");
  state() = State();
  for (int t = 0; t < 16; t++) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, bytes + 16 + 2 * t, 2);
    const int rows = bytes[48 + t];
    require(t < TILES || (rows == 0 && row_bytes == 0), "there are eight tiles");
    require(rows <= ROWS && row_bytes <= ROW_BYTES && row_bytes % 4 == 0, "a tile has at most 16 rows of 64 bytes");
    require((rows == 0) == (row_bytes == 0), "a tile has rows and columns, or neither");
    if (t < TILES) state().tiles[t].rows = rows, state().tiles[t].row_bytes = row_bytes;
  }
  state().is_configured = true;
}

inline void release() { state() = State(); }

inline void zero(int index) { std::memset(tile(index).data, 0, sizeof tile(index).data); }

inline void load(int index, const void* base, int64_t stride) {
  Tile& to = tile(index);
  zero(index);
  for (int r = 0; r < to.rows; r++) std::memcpy(to.data[r], static_cast<const uint8_t*>(base) + r * stride, to.row_bytes);
}

inline void store(int index, void* base, int64_t stride) {
  const Tile& from = tile(index);
  for (int r = 0; r < from.rows; r++) std::memcpy(static_cast<uint8_t*>(base) + r * stride, from.data[r], from.row_bytes);
}

inline float flushed(float x) { return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x; }

inline float float_at(const Tile& x, int row, int column) {
  float y;
  std::memcpy(&y, x.data[row] + 4 * column, 4);
  return y;
}

inline float bf16_at(const Tile& x, int row, int column) {
  uint16_t half;
  std::memcpy(&half, x.data[row] + 2 * column, 2);
  const uint32_t bits = uint32_t(half) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return flushed(y);
}

// to[m][n] += sum_k left[m][2k] * right[k][2n] + left[m][2k + 1] * right[k][2n + 1]
inline void multiply(int to_index, int left_index, int right_index) {
  require(to_index != left_index && to_index != right_index && left_index != right_index, "three different tiles");
  Tile& to = tile(to_index);
  const Tile &left = tile(left_index), &right = tile(right_index);
  require(left.rows == to.rows, "the left operand has the rows of the result");
  require(right.row_bytes == to.row_bytes, "the right operand has the columns of the result");
  require(left.row_bytes == 4 * right.rows, "the right operand has a row for each pair of the left one's columns");
  for (int m = 0; m < to.rows; m++)
    for (int n = 0; n < to.row_bytes / 4; n++) {
      float even = 0, odd = 0;
      for (int k = 0; k < right.rows; k++) {
        even = flushed(std::fma(bf16_at(left, m, 2 * k), bf16_at(right, k, 2 * n), even));
        odd = flushed(std::fma(bf16_at(left, m, 2 * k + 1), bf16_at(right, k, 2 * n + 1), odd));
      }
      const float total = flushed(flushed(float_at(to, m, n)) + flushed(even + odd));
      std::memcpy(to.data[m] + 4 * n, &total, 4);
    }
}

}  // namespace amx
}  // namespace trilevel

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) trilevel::amx::load_config(config)
#define _tile_release() trilevel::amx::release()
#define _tile_zero(tile) trilevel::amx::zero(tile)
#define _tile_loadd(tile, base, stride) trilevel::amx::load(tile, base, stride)
#define _tile_stored(tile, base, stride) trilevel::amx::store(tile, base, stride)
#define _tile_dpbf16ps(to, left, right) trilevel::amx::multiply(to, left, right)
