// What becomes of a tile's sums, and how they leave the registers: four threads hold 8 columns of a
// row, two each, and trade until each has 16 bytes that lie together.
#pragma once

#include "moe_experts/place.cuh"
#include "nemo/vec.h"

namespace nemo::moe_experts {

template <class T, int kColumns, Part kPart>
struct Store {
  static constexpr bool kScaled = std::is_same_v<T, e4m3>;
  using Out = std::conditional_t<kScaled && kPart == Part::kSlots, bf16, T>;
  static constexpr int kPiece = 16 / sizeof(Out), kStep = 4 * kPiece;  // columns: 16 bytes, times 4

  // A row of the tile that a thread has sums of.
  struct Row {
    int64_t slot, start;  // in the result
    float scale;
  };

  static NEMO_DEVICE void store(const Product& p, const Place& at,
                                PerThread<Sums<kColumns>>& sums) {
    // Of E4M3: the weights' scale, if it is the expert's, and what the result is multiplied by.
    float b_scale = 1.0f, inverse = 1.0f;
    if (kScaled && !p.per_column) b_scale = p.b_scale[at.expert];
    if (kScaled && kPart == Part::kUp) inverse = 1.0f / p.out_scale[at.expert];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      PerThread<Row> row;
      PerThread<float> dweight;
      each_thread([&](int t) {
        row[t] = row_of(p, at, at.first + t / kLanes * 16 + t % kLanes / 4 + 8 * half);
        dweight[t] = 0.0f;
      });
#pragma unroll
      for (int c = 0; c < kColumns; c += kStep) {
        PerThread<uint32_t> word[4];
        if constexpr (kPart == Part::kDHidden) load_hidden(p, at, row, c, word);
        each_thread([&](int t) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int column = c + kPiece * i;
            if (column >= kColumns) continue;
            const float* sum = sums[t].value + column / 8 * 4 + 2 * half;
            if constexpr (kScaled) {
              word[i][t] = scaled(p, at, row[t], column + 2 * (t % 4), sum, b_scale, inverse);
            } else if constexpr (kPart != Part::kDHidden) {
              const bool up = kPart == Part::kUp;
              word[i][t] = pack_halves<T>(up ? squared_relu(sum[0]) : sum[0],
                                          up ? squared_relu(sum[1]) : sum[1]);
            } else if (is_stored(p, at, row[t], column)) {
              word[i][t] = gradient(sum, word[i][t], row[t].scale, dweight[t]);
            }
          }
        });
        transpose(word);
        each_thread([&](int t) {
          const int column = c + kPiece * (t % 4);
          if (!is_stored(p, at, row[t], column)) return;
          uint32_t out[] = {word[0][t], word[1][t], word[2][t], word[3][t]};
          if constexpr (sizeof(Out) == 1) unravel(out);
          store_words(static_cast<Out*>(p.out) + row[t].start + column, out[0], out[1], out[2],
                      out[3]);
        });
      }
      if constexpr (kPart == Part::kDHidden) store_partial(p, at, row, dweight);
    }
  }

 private:
  static NEMO_DEVICE Row row_of(const Product& p, const Place& at, int64_t r) {
    const int64_t slot = slot_of(p, at, r);
    float scale = 1.0f;
    if (slot >= 0 && kPart == Part::kDHidden) scale = p.weights[slot];
    if (slot >= 0 && kScaled) {
      const int64_t token = p.per_token ? token_of(p, slot) : 0;
      scale = p.a_scale[kPart == Part::kUp ? token : at.expert];
    }
    return {slot, offset(kPart == Part::kSlots ? slot : r, p.columns, at.column, 1), scale};
  }

  static NEMO_DEVICE bool is_stored(const Product& p, const Place& at, const Row& row, int column) {
    return row.slot >= 0 && column < kColumns && at.column + column < p.columns;
  }

  // The sums' columns, and of bytes the ones 8 further, packed.
  static NEMO_DEVICE uint32_t scaled(const Product& p, const Place& at, const Row& row, int column,
                                     const float* sum, float b_scale, float inverse) {
    float v[4] = {sum[0], sum[1]};
    if constexpr (sizeof(Out) == 1) v[2] = sum[4], v[3] = sum[5];
#pragma unroll
    for (int i = 0; i < kPiece / 4; ++i) {
      const int n = int(at.column) + column + i % 2 + i / 2 * 8;
      if (p.per_column && n < int(p.columns)) {
        b_scale = p.b_scale[offset(at.expert, p.b_width, p.first + n, 1)];
      }
      v[i] = v[i] * b_scale * row.scale;
    }
    if constexpr (sizeof(Out) == 1) {
      uint32_t bytes = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        bytes |= uint32_t(from_float<e4m3>(squared_relu(v[i]) * inverse).bits) << 8 * i;
      }
      return bytes;
    } else {
      return pack_halves<Out>(v[0], v[1]);
    }
  }

  // Words with two bytes of 8 columns and two of the next 8 to words of neighbours.
  static NEMO_DEVICE void unravel(uint32_t (&word)[4]) {
    const uint32_t low[] = {word[0], word[2]}, high[] = {word[1], word[3]};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      word[i] = (low[i] & 0xFFFFu) | high[i] << 16;
      word[2 + i] = low[i] >> 16 | (high[i] & 0xFFFF0000u);
    }
  }

  static NEMO_DEVICE void load_hidden(const Product& p, const Place& at, PerThread<Row>& row, int c,
                                      PerThread<uint32_t> (&word)[4]) {
    each_thread([&](int t) {
      const int column = c + kPiece * (t % 4);
      Vec<T, kPiece> hidden{};
      if (is_stored(p, at, row[t], column)) {
        const auto* from = static_cast<const T*>(p.hidden) + row[t].start + column;
        hidden = load_vec<true, kPiece>(from, kPiece);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) word[i][t] = hidden.word[i];
    });
    transpose(word);
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
  static NEMO_DEVICE void store_partial(const Product& p, const Place& at, PerThread<Row>& row,
                                        PerThread<float>& dweight) {
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
      PerThread<uint32_t> other;
      each_thread([&](int t) { other[t] = float_to_bits(dweight[t]); });
      exchange(other, bit);
      each_thread([&](int t) { dweight[t] += bits_to_float(other[t]); });
    }
    each_thread([&](int t) {
      if (t % 4 == 0 && row[t].slot >= 0) {
        p.partial[offset(at.column / kColumns, p.rows, row[t].slot, 1)] = dweight[t];
      }
    });
  }
};

}  // namespace nemo::moe_experts
