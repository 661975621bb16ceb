// Products of the rows of each expert with its weights: parameters and the function that launches
// them. Rows are sorted by expert; there is one per slot, T * k or as many as a ragged route has.
#pragma once

#include "nemo/tensor_map.h"

namespace nemo::moe_experts {

enum class Part : int32_t {
  kUp,       // a has a row per token; relu squared
  kSlots,    // a has a row per slot; a row of the result goes where its slot is
  kDHidden,  // a has a row per token; the gradient past squared ReLU and the slots' weights
};

struct Product {
  int64_t rows, columns, depth;  // of the result; what is summed over
  int64_t first;                 // column of the weights where the result begins
  const void* a;                 // rows of `depth` elements, aligned to 16 bytes
  int64_t a_row;
  void* out;  // contiguous, aligned to 16 bytes
  TensorMap a_map, b_map;

  // The slot of each row, the end of each expert's rows, tiles of kRows rows: expert (or none, -1)
  // and first row.
  const int32_t *order, *offsets, *tile_expert, *tile_row;
  int64_t experts, tiles, top_k;
  const int32_t* tokens;  // of each slot, in a ragged route; else null: slot / top_k

  // Of kDHidden: the weight of each slot; what went up, (rows, columns); the sums of its products
  // with the gradient over the columns of a tile, (tiles across, rows), each where its slot is.
  const float* weights;
  const void* hidden;
  float* partial;

  // Of E4M3 operands: the scale of a, one or one per token, or that of each expert's hidden rows;
  // of the weights, one per expert or one per column of each; of what comes up, one per expert.
  const float *a_scale, *b_scale, *out_scale;
  bool per_token, per_column;
  int64_t b_width;  // columns of the weights
};

inline constexpr int kRows = 128;  // of a tile

// The weights (E, columns, depth) lie along their depth or, kAcross, along their columns.
struct Operands {
  TensorShape a, b;
};

// T is nemo::bf16, nemo::fp16 or nemo::e4m3; kColumns of a tile: 192, 224, 232 or 256, of E4M3 128 or
// 192. Results are T's, but what E4M3 brings to the slots is bfloat16. Returns why not, or null.
template <class T, int kColumns, Part kPart, bool kAcross>
const char* run_product(Product&, const Operands&, Stream);

}  // namespace nemo::moe_experts
