// Three warpgroups per block. The first brings 64 columns of 256 rows of x (tokens gathered by copies
// of 16 bytes, other rows in a box) and of 128 rows of the weight, codes and block scales as they
// are. The other two make numbers of 64 rows of the weight each, in registers, and multiply: the
// weight is the left operand, rows of x are columns of the sums. While one decodes, the other's
// products run. A tile with no more than 128 rows of x takes products of half the width.
#pragma once

#include "nemo/gather.h"
#include "nemo/vec.h"
#include "nemo/wgmma.h"
#include "w4a16/weights.cuh"

namespace nemo::w4a16 {

template <class T, Part kPart>
struct WideKernel {
  using Params = Product;
  static constexpr bool kGather = kPart == Part::kUp;
  static constexpr int kDepth = 64, kWarpgroups = 3, kGroupRows = 64, kGroups = 2;
  static constexpr int kRows = kGroups * kGroupRows, kTiles = kRows / 16;  // of the weight
  static constexpr int kCodes = 512, kScales = 64;  // bytes of a tile's 64 columns
  static constexpr int kBytesX = kWide * kBoxBytes;
  static constexpr int kBringers = 2 * kTiles;  // threads: the first four of each warp
  static constexpr int kStages = (232448 - 1024) / (kBytesX + kTiles * (kCodes + kScales));

  struct Shared {
    alignas(1024) uint8_t x[kStages][kBytesX];
    alignas(128) uint8_t codes[kStages][kTiles][kCodes];
    alignas(128) uint8_t scales[kStages][kTiles][kScales];
    Barrier full[kStages], empty[kStages];
  };

  static NEMO_DEVICE void setup(Shared& shared) {
    for (int i = 0; i < kStages; ++i) {
      shared.full[i].init(kBringers + (kGather ? kWarpgroup : 0));
      shared.empty[i].init(kGroups * kWarpgroup / kLanes);
    }
  }

  static NEMO_DEVICE void run(const Params& p, int64_t block, int64_t blocks, int which,
                              Shared& shared) {
    if (which == 0) {
      give_registers<88>();
      bring(p, block, blocks, shared);
    } else {
      take_registers<208>();
      multiply_all(p, block, blocks, which - 1, shared);
    }
  }

  // Below 2^31, as run_wide sees to.
  static NEMO_HD int64_t places(const Params& p) {
    const int64_t tiles = kPart == Part::kPlain ? ceil_div(p.rows, kWide) : p.tiles;
    return tiles * ceil_div(p.width, kRows);
  }

 private:
  static NEMO_DEVICE void bring(const Params& p, int64_t block, int64_t blocks, Shared& shared) {
    constexpr int64_t kSize = sizeof(T);
    if (!kGather && !brings_some()) return;
    Turn<kStages> turn;
    Gather<kWide> tokens;
    Copies<kStages> copies;
    PerThread<const uint8_t*> from;
    for (int64_t index = block; index < places(p); index += blocks) {
      const Place at = place<kWide, kRows>(p, uint32_t(index));
      if (at.expert < 0) break;  // so have all tiles behind
      if (at.first >= at.end) continue;
      each_thread([&](int t) { from[t] = source(p, at, t); });
      if constexpr (kGather) {
        tokens.point([&](int line) {
          const int64_t slot = slot_of(p, at, at.first + line);
          if (slot < 0) return static_cast<const T*>(nullptr);  // its sums are not stored
          const int64_t token = uint32_t(slot) / uint32_t(p.top_k);
          return static_cast<const T*>(p.x) + offset(token, p.x_row);
        });
      }
      for (int k = 0; k < p.depth; k += kDepth, turn.next()) {
        shared.empty[turn.stage].wait(turn.parity ^ 1);
        each_thread([&](int t) {
          if (brings_some(t)) bring_some(p, at, k, t, from[t], turn.stage, shared);
          if constexpr (kGather) tokens.copy(t, shared.x[turn.stage], k * kSize, p.depth * kSize);
        });
        if constexpr (kGather) copies.asked(shared.full);
      }
      if constexpr (kGather) copies.finish(shared.full);
    }
  }

  static NEMO_DEVICE bool brings_some(int t) { return t % kLanes < 4; }
  static NEMO_DEVICE bool brings_some() {
#ifdef USE_CUDA
    return brings_some(threadIdx.x % kWarpgroup);
#else
    return true;
#endif
  }

  // Which tile of codes (0 to 7) or of scales (8 to 15) a thread brings.
  static NEMO_DEVICE int piece_of(int t) { return t / kLanes * 4 + t % 4; }

  // Where its first 64 columns lie; null where the weight has no such tile.
  static NEMO_DEVICE const uint8_t* source(const Params& p, const Place& at, int t) {
    const int piece = piece_of(t), tile = piece % kTiles;
    const int64_t row = p.first_tile + at.row_block * kTiles + tile;
    if (row >= p.weight_tiles) return nullptr;
    const int64_t unit = (at.expert * p.weight_tiles + row) * ceil_div(p.depth, kDepth);
    return piece < kTiles ? p.codes + unit * kCodes : p.scales + unit * kScales;
  }

  static NEMO_DEVICE void bring_some(const Params& p, const Place& at, int k, int t,
                                     const uint8_t* from, int stage, Shared& shared) {
    Barrier& full = shared.full[stage];
    const int piece = piece_of(t), tile = piece % kTiles;
    const int bytes = from == nullptr ? 0 : piece < kTiles ? kCodes : kScales;
    const bool rows = !kGather && piece == 0;
    full.expect(bytes + (rows ? kBytesX : 0));
    if (rows) load_box(shared.x[stage], p.x_map, full, k, int(at.first), 0);
    if (bytes == 0) return;
    uint8_t* to = piece < kTiles ? shared.codes[stage][tile] : shared.scales[stage][tile];
    copy_bulk(to, from + int64_t(k / kDepth) * bytes, bytes, full);
  }

  static NEMO_DEVICE void multiply_all(const Params& p, int64_t block, int64_t blocks, int group,
                                       Shared& shared) {
    Turn<kStages> turn;
    for (int64_t index = block; index < places(p); index += blocks) {
      const Place at = place<kWide, kRows>(p, uint32_t(index));
      if (at.expert < 0) break;
      if (at.first >= at.end) continue;
      PerThread<Sums<kWide>> sums;
      if (at.end - at.first > kWide / 2) {
        multiply_tile<kWide>(p, turn, group, shared, sums);
        store<kWide>(p, at, group, sums);
      } else {
        multiply_tile<kWide / 2>(p, turn, group, shared, sums);
        store<kWide / 2>(p, at, group, sums);
      }
    }
  }

  template <int kColumns>
  static NEMO_DEVICE void multiply_tile(const Params& p, Turn<kStages>& turn, int group,
                                        Shared& shared, PerThread<Sums<kWide>>& sums) {
    for (int k = 0; k < p.depth; k += kDepth, turn.next()) {
      shared.full[turn.stage].wait(turn.parity);
      PerThread<FragmentA> weights[kDepth / 16];
      each_thread([&](int t) {
        const int tile = group * (kGroupRows / 16) + t / kLanes;
        decode(shared.codes[turn.stage][tile], shared.scales[turn.stage][tile], t, weights);
      });
      const uint32_t x = shared_address(shared.x[turn.stage]);
      begin_products();
#pragma unroll
      for (int i = 0; i < kDepth / 16; ++i) {
        multiply<T, kColumns>(sums, weights[i], operand(x + kProductBytes * i), k > 0 || i > 0);
      }
      commit_products();
      wait_products<0>();
      release(shared.empty[turn.stage]);
    }
    settle<kColumns>(sums);
  }

  // Rows g and g + 8 of a tile, columns 2 t, 2 t + 1, 2 t + 8, 2 t + 9 of each of its four blocks:
  // two bytes of a block. Those of two blocks are mixed, so that nibbles i and i + 4 are neighbours
  // of one row.
  static NEMO_DEVICE void decode(const uint8_t* codes, const uint8_t* scales, int thread,
                                 PerThread<FragmentA> (&out)[kDepth / 16]) {
    const int g = thread % kLanes / 4, t = thread % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = g + 8 * h;
      uint32_t scale;
      std::memcpy(&scale, scales + 4 * row, sizeof scale);
#pragma unroll
      for (int block = 0; block < 4; block += 2) {
        uint16_t one, two;
        std::memcpy(&one, codes + 32 * row + 8 * block + 2 * t, sizeof one);
        std::memcpy(&two, codes + 32 * row + 8 * block + 8 + 2 * t, sizeof two);
        const uint32_t word = mixed(one, two);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t s = block_scale<T>(scale >> 8 * (block + i / 2));
          out[block + i / 2][thread].pair[i % 2 * 2 + h] =
              multiply_halves<T>(widened<T>(word, i), s);
        }
      }
    }
  }

  // Bytes 0 of both, then bytes 1.
  static NEMO_DEVICE uint32_t mixed(uint32_t one, uint32_t two) {
#ifdef USE_CUDA
    return __byte_perm(one, two, 0x5140);
#else
    return (one & 0xFF) | (two & 0xFF) << 8 | (one & 0xFF00) << 8 | (two & 0xFF00) << 16;
#endif
  }

  // The sums have rows of the weight as rows; results have them side by side. Blocks of 8 by 8 are
  // turned, then four threads trade until each has 8 columns, 16 bytes, of a row.
  template <int kColumns>
  static NEMO_DEVICE void store(const Params& p, const Place& at, int group,
                                PerThread<Sums<kWide>>& sums) {
    const float scale = p.global_scale[at.expert] * kLeftOver;
    PerThread<int64_t> slot[kColumns / 16];  // asked for together
    each_thread([&](int t) {
#pragma unroll
      for (int c = 0; c < kColumns; c += 16) slot[c / 16][t] = slot_of(p, at, row_of(at, c, t));
    });
#pragma unroll
    for (int c = 0; c < kColumns; c += 16) {
      PerThread<uint32_t> word[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        each_thread([&](int t) {
          const float* sum = sums[t].value + (c / 8 + i / 2) * 4 + i % 2 * 2;
          word[i][t] = pack_halves<T>(result(sum[0] * scale), result(sum[1] * scale));
        });
        turn_8_by_8(word[i]);
      }
      transpose(word);
      each_thread([&](int t) {
        const int lane = t % kLanes;
        const int64_t n = at.row_block * kRows + group * kGroupRows + t / kLanes * 16 + lane % 2 * 8;
        if (slot[c / 16][t] < 0 || n >= p.width) return;
        const int64_t row = kPart == Part::kSlots ? slot[c / 16][t] : row_of(at, c, t);
        const int64_t to = offset(row, p.width, n, 1);
        store_words(static_cast<T*>(p.out) + to, word[0][t], word[1][t], word[2][t], word[3][t]);
      });
    }
  }

  // Of the 16 rows from c on, the one a thread stores.
  static NEMO_DEVICE int64_t row_of(const Place& at, int c, int t) {
    return at.first + c + t % 4 / 2 * 8 + t % kLanes / 4;
  }

  static NEMO_DEVICE float result(float v) { return kPart == Part::kUp ? squared_relu(v) : v; }
};

template <class T, Part kPart>
const char* run_wide(Product& p, Stream stream) {
  using Kernel = WideKernel<T, kPart>;
  const int64_t places = Kernel::places(p);
  if (places >= int64_t{1} << 31) return "expected fewer tiles";
  const char* refused = prepare_warpgroups<Kernel>();
  if (refused == nullptr && !Kernel::kGather) {
    const int64_t row = p.x_row * int64_t(sizeof(T));
    refused = make_tensor_map<T>({p.x, {p.depth, p.rows, 1}, {row, p.rows * row}, kWide}, p.x_map);
  }
  if (refused == nullptr) launch_warpgroups<Kernel>(p, places, stream);
  return refused;
}

}  // namespace nemo::w4a16
