// Which weights meet which rows, and codes made numbers.
//
// E2M1's magnitude bits become the low exponent bits and the leading significand bit of a 16-bit
// float. That value is 2^-126 (bfloat16) or 2^-14 (float16) too small; the block scale is multiplied
// by 2^119 or 2^7 first, and the 2^7 that are left join the global scale. Every factor and product
// is exact.
#pragma once

#include "nemo/warp.h"
#include "w4a16/w4a16.h"

namespace nemo::w4a16 {

inline constexpr float kLeftOver = 128.0f;

// Where a block works; expert < 0: nowhere.
struct Place {
  int64_t expert, first, end, row_block;
};

// Of tiles of kColumns rows of x by kRows rows of the weight. A grid has fewer than 2^31 blocks:
// divisions in 64 bits would be calls.
template <int kColumns, int kRows>
NEMO_HD Place place(const Product& p, uint32_t block) {
  const uint32_t row_blocks = ceil_div(p.width, kRows), tile = block / row_blocks;
  Place at{0, int64_t{tile} * kColumns, p.rows, block % row_blocks};
  if (p.part != Part::kPlain) {
    at.expert = p.tile_expert[tile];
    at.first = p.tile_row[tile];
    if (at.expert < 0 || at.expert >= p.experts) return {-1, 0, 0, 0};
    at.end = smaller<int64_t>(p.offsets[at.expert], p.rows);
  }
  return at;
}

// The same by a warp, all lanes of which must call. Without a table tile i begins at row i, if that is
// an expert's first or a multiple of kColumns rows behind it.
template <int kColumns, int kRows>
NEMO_HD Place place(const Product& p, uint32_t block, int thread) {
  if (p.part == Part::kPlain || p.tile_expert) return place<kColumns, kRows>(p, block);
  const uint32_t row_blocks = ceil_div(p.width, kRows);
  const int64_t row = block / row_blocks;
  PerLane<int32_t> before;  // experts whose rows end before this one
  each_lane(thread, [&](int lane) {
    before[lane] = 0;
    for (int64_t e = lane; e < p.experts; e += kLanes) before[lane] += p.offsets[e] <= row;
  });
  const int64_t expert = sum(before);
  if (expert == p.experts) return {-1, 0, 0, 0};
  const int64_t first = expert > 0 ? p.offsets[expert - 1] : 0;
  if ((row - first) % kColumns != 0) return {-1, 0, 0, 0};
  return {expert, row, smaller<int64_t>(p.offsets[expert], p.rows), block % row_blocks};
}

// The slot of a row; -1 where it has none.
NEMO_HD int64_t slot_of(const Product& p, const Place& at, int64_t row) {
  if (row < 0 || row >= at.end) return -1;
  if (p.part == Part::kPlain) return row;
  const int64_t slot = p.order[row];
  return slot < p.rows ? slot : -1;
}

// A block scale, the low byte, twice in T.
template <class T>
NEMO_HD uint32_t block_scale(uint32_t code) {
  const float s = to_float(e4m3{uint8_t(code)}) * (std::is_same_v<T, bf16> ? 0x1p119f : 0x1p7f);
  return pack_halves<T>(s, s);
}

// Nibbles i and i + 4 of a word as 16-bit floats, too small by the power of two above.
template <class T>
NEMO_HD uint32_t widened(uint32_t word, int i) {
  constexpr bool kBrain = std::is_same_v<T, bf16>;
  constexpr int kTop = kBrain ? 8 : 11;  // where the magnitude's highest bit goes
  constexpr uint32_t kMagnitude = kBrain ? 0x01C001C0u : 0x0E000E00u;
  const int up = kTop - (4 * i + 2);
  return (word << (12 - 4 * i) & 0x80008000u) |
         ((up >= 0 ? word << up : word >> -up) & kMagnitude);
}

}  // namespace nemo::w4a16
