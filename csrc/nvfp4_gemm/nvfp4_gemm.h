// Products of matrices in NVFP4 on the block-scaled matrix units of Blackwell, by CUTLASS.
//
//   dense:    out (rows, columns) = alpha * a (rows, depth) @ b (columns, depth)^T
//   grouped:  the same per expert, whose rows follow each other in a and out
//
// Codes are packed E2M1, the even element in the low nibble, contiguous. Scales are E4M3, one per
// 16 elements, in tiles of 128 rows x 4 columns, zero-padded to whole tiles. out is bfloat16,
// contiguous. Each architecture has sources of its own, named after it: neither's instructions
// exist on the other.
#pragma once

#include <cstddef>
#include <cstdint>

#include "nemo/launch.h"

namespace nemo::nvfp4_gemm {

// A row of a, b and out is a multiple of 16 bytes, the unit of the tensor memory accelerator.
constexpr int kDepthUnit = 32;  // elements of 4 bits
constexpr int kColumnUnit = 8;  // bfloat16
constexpr int kAlignment = 16;  // bytes, of every pointer

struct Dense {
  int64_t rows, columns, depth;  // each below 2^31
  const void *a, *b;
  const void *a_scales, *b_scales;
  const float* alpha;  // one, on the device
  void* out;
};

struct Grouped {
  int64_t experts, rows, columns, depth;  // rows of all experts together
  // out has the columns of the result from the first one, a multiple of 128, on.
  int64_t first_column, b_columns;
  const void *a, *b;                      // (rows, depth), (experts, b_columns, depth)
  // An expert's scales of a begin at the next whole tile after those of the expert before it; its
  // scales of b are padded to whole tiles.
  const void *a_scales, *b_scales;
  const float* alpha;      // (experts)
  const int32_t* offsets;  // (experts): the end of each one's rows, on the device
  bool squared_relu;       // relu(out)^2 before it is rounded
  void* out;
};

// Bytes of the block scales of a matrix, padded to whole tiles.
NEMO_HD int64_t scale_bytes(int64_t rows, int64_t depth) {
  return ceil_div(rows, 128) * 128 * (ceil_div(depth, 64) * 4);
}

// What one expert of p multiplies. Ends that decrease or lie beyond the rows make empty groups:
// nothing is read or written out of bounds whatever the offsets are.
NEMO_HD Dense group(const Grouped& p, int64_t e) {
  int64_t first = 0, end = 0, scales = 0;
  for (int64_t i = 0; i <= e; ++i) {
    scales += scale_bytes(end - first, p.depth);
    first = end;
    end = larger(first, smaller<int64_t>(p.offsets[i], p.rows));
  }
  const auto at = [](const void* base, int64_t bytes) {
    return static_cast<const char*>(base) + bytes;
  };
  Dense d{};
  d.rows = end - first;
  d.columns = p.columns;
  d.depth = p.depth;
  d.a = at(p.a, first * p.depth / 2);
  d.b = at(p.b, (e * p.b_columns + p.first_column) * p.depth / 2);
  d.a_scales = at(p.a_scales, scales);
  d.b_scales = at(p.b_scales, e * scale_bytes(p.b_columns, p.depth) +
                                  scale_bytes(p.first_column, p.depth));
  d.alpha = p.alpha + e;
  d.out = const_cast<char*>(at(p.out, first * p.columns * 2));
  return d;
}

// Bytes that a launch needs beside its operands.
size_t workspace_sm100a(const Dense&);
size_t workspace_sm100a(const Grouped&);
size_t workspace_sm120a(const Dense&);
size_t workspace_sm120a(const Grouped&);

// Launches; what CUTLASS says if it refuses, else null. The workspace is aligned to 256 bytes.
const char* run_sm100a(const Dense&, void* workspace, Stream);
const char* run_sm100a(const Grouped&, void* workspace, Stream);
const char* run_sm120a(const Dense&, void* workspace, Stream);
const char* run_sm120a(const Grouped&, void* workspace, Stream);

}  // namespace nemo::nvfp4_gemm
