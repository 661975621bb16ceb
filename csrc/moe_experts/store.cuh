// What becomes of a tile's sums, and how they leave the registers: four threads hold 8 columns of a
// row, two each, and trade until each has 16 bytes that lie together.
#pragma once

#include "moe_experts/place.cuh"
#include "nemo/vec.h"

namespace nemo::moe_experts {

template <class T, int kColumns, Part kPart>
class Store {
 public:
  // What memory says of the tile's rows, asked for while products run: it has arrived when their
  // sums are there.
  NEMO_DEVICE void prepare(const Product& p, const Place& at) {
    float out_scale = 1.0f;
    if (kScaled && kPart == Part::kUp) out_scale = p.out_scale[at.expert];
    if (kScaled && !p.per_column) scale_ = p.b_scale[at.expert];
    each_thread([&](int t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row = at.first + t / kLanes * 16 + t % kLanes / 4 + 8 * half;
        row_[half][t] = row_of(p, at, row);
        if constexpr (kPart == Part::kDHidden) load_hidden(p, at, row, t, hidden_[half]);
      }
    });
    inverse_ = 1.0f / out_scale;
  }

  NEMO_DEVICE void store(const Product& p, const Place& at, PerThread<Sums<kColumns>>& sums) {
    PerThread<Scales> scales;
    if constexpr (kScaled) each_thread([&](int t) { scales[t] = scales_of(p, at, t); });
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        PerThread<uint32_t> word[4];
        each_thread([&](int t) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int column = kStep * step + kPiece * i;
            if (column >= kColumns) continue;
            const float* sum = sums[t].value + column / 2 + 2 * half;
            if constexpr (kScaled) {
              word[i][t] = scaled(sum, scales[t].value + column / 4, row_[half][t].scale,
                                  inverse_);
            } else if constexpr (kPart != Part::kDHidden) {
              const bool up = kPart == Part::kUp;
              word[i][t] = pack_halves<T>(up ? squared_relu(sum[0]) : sum[0],
                                          up ? squared_relu(sum[1]) : sum[1]);
            } else {
              word[i][t] = gradient(sum, hidden_[half][column / 8][t], row_[half][t], column);
            }
          }
        });
        transpose(word);
        each_thread([&](int t) {
          const int column = kStep * step + kPiece * (t % 4);
          if (column >= row_[half][t].columns) return;
          uint32_t out[] = {word[0][t], word[1][t], word[2][t], word[3][t]};
          if constexpr (sizeof(Out) == 1) unravel(out);
          store_words(static_cast<Out*>(p.out) + row_[half][t].start + column, out[0], out[1],
                      out[2], out[3]);
        });
      }
    }
    if constexpr (kPart == Part::kDHidden) {
#pragma unroll
      for (int half = 0; half < 2; ++half) store_partial(p, at, row_[half]);
    }
  }

 private:
  static constexpr bool kScaled = std::is_same_v<T, e4m3>;
  using Out = std::conditional_t<kScaled && kPart == Part::kSlots, bf16, T>;
  static constexpr int kPiece = 16 / sizeof(Out);  // columns of 16 bytes; widths are multiples
  static constexpr int kStep = 4 * kPiece, kSteps = (kColumns + kStep - 1) / kStep;

  // A row of the tile that a thread has sums of.
  struct Row {
    int64_t slot, start;  // in the result
    int columns;          // of the tile that are stored
    float scale, dweight;
  };

  // Of the weights in E4M3: for the columns that a thread has sums of, in the order of those.
  struct Scales {
    float value[kColumns / 4];
  };

  static NEMO_DEVICE int columns_of(const Product& p, const Place& at) {
    return int(smaller<int64_t>(kColumns, p.columns - at.column));
  }

  static NEMO_DEVICE Row row_of(const Product& p, const Place& at, int64_t r) {
    const int64_t slot = slot_of(p, at, r);
    float scale = 1.0f;
    if (slot >= 0 && kPart == Part::kDHidden) scale = 2.0f * p.weights[slot];
    if (slot >= 0 && kScaled) {
      const int64_t token = p.per_token ? token_of(p, slot) : 0;
      scale = p.a_scale[kPart == Part::kUp ? token : at.expert];
    }
    return {slot, offset(kPart == Part::kSlots ? slot : r, p.columns, at.column, 1),
            slot >= 0 ? columns_of(p, at) : 0, scale, 0.0f};
  }

  // Pairs of neighbours, as the sums lie. Beyond the last row or column stands the last: a load
  // without a condition is no branch.
  static NEMO_DEVICE void load_hidden(const Product& p, const Place& at, int64_t row, int t,
                                      PerThread<uint32_t> (&hidden)[kColumns / 8]) {
    const int64_t first = offset(smaller(row, at.end - 1), p.columns, at.column + 2 * (t % 4), 1);
    const T* from = static_cast<const T*>(p.hidden) + first;
    const uint32_t last = columns_of(p, at) / 8 - 1;
#pragma unroll
    for (uint32_t i = 0; i < kColumns / 8; ++i) {
      hidden[i][t] = load_vec<true, 2>(from + 8 * smaller(i, last), 2).word[0];
    }
  }

  NEMO_DEVICE Scales scales_of(const Product& p, const Place& at, int t) {
    Scales out;
    if (p.per_column) {
      const float* from = p.b_scale + offset(at.expert, p.b_width, p.first + at.column, 1);
#pragma unroll
      for (int i = 0; i < kColumns / 4; ++i) {
        const int unit = smaller(i / 4 * 16, columns_of(p, at) - 16);
        out.value[i] = (from + unit + 2 * (t % 4))[i / 2 % 2 * 8 + i % 2];
      }
    } else {
#pragma unroll
      for (int i = 0; i < kColumns / 4; ++i) out.value[i] = scale_;
    }
    return out;
  }

  // The sums' columns, and of bytes the ones 8 further, packed.
  static NEMO_DEVICE uint32_t scaled(const float* sum, const float* column_scale, float row_scale,
                                     float inverse) {
    float v[kPiece / 4];
#pragma unroll
    for (int i = 0; i < kPiece / 4; ++i) {
      v[i] = sum[i / 2 * 4 + i % 2] * column_scale[i] * row_scale;
      if constexpr (sizeof(Out) == 1) v[i] = squared_relu(v[i]) * inverse;
    }
    if constexpr (sizeof(Out) == 1) {
      return pack_bytes(v[0], v[1]) | pack_bytes(v[2], v[3]) << 16;
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

  // A root that is 2^-23 off and two products leave 2^-22 of a gradient before it is rounded to 16
  // bits, up to 2^-11 or 2^-8 of it; an exact root would leave 2^-22.4. The scale holds the two.
  static NEMO_DEVICE uint32_t gradient(const float* sum, uint32_t hidden, Row& row, int column) {
    const float low = low_half<T>(hidden), high = high_half<T>(hidden);
    const float added = fma(high, sum[1], fma(low, sum[0], row.dweight));
    if (column < row.columns) row.dweight = added;
    return pack_halves<T>(approximate_sqrt(low) * (row.scale * sum[0]),
                          approximate_sqrt(high) * (row.scale * sum[1]));
  }

  // Adds up the four threads of a row, in the same order in all of them.
  static NEMO_DEVICE void store_partial(const Product& p, const Place& at, PerThread<Row>& row) {
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
      PerThread<uint32_t> other;
      each_thread([&](int t) { other[t] = float_to_bits(row[t].dweight); });
      exchange(other, bit);
      each_thread([&](int t) { row[t].dweight += bits_to_float(other[t]); });
    }
    each_thread([&](int t) {
      if (t % 4 == 0 && row[t].columns > 0) {
        p.partial[offset(at.column / kColumns, p.rows, row[t].slot, 1)] = row[t].dweight;
      }
    });
  }

  PerThread<Row> row_[2];
  float scale_, inverse_;  // of E4M3: the weights' if it is the expert's; one over the result's
  PerThread<uint32_t> hidden_[2][kColumns / 8];  // of kDHidden
};

}  // namespace nemo::moe_experts
