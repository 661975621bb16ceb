// Decoding: convolve a few new tokens with the history in a state and append them to it.
#pragma once

#include "causal_conv1d/causal_conv1d.h"
#include "nemo/static_switch.h"

namespace nemo::conv1d {

// One thread owns one row and channel, and with it one line of the state: it reads the history
// before it writes, so that no two accesses race.
template <class T, int W>
struct UpdateKernel {
  using Params = Update;
  using Shared = Empty;
  static constexpr int kThreads = 128, kMinBlocks = 8;
  static constexpr bool kReduces = false;

  static NEMO_HD void walk(const Params& p, int64_t block, int thread, Shared&) {
    const int64_t index = block * kThreads + thread;
    const int64_t row = index / p.dim, channel = index % p.dim;
    if (row >= p.batch) return;
    const T* x = static_cast<const T*>(p.x.data) +
                 offset(row, p.x.row, channel, p.x.channel);
    T* y = static_cast<T*>(p.y) + offset(row, p.tokens * p.dim, channel, 1);
    const int64_t slot = p.slot == nullptr ? row : p.slot[row];
    if (slot < 0 || slot >= p.slots) {
      // A negative slot is padding; one behind the end is an error, and shows.
      const T fill = from_float<T>(slot < 0 ? 0.0f : NAN);
#pragma unroll 1
      for (int64_t t = 0; t < p.tokens; ++t) y[t * p.dim] = fill;
      return;
    }
    T* state = static_cast<T*>(p.state.data) +
               offset(slot, p.state.row, channel, p.state.channel);
    const int64_t length = p.state_len;

    int64_t start = length - (W - 1);
    if (p.num_accepted != nullptr) {
      start = smaller(larger<int64_t>(int64_t(p.num_accepted[row]) - 1, 0), start);
    } else if (p.cache_seqlens != nullptr) {
      start = wrap(int64_t(p.cache_seqlens[row]) - (W - 1), length);
    }
    T window[W - 1];
#pragma unroll
    for (int j = 0; j < W - 1; ++j) window[j] = state[wrap(start + j, length) * p.state.step];
    float weight[W];
#pragma unroll
    for (int w = 0; w < W; ++w) {
      weight[w] = load_float(p.weight, p.weight_dtype,
                             offset(channel, p.weight_channel, w, p.weight_tap));
    }
    const float bias =
        p.bias == nullptr ? 0.0f : load_float(p.bias, p.bias_dtype, channel * p.bias_channel);

    const bool shifts = p.num_accepted == nullptr && p.cache_seqlens == nullptr;
    if (shifts) {
#pragma unroll 1
      for (int64_t i = 0; i < length - (W - 1); ++i) {
        const int64_t from = i + p.tokens;
        state[i * p.state.step] =
            from < length ? state[from * p.state.step] : x[(from - length) * p.x.step];
      }
    } else if (p.num_accepted != nullptr && p.tokens > 0) {
#pragma unroll
      for (int j = 0; j < W - 2; ++j) state[j * p.state.step] = window[j + 1];
    }
#pragma unroll 1
    for (int64_t t = 0; t < p.tokens; ++t) {
      const T now = x[t * p.x.step];
      float v = bias;
#pragma unroll
      for (int j = 0; j < W - 1; ++j) v = fma(weight[j], to_float(window[j]), v);
      v = fma(weight[W - 1], to_float(now), v);
      if (p.silu) v *= sigmoid<T>(v);
      y[t * p.dim] = from_float<T>(v);
      if (p.num_accepted != nullptr) {
        if (W - 2 + t < length) state[(W - 2 + t) * p.state.step] = now;
      } else if (p.cache_seqlens != nullptr) {
        state[wrap(start + W - 1 + t, length) * p.state.step] = now;
      }
#pragma unroll
      for (int j = 0; j < W - 2; ++j) window[j] = window[j + 1];
      window[W - 2] = now;
    }
    if (shifts) {
#pragma unroll
      for (int j = 0; j < W - 1; ++j) state[(length - (W - 1) + j) * p.state.step] = window[j];
    }
  }

 private:
  static NEMO_HD int64_t wrap(int64_t i, int64_t length) {
    if (0 <= i && i < length) return i;
    const int64_t rest = i % length;
    return rest < 0 ? rest + length : rest;
  }
};

template <class T>
void run_update(const Update& p, Stream stream) {
  static_switch<2, 3, 4>(p.width, [&](auto W) {
    using Kernel = UpdateKernel<T, W>;
    launch<Kernel>(p, ceil_div(p.batch * p.dim, Kernel::kThreads), stream);
  });
}

}  // namespace nemo::conv1d
