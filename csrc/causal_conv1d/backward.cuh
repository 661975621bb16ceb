// Backward: one walk recomputes v, forms dv = dy * act'(v), and keeps in registers the W gradients
// of inputs that are still collecting and the sums for weight and bias. Sums leave each block as
// one row of `partial`; a second kernel adds the rows in order, so that equal inputs give equal
// bits.
#pragma once

#include "causal_conv1d/walk.cuh"
#include "nemo/static_switch.h"

namespace nemo::conv1d {

// dL/dv for one value: dy * sigmoid(v) * (1 + v * (1 - sigmoid(v))), or dy without SiLU.
template <class T>
NEMO_HD float through_activation(bool silu, float dy, float v) {
  if (!silu) return dy;
  const float gate = sigmoid<T>(v);
  return dy * (gate * (1.0f + v * (1.0f - gate)));
}

template <class T, int W, bool kAligned>
struct BackwardKernel {
  using Params = Backward;
  static constexpr int kThreads = kWarps * kLanes, kMinBlocks = 3;
  static constexpr bool kReduces = true;
  static constexpr int kVec = 8 / sizeof(T);  // 8 bytes: the running sums decide the registers
  static constexpr int kAhead = kAligned ? 4 : 1;
  struct Shared {
    float sum[kWarps][W + 1][kVec][kLanes];
  };

  static NEMO_HD void walk(const Params& p, int64_t block, int thread, Shared& shared) {
    const Task<kVec> task(p, block, thread);
    float sum[W + 1][kVec];
#pragma unroll
    for (int w = 0; w <= W; ++w) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) sum[w][i] = 0.0f;
    }
    if (task.valid > 0) {
      const Filter<W, kVec> filter(p, task.channel, task.valid);
      Span span(p, task.row, task.begin);
      for (int64_t token = task.begin; token < task.end;) {
        const int64_t stop = smaller(task.end, span.end);
        part(p, task, filter, span, token, int(stop - token), sum);
        token = stop;
        if (token < task.end) span.advance(p);
      }
    }
#pragma unroll
    for (int w = 0; w <= W; ++w) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        shared.sum[thread / kLanes][w][i][thread % kLanes] = sum[w][i];
      }
    }
  }

  static NEMO_HD void finish(const Params& p, int64_t block, int thread, Shared& shared) {
    const int64_t slabs = ceil_div(p.dim, kLanes * kVec);
    const int64_t first = block % slabs * kLanes * kVec;
    float* partial = p.partial + block / slabs * (W + 1) * p.dim;
    for (int at = thread; at < (W + 1) * kLanes * kVec; at += kThreads) {
      const int w = at / (kLanes * kVec), c = at % (kLanes * kVec);
      float total = 0.0f;
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) total += shared.sum[warp][w][c % kVec][c / kVec];
      if (first + c < p.dim) partial[offset(w, p.dim) + first + c] = total;
    }
  }

 private:
  // `count` tokens of one sequence, and up to W-1 behind them that still contribute to their dx.
  static NEMO_HD void part(const Params& p, const Task<kVec>& task, const Filter<W, kVec>& filter,
                           const Span& span, int64_t token, int count, float (&sum)[W + 1][kVec]) {
    const int reach = int(smaller<int64_t>(count + W - 1, span.end - token));
    Window<T, W, kVec, kAligned> window;
    window.fill(p, span, task.row, token, task.channel, task.valid);
    const T* x = static_cast<const T*>(p.x.data) + offset(task.row, p.x.row, token, p.x.step) +
                 task.channel;
    const T* dy = static_cast<const T*>(p.dy.data) + offset(task.row, p.dy.row, token, p.dy.step) +
                  task.channel;
    T* dx = static_cast<T*>(p.dx.data) + offset(task.row, p.dx.row, token, p.dx.step) +
            task.channel;
    float open[W][kVec];  // gradient of the input k tokens back, not yet complete
#pragma unroll
    for (int k = 0; k < W; ++k) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) open[k][i] = 0.0f;
    }
    Ahead<T, kVec, kAligned, kAhead> inputs(x, p.x.step, task.valid, reach);
    Ahead<T, kVec, kAligned, kAhead> grads(dy, p.dy.step, task.valid, reach);
    for (int first = 0; first < count + W - 1; first += kAhead) {
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const int t = first + a;
        if (t >= count + W - 1) break;
#pragma unroll
        for (int k = W - 1; k >= 0; --k) {
#pragma unroll
          for (int i = 0; i < kVec; ++i) open[k][i] = k > 0 ? open[k > 0 ? k - 1 : 0][i] : 0.0f;
        }
        if (t < reach && span.inside) {
          float in[kVec], dv[kVec];
          inputs.take(a, t + kAhead < reach, in);
          grads.take(a, t + kAhead < reach, dv);
          const int32_t own = p.seq_idx != nullptr ? id_at(p, task.row, token + t) : 0;
          if (p.dfinal.data != nullptr) add_dfinal(p, task, span, token + t, open[0]);
          if (own >= 0) contribute(p, filter, window, in, own, t < count, dv, open, sum);
          window.push(in, own);
        }
        if (t >= W - 1) {
          store_vec<kAligned>(dx, open[W - 1], task.valid);
          dx += p.dx.step;
        }
      }
    }
  }

  // Adds one token, whose dy comes in `dv`, to the gradients of its inputs; inputs in front of the
  // part receive too and are never stored. Each token counts once in the sums over weights.
  static NEMO_HD void contribute(const Params& p, const Filter<W, kVec>& filter,
                                 const Window<T, W, kVec, kAligned>& window,
                                 const float (&x)[kVec], int32_t own, bool counts,
                                 float (&dv)[kVec], float (&open)[W][kVec],
                                 float (&sum)[W + 1][kVec]) {
    float v[kVec];
    filter.apply(window, x, own, v);
#pragma unroll
    for (int i = 0; i < kVec; ++i) dv[i] = through_activation<T>(p.silu, dv[i], v[i]);
#pragma unroll
    for (int w = 0; w < W; ++w) {
      const bool past = w < W - 1;
      if (past && window.id[past ? w : 0] != own) continue;
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        open[W - 1 - w][i] = fma(filter.weight[w][i], dv[i], open[W - 1 - w][i]);
        const float tap = past ? window.tap[past ? w : 0][i] : x[i];
        if (counts) sum[w][i] = fma(dv[i], tap, sum[w][i]);
      }
    }
    if (counts) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) sum[W][i] += dv[i];
    }
  }

  // An input among the last W-1 of its sequence is also an entry of the final state.
  static NEMO_HD void add_dfinal(const Params& p, const Task<kVec>& task, const Span& span,
                                 int64_t token, float (&to)[kVec]) {
    const int64_t entry = token - span.end + W - 1;
    if (entry < 0 || !carried(p, task.row, token)) return;
    const T* from = static_cast<const T*>(p.dfinal.data);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      if (i < task.valid) {
        to[i] += to_float(from[offset(span.sequence, p.dfinal.row, entry, p.dfinal.step,
                                      task.channel + i, p.dfinal.channel)]);
      }
    }
  }
};

// dweight and dbias: the rows of `partial` added from first to last.
struct ReduceKernel {
  using Params = Backward;
  using Shared = Empty;
  static constexpr int kThreads = 128, kMinBlocks = 1;
  static constexpr bool kReduces = false;

  static NEMO_HD void walk(const Params& p, int64_t block, int thread, Shared&) {
    const int64_t index = block * kThreads + thread;
    const int64_t channel = index % p.dim, w = index / p.dim;
    if (w > p.width) return;
    const int64_t rows = ceil_div(p.batch * ceil_div(p.tokens, p.chunk), kWarps);
    const float* partial = p.partial + index;
    float total = 0.0f;
#pragma unroll 8
    for (int64_t r = 0; r < rows; ++r) total += partial[offset(r, (p.width + 1) * p.dim)];
    if (w < p.width) {
      store_float(p.dweight, p.weight_dtype, channel * p.width + w, total);
    } else {
      store_float(p.dbias, p.bias_dtype, channel, total);
    }
  }
};

// Gradient of the initial states: entry j feeds tap j - k of the sequence's token k, and the final
// state where the sequence is shorter than W-1. One thread per sequence and channel.
template <class T, int W>
struct InitialKernel {
  using Params = Backward;
  using Shared = Empty;
  static constexpr int kThreads = 128, kMinBlocks = 1;
  static constexpr bool kReduces = false;

  static NEMO_HD void walk(const Params& p, int64_t block, int thread, Shared&) {
    const int64_t index = block * kThreads + thread;
    const int64_t sequence = index / p.dim;
    if (sequence >= p.sequences) return;
    const Span span(p, sequence);
    const int64_t row = p.cu_seqlens == nullptr ? sequence : 0;
    const int64_t channel = index % p.dim;
    const Filter<W, 1> filter(p, channel, 1);
    Window<T, W, 1, false> window;
    window.fill(p, span, row, span.begin, channel, 1);
    float grad[W - 1];
#pragma unroll
    for (int j = 0; j < W - 1; ++j) grad[j] = 0.0f;
    const int64_t length = span.end - span.begin;
#pragma unroll
    for (int k = 0; k < W - 1; ++k) {
      if (k >= length) break;
      const int64_t token = span.begin + k;
      const int32_t own = p.seq_idx != nullptr ? id_at(p, row, token) : 0;
      float x[1] = {at<T>(p.x, row, token, channel)}, v[1];
      if (own >= 0) {
        filter.apply(window, x, own, v);
        const float dy = at<T>(p.dy, row, token, channel);
        const float dv = through_activation<T>(p.silu, dy, v[0]);
#pragma unroll
        for (int j = k; j < W - 1; ++j) {
          if (window.id[j - k] == own) grad[j] = fma(filter.weight[j - k][0], dv, grad[j]);
        }
      }
      window.push(x, own);
    }
    T* to = static_cast<T*>(p.dinitial.data);
#pragma unroll
    for (int j = 0; j < W - 1; ++j) {
      if (p.dfinal.data != nullptr && j >= length && carried(p, row, -1)) {
        grad[j] += at<T>(p.dfinal, sequence, j - length, channel);
      }
      to[offset(sequence, p.dinitial.row, j, p.dinitial.step, channel,
                p.dinitial.channel)] = from_float<T>(grad[j]);
    }
  }

 private:
  template <class U>
  static NEMO_HD float at(const View& view, int64_t row, int64_t step, int64_t channel) {
    return to_float(static_cast<const U*>(
        view.data)[offset(row, view.row, step, view.step, channel, view.channel)]);
  }
};

template <class T>
void run_backward(const Backward& p, Stream stream) {
  static_switch<2, 3, 4>(p.width, [&](auto W) {
    static_switch<0, 1>(p.aligned, [&](auto kAligned) {
      using Kernel = BackwardKernel<T, W, kAligned>;
      launch<Kernel>(p, blocks_of<Kernel::kVec>(p), stream);
    });
    if (p.dinitial.data != nullptr) {
      using Kernel = InitialKernel<T, W>;
      launch<Kernel>(p, ceil_div(p.sequences * p.dim, Kernel::kThreads), stream);
    }
  });
  launch<ReduceKernel>(p, ceil_div((p.width + 1) * p.dim, ReduceKernel::kThreads), stream);
}

}  // namespace nemo::conv1d
