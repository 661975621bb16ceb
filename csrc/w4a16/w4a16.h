// Products of a few rows with NVFP4 weights: parameters and the function that launches them.
//
// A weight (N, depth) lies in tiles of 16 rows and 64 columns, zero-padded: codes
// (N/16, depth/64, 16, 32) and E4M3 block scales (N/16, depth/64, 16, 4), bytes. In a block of 16
// elements byte i holds element i in its low and element i + 8 in its high nibble.
#pragma once

#include "nemo/tensor_map.h"

namespace nemo::w4a16 {

enum class Part : int32_t {
  kPlain,  // one weight, a row of x per row of out
  kUp,     // experts; x has a row per token; relu squared
  kSlots,  // experts; a row goes where its slot is
};

struct Product {
  int64_t rows, width, depth;
  int64_t weight_tiles, first_tile;  // of 16 rows: what each weight has, where out begins
  const void* x;  // rows of depth elements, aligned to 16 bytes
  int64_t x_row;
  const uint8_t *codes, *scales;
  const float* global_scale;  // one per expert
  void* out;                  // (rows, width) contiguous
  Part part;

  // Of experts: the slot of each row, the end of each expert's rows, tiles of rows (expert or -1,
  // first row), which may be null for up to 32 rows of x per block.
  const int32_t *order, *offsets, *tile_expert, *tile_row;
  int64_t experts, tiles;
  int64_t top_k;

  TensorMap x_map;  // of run_wide
};

// T is nemo::bf16 or nemo::fp16; kColumns rows of x per block: 8, 16 or 32. kEarly, of the fewest: as
// in launch.h, behind a kernel that writes x alone.
inline constexpr int kFewest = 8;
template <class T, int kColumns, bool kEarly>
void run_product(const Product&, Stream);

// The same for kWide rows of x per block, on sm_90 alone. Returns why not, or null.
inline constexpr int kWide = 256;
template <class T, Part kPart>
const char* run_wide(Product&, Stream);

}  // namespace nemo::w4a16
