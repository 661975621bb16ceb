// Causal depthwise convolution: parameters of the kernels and the functions that launch them.
//
// b row, t token, c channel, w tap, s sequence; W taps. Inputs and outputs are channel-last
// (b, t, c), states (s, entry, c) with the oldest entry first. Strides count elements.
#pragma once

#include "nemo/launch.h"

namespace nemo::conv1d {

// data may be null where the operand is optional.
struct View {
  void* data;
  int64_t row, step, channel;
};

// What forward and backward share.
struct Problem {
  int64_t batch, tokens, dim;
  int64_t sequences;
  int64_t chunk;  // tokens per warp
  int32_t width;
  bool silu;
  bool aligned;  // x, dy, y, dx may be accessed 16 bytes at a time
  View x;        // channel stride 1
  View initial;  // (sequences, W-1, dim), optional

  const void* weight;  // (dim, W)
  int64_t weight_channel, weight_tap;
  const void* bias;  // (dim), optional
  int64_t bias_channel;
  Dtype weight_dtype, bias_dtype;

  // At most one of the two; without either every row is a sequence.
  const int32_t* seq_idx;  // (batch, tokens)
  int64_t seq_idx_row, seq_idx_step;
  const int32_t* cu_seqlens;  // (sequences + 1), contiguous, batch is 1
};

struct Forward : Problem {
  void* y;      // (batch, tokens, dim) contiguous
  View states;  // (sequences, state_len, dim), optional
  int64_t state_len;
};

struct Backward : Problem {
  View dy;         // channel stride 1
  View dfinal;     // (sequences, W-1, dim), optional
  View dx;         // channel stride 1
  View dinitial;   // (sequences, W-1, dim), optional
  float* partial;  // (token blocks, W+1, dim): W weight gradients and the bias gradient
  void* dweight;   // (dim, W) contiguous, weight_dtype
  void* dbias;     // (dim) contiguous, bias_dtype
};

struct Update {
  int64_t batch, tokens, dim, slots, state_len;
  int32_t width;
  bool silu;
  View x;      // (batch, tokens, dim)
  View state;  // (slots, state_len, dim), changed in place
  void* y;     // (batch, tokens, dim) contiguous

  const void* weight;
  int64_t weight_channel, weight_tap;
  const void* bias;
  int64_t bias_channel;
  Dtype weight_dtype, bias_dtype;

  // (batch) each, contiguous, optional; at most one of the first two.
  const int32_t* cache_seqlens;
  const int32_t* num_accepted;
  const int32_t* slot;
};

// Warps of a forward or backward block; each walks `chunk` tokens of 32 lanes' channels.
inline constexpr int kWarps = 4;

// Blocks along the tokens, which is the first size of Backward::partial.
inline int64_t token_blocks(const Problem& p) {
  return ceil_div(p.batch * ceil_div(p.tokens, p.chunk), kWarps);
}

// T is the number format of inputs, outputs and states: float, nemo::bf16, nemo::fp16.
template <class T>
void run_forward(const Forward&, Stream);
template <class T>
void run_states(const Forward&, Stream);
template <class T>
void run_backward(const Backward&, Stream);
template <class T>
void run_update(const Update&, Stream);

}  // namespace nemo::conv1d
