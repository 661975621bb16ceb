// Which rows, columns and expert a tile of the result has, and where its rows belong.
#pragma once

#include "moe_experts/moe_experts.h"
#include "nemo/warpgroup.h"

namespace nemo::moe_experts {

// Rows of an expert from a tile's first one on; without any: nothing to do. Tiles without an expert
// (-1) are the last.
struct Place {
  int64_t first, end, column;
  int expert;

  NEMO_DEVICE bool has_rows() const { return first < end; }
};

NEMO_DEVICE Place place(const Product& p, int64_t index, int tile_columns) {
  const int64_t across = ceil_div(p.columns, tile_columns), tile = index / across;
  const int expert = p.tile_expert[tile];
  if (expert < 0 || expert >= p.experts) return {0, 0, 0, -1};
  const int64_t first = p.tile_row[tile];
  const int64_t end = smaller<int64_t>(p.offsets[expert], p.rows);
  if (first < 0) return {0, 0, 0, 0};
  return {first, end, index % across * tile_columns, expert};
}

// The slot of a row; negative where it has none.
NEMO_DEVICE int64_t slot_of(const Product& p, const Place& at, int64_t row) {
  if (row >= at.end) return -1;
  const int64_t slot = p.order[row];
  return slot < p.rows ? slot : -1;
}

NEMO_DEVICE int64_t token_of(const Product& p, int64_t slot) {
  // In 32 bits, which suffice: a division in 64 would be a call.
  return p.tokens == nullptr ? int32_t(uint32_t(slot) / uint32_t(p.top_k)) : p.tokens[slot];
}

}  // namespace nemo::moe_experts
