// Three warpgroups per block. The first brings operands: the rows of tokens, gathered, by copies of
// 16 bytes, everything else by the tensor memory accelerator. The other two multiply, 64 rows each;
// where an expert's last tile has no more than 64, the second has nothing to do. While they write a
// tile out, operands of the next arrive.
//
// Blocks stay; tiles go round among them, neighbours in the result's columns first, so that the
// rows of a tile are read from memory once.
#pragma once

#include "moe_experts/moe_experts.h"
#include "nemo/vec.h"
#include "nemo/wgmma.h"

namespace nemo::moe_experts {

template <class T, int kColumns, Part kPart, bool kAcross>
struct ProductKernel {
  using Params = Product;
  static constexpr bool kGather = kPart != Part::kSlots;
  static constexpr int kDepth = kBoxBytes / sizeof(T);  // of a stage
  static constexpr int kGroupRows = 64, kGroups = kRows / kGroupRows, kWarpgroups = 1 + kGroups;
  static constexpr int kBytesA = kRows * kBoxBytes, kBytesB = kColumns * kBoxBytes;
  static constexpr int kStages = smaller(5, (232448 - 1024) / (kBytesA + kBytesB));
  static constexpr int kBehind = 2;  // stages whose copies are under way
  static_assert(kBehind + 2 <= kStages && (!kAcross || kColumns % kDepth == 0));

  struct Shared {
    alignas(1024) uint8_t a[kStages][kBytesA];
    alignas(1024) uint8_t b[kStages][kBytesB];
    Barrier full[kStages], empty[kStages];
  };

  static NEMO_DEVICE void setup(Shared& shared) {
    for (int i = 0; i < kStages; ++i) {
      shared.full[i].init(kGather ? 1 + kWarpgroup : 1);
      shared.empty[i].init(kGroups * kWarpgroup / kLanes);
    }
  }

  static NEMO_DEVICE void run(const Params& p, int64_t block, int64_t blocks, int which,
                              Shared& shared) {
    if (which == 0) {
      give_registers<56>();
      bring(p, block, blocks, shared);
    } else {
      take_registers<224>();
      multiply_all(p, block, blocks, which - 1, shared);
    }
  }

 private:
  // A tile of the result; without rows: nothing to do.
  struct Place {
    int64_t first, end, column;
    int expert;

    NEMO_DEVICE bool has_rows() const { return first < end; }
  };

  static NEMO_DEVICE int64_t places(const Params& p) {
    return p.tiles * ceil_div(p.columns, kColumns);
  }

  static NEMO_DEVICE Place place(const Params& p, int64_t index) {
    const int64_t across = ceil_div(p.columns, kColumns), tile = index / across;
    const int expert = p.tile_expert[tile];
    if (expert < 0 || expert >= p.experts) return {0, 0, 0, 0};
    const int64_t first = p.tile_row[tile];
    const int64_t end = smaller(smaller<int64_t>(p.offsets[expert], p.rows), first + kRows);
    if (first < 0) return {0, 0, 0, 0};
    return {first, end, index % across * kColumns, expert};
  }

  // The slot of a row; -1 where it has none.
  static NEMO_DEVICE int64_t slot_of(const Params& p, const Place& at, int64_t row) {
    if (row >= at.end) return -1;
    const int64_t slot = p.order[row];
    return slot < p.rows ? slot : -1;
  }

  static NEMO_DEVICE int64_t token_of(const Params& p, int64_t slot) {
    if (slot < 0) return 0;
    // In 32 bits, which suffice: a division in 64 would be a call.
    return p.tokens == nullptr ? uint32_t(slot) / uint32_t(p.top_k) : p.tokens[slot];
  }

  // Which stage is next, and the parity of its barriers' phase.
  struct Turn {
    int stage = 0, parity = 0;

    NEMO_DEVICE void next() {
      if (++stage == kStages) stage = 0, parity ^= 1;
    }
  };

  static NEMO_DEVICE void bring(const Params& p, int64_t block, int64_t blocks, Shared& shared) {
    // A thread copies piece t % 8 of rows t / 8, t / 8 + 16, ...
    constexpr int kPieces = kBoxBytes / 16, kApart = kWarpgroup / kPieces, kEach = kRows / kApart;
    Turn turn, copied;
    int under_way = 0;
    for (int64_t index = block; index < places(p); index += blocks) {
      const Place at = place(p, index);
      if (!at.has_rows()) continue;
      PerThread<const uint8_t*> rows[kEach];
      if constexpr (kGather) {
        each_thread([&](int t) {
#pragma unroll
          for (int i = 0; i < kEach; ++i) {
            const int64_t slot = slot_of(p, at, at.first + t / kPieces + kApart * i);
            const auto* row = static_cast<const T*>(p.a) + offset(token_of(p, slot), p.a_row);
            rows[i][t] = slot < 0 ? nullptr : reinterpret_cast<const uint8_t*>(row);
          }
        });
      }
      for (int64_t k = 0; k < p.depth; k += kDepth, turn.next()) {
        uint8_t* a = shared.a[turn.stage];
        shared.empty[turn.stage].wait(turn.parity ^ 1);
        each_thread([&](int t) {
          if (t == 0) bring_boxes(p, at, int(k), turn.stage, shared);
          if constexpr (kGather) {
            const int piece = t % kPieces;
            const int64_t byte = k * int64_t(sizeof(T)) + 16 * piece;
#pragma unroll
            for (int i = 0; i < kEach; ++i) {
              const int line = t / kPieces + kApart * i;
              if (rows[i][t] == nullptr) continue;  // its sums are not stored
              copy_16(a + kBoxBytes * line + 16 * (piece ^ line % 8), rows[i][t] + byte,
                      byte < p.depth * int64_t(sizeof(T)));
            }
          }
        });
        if constexpr (kGather) {
          commit_copies();
          if (under_way < kBehind) {
            ++under_way;
          } else {
            wait_copies<kBehind>();
            hand_over(copied, shared);
          }
        }
      }
    }
    if constexpr (kGather) {
      wait_copies<0>();
      for (; under_way > 0; --under_way) hand_over(copied, shared);
    }
  }

  static NEMO_DEVICE void hand_over(Turn& copied, Shared& shared) {
    publish_stores();
    each_thread([&](int) { shared.full[copied.stage].arrive(); });
    copied.next();
  }

  static NEMO_DEVICE void bring_boxes(const Params& p, const Place& at, int k, int stage,
                                      Shared& shared) {
    Barrier& full = shared.full[stage];
    full.expect(kBytesB + (kGather ? 0 : kBytesA));
    if constexpr (!kGather) load_box(shared.a[stage], p.a_map, full, k, int(at.first), 0);
    const int column = int(p.first + at.column);
    if constexpr (kAcross) {
#pragma unroll
      for (int c = 0; c < kColumns; c += kDepth) {
        load_box(shared.b[stage] + c * kBoxBytes, p.b_map, full, column + c, k, at.expert);
      }
    } else {
      load_box(shared.b[stage], p.b_map, full, k, column, at.expert);
    }
  }

  static NEMO_DEVICE void multiply_all(const Params& p, int64_t block, int64_t blocks, int group,
                                       Shared& shared) {
    Turn turn;
    for (int64_t index = block; index < places(p); index += blocks) {
      Place at = place(p, index);
      if (!at.has_rows()) continue;
      at.first += group * kGroupRows;
      if (at.has_rows()) {
        PerThread<Sums<kColumns>> sums;
        multiply_tile(p, turn, group, shared, sums);
        store(p, at, sums);
      } else {
        for (int64_t k = 0; k < p.depth; k += kDepth, turn.next()) {
          shared.full[turn.stage].wait(turn.parity);
          release(shared.empty[turn.stage]);
        }
      }
    }
  }

  // A stage is released when the products after its own have been asked for.
  static NEMO_DEVICE void multiply_tile(const Params& p, Turn& turn, int group, Shared& shared,
                                        PerThread<Sums<kColumns>>& sums) {
    int before = turn.stage;
    for (int64_t k = 0; k < p.depth; k += kDepth, turn.next()) {
      shared.full[turn.stage].wait(turn.parity);
      multiply_stage(shared, turn.stage, group, sums, k > 0);
      wait_products<1>();
      if (k > 0) release(shared.empty[before]);
      before = turn.stage;
    }
    wait_products<0>();
    release(shared.empty[before]);
  }

  static NEMO_DEVICE void multiply_stage(Shared& shared, int stage, int group,
                                         PerThread<Sums<kColumns>>& sums, bool adds) {
    const uint32_t a = shared_address(shared.a[stage]) + group * kGroupRows * kBoxBytes;
    const uint32_t b = shared_address(shared.b[stage]);
    begin_products();
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      const int along = k * int(sizeof(T));
      const uint64_t right = kAcross ? operand(b + k * kBoxBytes, kDepth * kBoxBytes)
                                     : operand(b + along);
      multiply<T, kAcross>(sums, operand(a + along), right, adds || k > 0);
    }
    commit_products();
  }

  // Each warp for itself: it knows of its own products only that they are complete.
  static NEMO_DEVICE void release(Barrier& empty) {
    each_thread([&](int t) {
      if (t % kLanes == 0) empty.arrive();
    });
  }

  // Four threads hold 8 columns of a row, two each. They trade until each has 8 columns, 16 bytes,
  // of every 32.
  static NEMO_DEVICE void store(const Params& p, const Place& at, PerThread<Sums<kColumns>>& sums) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      PerThread<int64_t> slot, start;  // of the row in the result
      PerThread<float> dweight;
      each_thread([&](int t) {
        const int64_t r = at.first + t / kLanes * 16 + t % kLanes / 4 + 8 * half;
        slot[t] = slot_of(p, at, r);
        start[t] = offset(kPart == Part::kSlots ? slot[t] : r, p.columns, at.column, 1);
        dweight[t] = 0.0f;
      });
#pragma unroll
      for (int c = 0; c < kColumns; c += 32) {
        PerThread<uint32_t> pair[4];
        if constexpr (kPart == Part::kDHidden) {
          each_thread([&](int t) {
            Vec<T, 8> hidden{};
            if (is_stored(p, at, slot[t], c + 8 * (t % 4))) {
              hidden = load_vec<true, 8>(
                  static_cast<const T*>(p.hidden) + start[t] + c + 8 * (t % 4), 8);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) pair[i][t] = hidden.word[i];
          });
          transpose(pair);
        }
        each_thread([&](int t) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (c + 8 * i >= kColumns) continue;
            const float* sum = sums[t].value + (c / 8 + i) * 4 + 2 * half;
            if constexpr (kPart != Part::kDHidden) {
              pair[i][t] = result(sum[0], sum[1]);
            } else if (is_stored(p, at, slot[t], c + 8 * i)) {
              pair[i][t] = gradient(sum, pair[i][t], p.weights[slot[t]], dweight[t]);
            }
          }
        });
        transpose(pair);
        each_thread([&](int t) {
          const int column = c + 8 * (t % 4);
          if (!is_stored(p, at, slot[t], column)) return;
          store_packed(static_cast<T*>(p.out) + start[t] + column,
                       Vec<T, 8>{pair[0][t], pair[1][t], pair[2][t], pair[3][t]});
        });
      }
      if constexpr (kPart == Part::kDHidden) store_partial(p, at, slot, dweight);
    }
  }

  static NEMO_DEVICE bool is_stored(const Params& p, const Place& at, int64_t slot, int column) {
    return slot >= 0 && column < kColumns && at.column + column < p.columns;
  }

  static NEMO_DEVICE uint32_t result(float low, float high) {
    if constexpr (kPart == Part::kUp) {
      low = low < 0.0f ? 0.0f : low;  // NaN stays
      high = high < 0.0f ? 0.0f : high;
      low *= low;
      high *= high;
    }
    return pack_halves<T>(low, high);
  }

  static NEMO_DEVICE uint32_t gradient(const float* sum, uint32_t hidden, float weight,
                                       float& dweight) {
    const float low = low_half<T>(hidden), high = high_half<T>(hidden);
    dweight = fma(low, sum[0], dweight);
    dweight = fma(high, sum[1], dweight);
    return pack_halves<T>(2.0f * sqrtf(low) * (weight * sum[0]),
                          2.0f * sqrtf(high) * (weight * sum[1]));
  }

  // Adds up the four threads of a row, in the same order in all of them.
  static NEMO_DEVICE void store_partial(const Params& p, const Place& at, PerThread<int64_t>& slot,
                                        PerThread<float>& dweight) {
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
      PerThread<uint32_t> other;
      each_thread([&](int t) { other[t] = float_to_bits(dweight[t]); });
      exchange(other, bit);
      each_thread([&](int t) { dweight[t] += bits_to_float(other[t]); });
    }
    each_thread([&](int t) {
      if (t % 4 == 0 && slot[t] >= 0) {
        p.partial[offset(at.column / kColumns, p.rows, slot[t], 1)] = dweight[t];
      }
    });
  }

  // Value i of thread j of four becomes value j of thread i.
  static NEMO_DEVICE void transpose(PerThread<uint32_t> (&value)[4]) {
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i & bit) continue;
        PerThread<uint32_t> sent;
        each_thread([&](int t) { sent[t] = t & bit ? value[i][t] : value[i + bit][t]; });
        exchange(sent, bit);
        each_thread([&](int t) { (t & bit ? value[i][t] : value[i + bit][t]) = sent[t]; });
      }
    }
  }
};

template <class T, int kColumns, Part kPart, bool kAcross>
const char* run_product(Product& p, const Operands& operands, Stream stream) {
  using Kernel = ProductKernel<T, kColumns, kPart, kAcross>;
  const char* refused = nullptr;
  if (!Kernel::kGather) {
    TensorShape a = operands.a;
    a.lines = kRows;
    refused = make_tensor_map<T>(a, p.a_map);
  }
  TensorShape b = operands.b;
  b.lines = kAcross ? Kernel::kDepth : kColumns;
  if (refused == nullptr) refused = make_tensor_map<T>(b, p.b_map);
  if (refused == nullptr) {
    launch_warpgroups<Kernel>(p, p.tiles * ceil_div(p.columns, kColumns), stream);
  }
  return refused;
}

}  // namespace nemo::moe_experts
