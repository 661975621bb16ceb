// Final states: the last state_len inputs of every sequence, continued into its initial state.
#pragma once

#include "causal_conv1d/walk.cuh"

namespace nemo::conv1d {

template <class T>
struct StatesKernel {
  using Params = Forward;
  using Shared = Empty;
  static constexpr int kThreads = 128, kMinBlocks = 1;
  static constexpr bool kReduces = false;

  // One thread per element; channels vary fastest.
  static NEMO_HD void walk(const Params& p, int64_t block, int thread, Shared&) {
    const int64_t index = block * kThreads + thread;
    const int64_t channel = index % p.dim, entry = index / p.dim % p.state_len;
    const int64_t sequence = index / p.dim / p.state_len;
    if (sequence >= p.sequences) return;
    const Span span(p, sequence);
    const int64_t row = p.cu_seqlens == nullptr ? sequence : 0;
    const int64_t token = span.end - p.state_len + entry;
    float value[1] = {0.0f};
    if (carried(p, row, token)) {
      if (token < span.begin) {
        history<T>(p, span, token, channel, 1, value);
      } else {
        value[0] = to_float(static_cast<const T*>(
            p.x.data)[offset(row, p.x.row, token, p.x.step, channel, p.x.channel)]);
      }
    }
    static_cast<T*>(p.states.data)[offset(sequence, p.states.row, entry, p.states.step, channel,
                                          p.states.channel)] = from_float<T>(value[0]);
  }
};

template <class T>
void run_states(const Forward& p, Stream stream) {
  const int64_t elements = p.sequences * p.state_len * p.dim;
  launch<StatesKernel<T>>(p, ceil_div(elements, StatesKernel<T>::kThreads), stream);
}

}  // namespace nemo::conv1d
