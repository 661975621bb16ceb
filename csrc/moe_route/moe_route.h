// Routing of a few tokens in one launch: parameters and the function that launches it.
#pragma once

#include "nemo/launch.h"

namespace nemo::moe_route {

inline constexpr int kMostExperts = 512;
inline constexpr int kMostChosen = 32;   // experts of a token, and groups: one per lane
inline constexpr int kMostSlots = 2048;  // tokens * top_k

struct Route {
  int64_t tokens;
  int32_t experts, top_k;
  int32_t n_group, topk_group;  // groups of experts, and how many of them are kept
  bool normalise;
  float scale;

  const void* logits;
  Dtype logits_dtype;
  int64_t logits_row, logits_column;
  const void* bias;  // may be null
  Dtype bias_dtype;
  int64_t bias_stride;

  float* weights;                      // (tokens, top_k)
  int32_t* chosen;                     // (tokens, top_k)
  int32_t *counts, *offsets, *order;  // (experts), (experts), (tokens * top_k)
};

// Returns why the device cannot run it, or null.
const char* run(const Route&, Stream);

}  // namespace nemo::moe_route
