// Forward: each thread owns one 16-byte vector of channels and walks `chunk` tokens with the taps
// in registers, so that every input is read once (and W-1 of each chunk twice).
#pragma once

#include "causal_conv1d/walk.cuh"
#include "nemo/static_switch.h"

namespace nemo::conv1d {

template <class T, int W, bool kAligned>
struct ForwardKernel {
  using Params = Forward;
  using Shared = Empty;
  static constexpr int kThreads = kWarps * kLanes, kMinBlocks = 3;
  static constexpr bool kReduces = false;
  static constexpr int kVec = 16 / sizeof(T);
  static constexpr int kAhead = kAligned ? 4 : 1;  // vectors in flight while as many are worked on

  static NEMO_HD void walk(const Params& p, int64_t block, int thread, Shared&) {
    const Task<kVec> task(p, block, thread);
    if (task.valid == 0) return;
    const Filter<W, kVec> filter(p, task.channel, task.valid);
    Span span(p, task.row, task.begin);
    for (int64_t token = task.begin; token < task.end;) {
      const int64_t stop = smaller(task.end, span.end);
      part(p, task, filter, span, token, int(stop - token));
      token = stop;
      if (token < task.end) span.advance(p);
    }
  }

 private:
  // `count` tokens of one sequence.
  static NEMO_HD void part(const Params& p, const Task<kVec>& task, const Filter<W, kVec>& filter,
                           const Span& span, int64_t token, int count) {
    Window<T, W, kVec, kAligned> window;
    window.fill(p, span, task.row, token, task.channel, task.valid);
    const T* x = static_cast<const T*>(p.x.data) + offset(task.row, p.x.row, token, p.x.step) +
                 task.channel;
    T* y = static_cast<T*>(p.y) + offset(task.row, p.tokens * p.dim, token, p.dim) + task.channel;
    Ahead<T, kVec, kAligned, kAhead> inputs(x, p.x.step, task.valid, count);
    for (int first = 0; first < count; first += kAhead) {
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const int t = first + a;
        if (t >= count) break;
        float in[kVec], v[kVec];
        inputs.take(a, t + kAhead < count, in);
        const int32_t own = p.seq_idx != nullptr ? id_at(p, task.row, token + t) : 0;
        filter.apply(window, in, own, v);
        if (p.silu) {
#pragma unroll
          for (int i = 0; i < kVec; ++i) v[i] *= sigmoid<T>(v[i]);
        }
        if (own < 0 || !span.inside) {
#pragma unroll
          for (int i = 0; i < kVec; ++i) v[i] = 0.0f;
        }
        store_vec<kAligned>(y, v, task.valid);
        y += p.dim;
        window.push(in, own);
      }
    }
  }
};

template <class T>
void run_forward(const Forward& p, Stream stream) {
  static_switch<2, 3, 4>(p.width, [&](auto W) {
    static_switch<0, 1>(p.aligned, [&](auto kAligned) {
      using Kernel = ForwardKernel<T, W, kAligned>;
      launch<Kernel>(p, blocks_of<Kernel::kVec>(p), stream);
    });
  });
}

}  // namespace nemo::conv1d
