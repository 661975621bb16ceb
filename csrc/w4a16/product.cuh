// A block multiplies 32 rows of a weight by kColumns rows of x. Its warps take the 64-column units
// of the weight in turn; a lane owns a row of x and a block of 16 weights in two rows, so that it
// needs two block scales per unit and its share of x is 32 neighbouring bytes.
//
// The order of k inside a matrix product is free, and here is that of the nibbles.
#pragma once

#include "nemo/vec.h"
#include "w4a16/weights.cuh"

namespace nemo::w4a16 {

// kEarly: the kernel before may still run, and writes x alone. Weights are loaded before the wait.
template <class T, int kColumns, bool kEarly>
struct ProductKernel {
  using Params = Product;
  static constexpr int kWarps = 4, kRowTiles = 2, kPieces = kColumns / 8;
  static constexpr int kAhead = kColumns == 32 ? 1 : 2;  // units loaded before they are used
  static constexpr int kThreads = kWarps * kLanes;
  static constexpr int kMinBlocks = kColumns == 8 ? 7 : kColumns == 16 ? 5 : 4;
  static constexpr bool kReduces = true;

  struct Shared {
    Place at;
    float sum[kWarps][16 * kRowTiles][kColumns + 1];
  };

  struct Words {
    uint32_t x, y;
  };

  struct Loaded {
    Words codes[kRowTiles][2];      // rows g and g + 8 of a tile
    uint32_t scales[kRowTiles];     // of the same, in the low bytes
    Vec<T, 8> x[kPieces][2];
  };

  static NEMO_HD void walk(const Params& p, int64_t block, int thread, Shared& shared) {
    const Place at = place<kColumns, 16 * kRowTiles>(p, uint32_t(block), thread);
    if (thread == 0) shared.at = at;
    if (!kEarly && p.part == Part::kUp) let_next_start();
    if (at.expert >= 0 && leads_warp(thread)) multiply(p, at, thread, shared);
    if constexpr (kEarly) wait_for_previous();  // also whoever had nothing to multiply
  }

  static NEMO_HD void multiply(const Params& p, const Place& at, int thread, Shared& shared) {
    const int warp = thread / kLanes, depth = int(p.depth), units = int(ceil_div(p.depth, 64));
    const int64_t first_tile = p.first_tile + at.row_block * kRowTiles;
    const int tiles_here = int(smaller<int64_t>(p.weight_tiles - first_tile, kRowTiles));
    const int64_t base = (at.expert * p.weight_tiles + first_tile) * units;

    PerLane<const T*> x[kPieces];
    PerLane<const uint8_t*> codes, scales;
    each_lane(thread, [&](int lane) {
      codes[lane] = p.codes + base * 512 + lane * 8;
      scales[lane] = p.scales + base * 64 + lane;
#pragma unroll
      for (int c = 0; c < kPieces; ++c) {
        const int64_t row = at.first + 8 * c + lane / 4, slot = slot_of(p, at, row);
        const int64_t source = p.part == Part::kUp ? uint32_t(slot) / uint32_t(p.top_k) : row;
        x[c][lane] = slot < 0 ? nullptr : static_cast<const T*>(p.x) + source * p.x_row;
      }
    });
    PerLane<FragmentC> acc[kRowTiles][kPieces];
    each_lane(thread, [&](int lane) {
#pragma unroll
      for (int i = 0; i < kRowTiles * kPieces * 4; ++i) {
        acc[i / (kPieces * 4)][i / 4 % kPieces][lane].value[i % 4] = 0.0f;
      }
    });

#pragma unroll 1
    for (int first = warp; first < units; first += kWarps * kAhead) {
      PerLane<Loaded> loaded[kAhead];
      each_lane(thread, [&](int lane) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          const int unit = first + i * kWarps;
          Loaded& in = loaded[i][lane];
#pragma unroll
          for (int r = 0; r < kRowTiles; ++r) {
            const bool inside = unit < units && r < tiles_here;
            const int64_t skip = r * units + unit;
            load_weights(inside, codes[lane] + skip * 512, scales[lane] + skip * 64, in.codes[r],
                         in.scales[r]);
          }
        }
        if constexpr (kEarly) {
          if (first == warp) wait_for_previous();
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          Loaded& in = loaded[i][lane];
          const int k = (first + i * kWarps) * 64 + 16 * (lane % 4);
#pragma unroll
          for (int c = 0; c < kPieces; ++c) {
            const bool inside = k < depth && x[c][lane] != nullptr;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const T* from = x[c][lane] + k + 8 * h;
              in.x[c][h] = inside ? load_vec<true, 8, kEarly>(from, 8) : Vec<T, 8>{};
            }
          }
        }
      });
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
          for (int step = 0; step < 4; ++step) {
            PerLane<FragmentA> a;
            each_lane(thread, [&](int lane) {
              const Loaded& in = loaded[i][lane];
              a[lane] = weights(in.codes[r], in.scales[r], step);
            });
#pragma unroll
            for (int c = 0; c < kPieces; ++c) {
              PerLane<FragmentB> b;
              each_lane(thread, [&](int lane) { b[lane] = columns(loaded[i][lane].x[c], step); });
              multiply_add<T>(acc[r][c], a, b);
            }
          }
        }
      }
    }
    each_lane(thread, [&](int lane) {
      const int g = lane / 4, t = lane % 4;
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int c = 0; c < kPieces; ++c) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            shared.sum[warp][16 * r + g + i / 2 * 8][8 * c + 2 * t + i % 2] =
                acc[r][c][lane].value[i];
          }
        }
      }
    });
  }

  // The warps' sums, added in order; scale, epilogue, one cast.
  static NEMO_HD void finish(const Params& p, int64_t block, int thread, Shared& shared) {
    const Place at = shared.at;
    if (at.expert < 0) return;
    const float scale = p.global_scale[at.expert] * kLeftOver;
#pragma unroll
    for (int i = thread; i < 16 * kRowTiles * kColumns; i += kThreads) {
      const int r = i % (16 * kRowTiles), c = i / (16 * kRowTiles);
      const int64_t n = at.row_block * (16 * kRowTiles) + r, row = at.first + c;
      const int64_t slot = slot_of(p, at, row);
      if (n >= p.width || slot < 0) continue;
      float v = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) v += shared.sum[w][r][c];
      v *= scale;
      if (p.part == Part::kUp) {
        v = v < 0.0f ? 0.0f : v;  // NaN stays
        v *= v;
      }
      static_cast<T*>(p.out)[offset(p.part == Part::kSlots ? slot : row, p.width, n, 1)] =
          from_float<T>(v);
    }
  }

 private:
  // Block t of rows g and g + 8 of a unit: 8 bytes and one scale each; zeros outside.
  static NEMO_HD void load_weights(bool inside, const uint8_t* from, const uint8_t* scale,
                                   Words (&codes)[2], uint32_t& scales) {
    codes[0] = codes[1] = {0, 0};
    scales = 0;
    if (!inside) return;
#ifdef __CUDA_ARCH__
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2];"
                   : "=r"(codes[h].x), "=r"(codes[h].y)
                   : "l"(from + h * 256));
    }
    scales = uint32_t(__ldcs(scale)) | uint32_t(__ldcs(scale + 32)) << 8;
#else
    for (int h = 0; h < 2; ++h) std::memcpy(&codes[h], from + h * 256, sizeof codes[h]);
    scales = uint32_t(scale[0]) | uint32_t(scale[32]) << 8;
#endif
  }

  // The weights of one matrix product: elements 0, 2, 8, 10 of the block (step 0), 1, 3, 9, 11, then
  // the same past element 4.
  static NEMO_HD FragmentA weights(const Words (&codes)[2], uint32_t scales, int step) {
    FragmentA out;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t scale = block_scale<T>(scales >> 8 * h);
      const uint32_t word = step < 2 ? codes[h].x : codes[h].y;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        out.pair[2 * i + h] = multiply_halves<T>(widened<T>(word, 2 * (step % 2) + i), scale);
      }
    }
    return out;
  }

  // The columns of x that meet them: halves of words 0 and 1, 4 and 5, or 2 and 3, 6 and 7.
  static NEMO_HD FragmentB columns(const Vec<T, 8> (&x)[2], int step) {
    FragmentB out;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t a = x[i].word[step / 2 * 2], b = x[i].word[step / 2 * 2 + 1];
      out.pair[i] = step % 2 ? a >> 16 | (b & 0xFFFF0000u) : (a & 0xFFFFu) | b << 16;
    }
    return out;
  }
};

template <class T, int kColumns, bool kEarly>
void run_product(const Product& p, Stream stream) {
  using Kernel = ProductKernel<T, kColumns, kEarly>;
  const int64_t tiles = p.part == Part::kPlain ? ceil_div(p.rows, kColumns) : p.tiles;
  launch<Kernel, kEarly>(p, tiles * ceil_div(p.width, 16 * Kernel::kRowTiles), stream);
}

}  // namespace nemo::w4a16
