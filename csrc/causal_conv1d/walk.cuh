// What the walks over tokens share: where a warp starts, sequence boundaries, taps in registers.
#pragma once

#include "causal_conv1d/causal_conv1d.h"
#include "nemo/vec.h"

namespace nemo::conv1d {

inline constexpr int kLanes = 32;

// The part of the problem one thread owns: tokens [begin, end) of one row, kVec channels.
template <int kVec>
struct Task {
  int64_t row, begin, end, channel;
  int valid;  // channels inside the tensor; 0: nothing to do

  // Channels vary fastest, so that blocks that run together read whole lines of memory.
  NEMO_HD Task(const Problem& p, int64_t block, int thread) {
    const int64_t slabs = ceil_div(p.dim, kLanes * kVec), chunks = ceil_div(p.tokens, p.chunk);
    const int64_t task = block / slabs * kWarps + thread / kLanes;
    channel = (block % slabs * kLanes + thread % kLanes) * kVec;
    row = task / chunks;
    begin = task % chunks * p.chunk;
    end = smaller(begin + p.chunk, p.tokens);
    valid = row < p.batch ? int(smaller<int64_t>(kVec, larger<int64_t>(p.dim - channel, 0))) : 0;
  }
};

template <int kVec>
int64_t blocks_of(const Problem& p) {
  return ceil_div(p.dim, kLanes * kVec) * token_blocks(p);
}

// The sequence a token belongs to. Tokens behind the last boundary belong to none.
struct Span {
  int64_t sequence, begin, end;
  bool inside;

  NEMO_HD Span(const Problem& p, int64_t row, int64_t token)
      : sequence(row), begin(0), end(p.tokens), inside(true) {
    if (p.cu_seqlens == nullptr) return;
    int64_t low = 0, high = p.sequences;  // smallest s whose end lies behind the token
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (p.cu_seqlens[middle + 1] > token) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    set(p, low);
  }

  NEMO_HD Span(const Problem& p, int64_t sequence_) : Span(p, sequence_, Whole{}) {}

  // To the sequence of the token that `end` has reached. Passing over every sequence that ends
  // before keeps the walk moving forward even where malformed boundaries decrease.
  NEMO_HD void advance(const Problem& p) {
    int64_t next = sequence + 1;
    while (next < p.sequences && p.cu_seqlens[next + 1] <= end) ++next;
    set(p, next);
  }

 private:
  struct Whole {};
  NEMO_HD Span(const Problem& p, int64_t sequence_, Whole)
      : sequence(sequence_), begin(0), end(p.tokens), inside(true) {
    if (p.cu_seqlens != nullptr) set(p, sequence_);
  }

  // The clamps keep malformed boundaries from reading outside the tensor.
  NEMO_HD void set(const Problem& p, int64_t s) {
    sequence = s;
    inside = s < p.sequences;
    begin = inside ? larger<int64_t>(p.cu_seqlens[s], 0) : end;
    end = inside ? smaller<int64_t>(p.cu_seqlens[s + 1], p.tokens) : INT64_MAX;
  }
};

NEMO_HD int32_t id_at(const Problem& p, int64_t row, int64_t token) {
  // History in front of a row belongs to the sequence of its first token.
  return p.seq_idx[offset(row, p.seq_idx_row, larger<int64_t>(token, 0), p.seq_idx_step)];
}

// Whether the final state of a row takes the input at this token (-1: a row's history).
NEMO_HD bool carried(const Problem& p, int64_t row, int64_t token) {
  if (p.seq_idx == nullptr || p.tokens == 0) return true;
  const int32_t last = id_at(p, row, p.tokens - 1);
  return last >= 0 && id_at(p, row, token) == last;
}

// The inputs of `valid` channels at a token in front of the sequence: entry token - begin + W-1 of
// its initial state, or zero.
template <class T, int kVec>
NEMO_HD void history(const Problem& p, const Span& span, int64_t token, int64_t channel, int valid,
                     float (&out)[kVec]) {
  const int64_t entry = token - span.begin + p.width - 1;
  const bool has = p.initial.data != nullptr && span.inside && entry >= 0;
  load_floats(static_cast<const T*>(p.initial.data),
              offset(span.sequence, p.initial.row, entry, p.initial.step, channel,
                     p.initial.channel),
              p.initial.channel, has ? valid : 0, out);
}

// The last W-1 inputs of kVec channels, oldest first, and whose they are.
template <class T, int W, int kVec, bool kAligned>
struct Window {
  float tap[W - 1][kVec];
  int32_t id[W - 1];

  // What lies in front of `token`, of `valid` channels from `channel` on.
  NEMO_HD void fill(const Problem& p, const Span& span, int64_t row, int64_t token, int64_t channel,
                    int valid) {
#pragma unroll
    for (int j = 0; j < W - 1; ++j) {
      const int64_t source = token - (W - 1) + j;
      if (source >= span.begin && source < p.tokens) {
        const T* x = static_cast<const T*>(p.x.data) +
                     offset(row, p.x.row, source, p.x.step) + channel;
        if constexpr (kAligned) {
          to_floats(load_vec<true, kVec>(x, valid), tap[j]);
        } else {
          load_floats(x, 0, 1, valid, tap[j]);
        }
      } else {
        history<T>(p, span, source, channel, valid, tap[j]);
      }
      id[j] = p.seq_idx != nullptr ? id_at(p, row, source) : 0;
    }
  }

  NEMO_HD void push(const float (&x)[kVec], int32_t own) {
#pragma unroll
    for (int j = 0; j < W - 1; ++j) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) tap[j][i] = j < W - 2 ? tap[j < W - 2 ? j + 1 : 0][i] : x[i];
      id[j] = j < W - 2 ? id[j < W - 2 ? j + 1 : 0] : own;
    }
  }
};

// kAhead vectors in flight: slot a holds the first of every kAhead that has not been taken yet.
template <class T, int kVec, bool kAligned, int kAhead>
struct Ahead {
  Vec<T, kVec> slot[kAhead];
  const T* from;
  int64_t step;
  int valid;

  // The vectors at from, from + step, ..., `count` of them.
  NEMO_HD Ahead(const T* from_, int64_t step_, int valid_, int count)
      : from(from_), step(step_), valid(valid_) {
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      if (a < count) slot[a] = load_vec<kAligned, kVec>(from + a * step, valid);
    }
    from += kAhead * step;
  }

  // The next vector, as floats; its slot (the position modulo kAhead) is refilled if `more`.
  NEMO_HD void take(int a, bool more, float (&out)[kVec]) {
    to_floats(slot[a], out);
    if (more) slot[a] = load_vec<kAligned, kVec>(from, valid);
    from += step;
  }
};

// Weights and bias of kVec channels in registers.
template <int W, int kVec>
struct Filter {
  float weight[W][kVec], bias[kVec];

  NEMO_HD Filter(const Problem& p, int64_t channel, int valid) {
#pragma unroll
    for (int w = 0; w < W; ++w) {
      load_floats(p.weight, p.weight_dtype,
                  offset(channel, p.weight_channel, w, p.weight_tap), p.weight_channel, valid,
                  weight[w]);
    }
    load_floats(p.bias, p.bias_dtype, channel * p.bias_channel, p.bias_channel,
                p.bias == nullptr ? 0 : valid, bias);
  }

  // bias + sum_w weight_w * x_{t-(W-1)+w}, oldest tap first, over the taps of the same sequence.
  template <class Taps>
  NEMO_HD void apply(const Taps& window, const float (&x)[kVec], int32_t own,
                     float (&v)[kVec]) const {
#pragma unroll
    for (int i = 0; i < kVec; ++i) v[i] = bias[i];
#pragma unroll
    for (int j = 0; j < W - 1; ++j) {
      if (window.id[j] == own) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) v[i] = fma(weight[j][i], window.tap[j][i], v[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kVec; ++i) v[i] = fma(weight[W - 1][i], x[i], v[i]);
  }
};

}  // namespace nemo::conv1d
