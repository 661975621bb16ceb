// Which rows, columns and expert a tile of the result has, and where its rows belong.
#pragma once

#include "moe_experts/moe_experts.h"
#include "nemo/warpgroup.h"

namespace nemo::moe_experts {

// Rows of an expert from a tile's first one on.
struct Place {
  int64_t first, end, column;
  int expert;

  NEMO_DEVICE bool has_rows() const { return first < end; }
};

// The tiles of a block that have rows, in turn. What the tables say of a tile is asked for when the
// one before is given out, and has arrived when it is needed.
template <int kColumns>
class Tiles {
 public:
  NEMO_DEVICE Tiles(const Product& p, int64_t block, int64_t blocks)
      : across_(across(p)), count_(count(p)), blocks_(blocks), index_(block) {
    ask(p);
  }

  // Below 2^31, as run_product sees to: divisions in 64 bits would be calls.
  static NEMO_HD int64_t count(const Product& p) { return p.tiles * across(p); }

  // False when there are no more; tiles without an expert (-1) are the last.
  NEMO_DEVICE bool next(const Product& p, Place& at) {
    do {
      if (expert_ < 0 || expert_ >= p.experts) return false;
      at = {row_, smaller<int64_t>(p.offsets[expert_], p.rows), column_, expert_};
      index_ += blocks_;
      ask(p);
    } while (at.first < 0 || !at.has_rows());
    return true;
  }

 private:
  static NEMO_HD uint32_t across(const Product& p) {
    return (uint32_t(p.columns) + kColumns - 1) / kColumns;
  }

  NEMO_DEVICE void ask(const Product& p) {
    expert_ = -1;
    if (index_ >= count_) return;
    const uint32_t tile = index_ / across_;
    column_ = index_ % across_ * kColumns;
    expert_ = p.tile_expert[tile];
    row_ = p.tile_row[tile];
  }

  uint32_t across_, count_, blocks_, index_, column_ = 0;
  int32_t expert_, row_ = 0;
};

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
