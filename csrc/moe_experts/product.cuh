// Three warpgroups per block. The first brings operands: the rows of tokens, gathered, by copies of
// 16 bytes, everything else by the tensor memory accelerator. The other two multiply, 64 rows each;
// where an expert's last tile has no more than 64, the second has nothing to do. While they write a
// tile out, operands of the next arrive.
//
// Blocks stay; tiles go round among them, neighbours in the result's columns first, so that the
// rows of a tile are read from memory once.
#pragma once

#include "moe_experts/store.cuh"
#include "nemo/gather.h"
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
  static_assert(!kAcross || kColumns % kDepth == 0);

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
  static NEMO_DEVICE void bring(const Params& p, int64_t block, int64_t blocks, Shared& shared) {
    constexpr int64_t kSize = sizeof(T);
    if (!kGather && !is_first()) return;
    Turn<kStages> turn;
    Gather<kRows> tokens;
    Copies<kStages> copies;
    Tiles<kColumns> tiles(p, block, blocks);
    for (Place at; tiles.next(p, at);) {
      if constexpr (kGather) {
        tokens.point([&](int line) {
          const int64_t slot = slot_of(p, at, at.first + line);
          if (slot < 0) return static_cast<const T*>(nullptr);  // its sums are not stored
          return static_cast<const T*>(p.a) + offset(token_of(p, slot), p.a_row);
        });
      }
      for (int64_t k = 0; k < p.depth; k += kDepth, turn.next()) {
        shared.empty[turn.stage].wait(turn.parity ^ 1);
        each_thread([&](int t) {
          if (t == 0) bring_boxes(p, at, int(k), turn.stage, shared);
          if constexpr (kGather) tokens.copy(t, shared.a[turn.stage], k * kSize, p.depth * kSize);
        });
        if constexpr (kGather) copies.asked(shared.full);
      }
      if constexpr (kGather) copies.finish(shared.full);
    }
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
    Turn<kStages> turn;
    Tiles<kColumns> tiles(p, block, blocks);
    for (Place at; tiles.next(p, at);) {
      at.first += group * kGroupRows;
      if (at.has_rows()) {
        Store<T, kColumns, kPart> store;
        PerThread<Sums<kColumns>> sums;
        multiply_tile(p, turn, group, shared, sums, [&] { store.prepare(p, at); });
        store.store(p, at, sums);
      } else {
        for (int64_t k = 0; k < p.depth; k += kDepth, turn.next()) {
          shared.full[turn.stage].wait(turn.parity);
          release(shared.empty[turn.stage]);
        }
      }
    }
  }

  // meanwhile() runs while the first products do.
  template <class F>
  static NEMO_DEVICE void multiply_tile(const Params& p, Turn<kStages>& turn, int group,
                                        Shared& shared, PerThread<Sums<kColumns>>& sums,
                                        F meanwhile) {
    if constexpr (sizeof(T) == 1) {
      // Products of E4M3 keep 14 bits of a sum: every stage is added in float32. Meanwhile the
      // other warpgroup multiplies.
      each_thread([&](int t) {
#pragma unroll
        for (int i = 0; i < kColumns / 2; ++i) sums[t].value[i] = 0.0f;
      });
      for (int64_t k = 0; k < p.depth; k += kDepth, turn.next()) {
        PerThread<Sums<kColumns>> part;
        shared.full[turn.stage].wait(turn.parity);
        multiply_stage(shared, turn.stage, group, part, false);
        if (k == 0) meanwhile();
        wait_products<0>();
        settle<kColumns>(part);
        release(shared.empty[turn.stage]);
        each_thread([&](int t) {
#pragma unroll
          for (int i = 0; i < kColumns / 2; ++i) sums[t].value[i] += part[t].value[i];
        });
      }
    } else {
      // A stage is released when the products after its own have been asked for.
      int before = turn.stage;
      for (int64_t k = 0; k < p.depth; k += kDepth, turn.next()) {
        shared.full[turn.stage].wait(turn.parity);
        multiply_stage(shared, turn.stage, group, sums, k > 0);
        if (k == 0) meanwhile();
        wait_products<1>();
        if (k > 0) release(shared.empty[before]);
        before = turn.stage;
      }
      wait_products<0>();
      settle<kColumns>(sums);
      release(shared.empty[before]);
    }
  }

  static NEMO_DEVICE void multiply_stage(Shared& shared, int stage, int group,
                                         PerThread<Sums<kColumns>>& sums, bool adds) {
    const uint32_t a = shared_address(shared.a[stage]) + group * kGroupRows * kBoxBytes;
    const uint32_t b = shared_address(shared.b[stage]);
    begin_products();
#pragma unroll
    for (int along = 0; along < kBoxBytes; along += kProductBytes) {
      const int across = along / int(sizeof(T)) * kBoxBytes;
      const uint64_t right = kAcross ? operand(b + across, kDepth * kBoxBytes) : operand(b + along);
      multiply<T, kAcross>(sums, operand(a + along), right, adds || along > 0);
    }
    commit_products();
  }
};

template <class T, int kColumns, Part kPart, bool kAcross>
const char* run_product(Product& p, const Operands& operands, Stream stream) {
  using Kernel = ProductKernel<T, kColumns, kPart, kAcross>;
  const int64_t tiles = Tiles<kColumns>::count(p);
  if (tiles >= int64_t{1} << 31) return "expected fewer tiles";
  const char* refused = prepare_warpgroups<Kernel>();
  if (refused == nullptr && !Kernel::kGather) {
    TensorShape a = operands.a;
    a.lines = kRows;
    refused = make_tensor_map<T>(a, p.a_map);
  }
  TensorShape b = operands.b;
  b.lines = kAcross ? Kernel::kDepth : kColumns;
  if (refused == nullptr) refused = make_tensor_map<T>(b, p.b_map);
  if (refused == nullptr) launch_warpgroups<Kernel>(p, tiles, stream);
  return refused;
}

}  // namespace nemo::moe_experts
