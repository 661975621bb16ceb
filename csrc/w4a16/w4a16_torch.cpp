// nemokernels_C::w4a16_product: tensors to parameters. Callers have checked shapes and dtypes and
// allocated the output (contiguous).
#include "nemo/static_switch.h"
#include "torch_stable.h"
#include "w4a16/w4a16.h"

namespace nemo::w4a16 {
namespace {

using Optional = std::optional<Tensor>;

const uint8_t* bytes(const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Byte && t.is_contiguous(),
                  "expected contiguous bytes");
  return static_cast<const uint8_t*>(t.data_ptr());
}

template <class T>
const char* run_wide_part(Product& p, const OnDevice& device) {
  if (p.rows == 0 || p.width == 0) return nullptr;
  if (p.depth == 0) return "expected something to multiply";
  switch (p.part) {
    case Part::kPlain: return run_wide<T, Part::kPlain>(p, device.stream());
    case Part::kUp: return run_wide<T, Part::kUp>(p, device.stream());
    default: return run_wide<T, Part::kSlots>(p, device.stream());
  }
}

void product(Tensor x, Tensor codes, Tensor scales, Tensor global_scale, Optional order,
             Optional offsets, Optional tile_expert, Optional tile_row, int64_t top_k, int64_t part,
             int64_t rows, int64_t first, bool early, Tensor out) {
  const OnDevice device(x);
  Product p{};
  p.rows = out.size(0);
  p.width = out.size(1);
  p.depth = x.size(1);
  p.x = x.data_ptr();
  p.x_row = x.stride(0);
  p.codes = bytes(codes);
  p.scales = bytes(scales);
  STD_TORCH_CHECK(global_scale.scalar_type() == ScalarType::Float, "expected float32 scales");
  p.global_scale = static_cast<const float*>(global_scale.data_ptr());
  p.out = out.data_ptr();
  p.part = static_cast<Part>(part);
  p.order = int32_data(order);
  p.offsets = int32_data(offsets);
  p.tile_expert = int32_data(tile_expert);
  p.tile_row = int32_data(tile_row);
  p.experts = offsets ? offsets->size(0) : 1;
  p.tiles = tile_expert ? tile_expert->size(0) : p.rows;
  p.top_k = top_k;
  STD_TORCH_CHECK(codes.dim() >= 4, "expected a weight in tiles of 16 x 64");
  p.weight_tiles = codes.size(codes.dim() - 4);
  p.first_tile = first / 16;
  STD_TORCH_CHECK(first >= 0 && first % 16 == 0 &&
                      p.first_tile + ceil_div(p.width, 16) <= p.weight_tiles,
                  "expected columns of the weight, from a multiple of 16 on");
  const int64_t unit_tiles = p.weight_tiles * ceil_div(p.depth, 64);
  STD_TORCH_CHECK(codes.numel() == p.experts * unit_tiles * 512 &&
                      scales.numel() == p.experts * unit_tiles * 64,
                  "expected a weight in tiles of 16 x 64");
  STD_TORCH_CHECK(p.part == Part::kPlain || (order && offsets && order->numel() == p.rows &&
                                             (rows != kWide || tile_expert) &&
                                             (!tile_expert ||
                                              (tile_row && tile_row->numel() == p.tiles))),
                  "expected the route of every row");
  constexpr int64_t kMost = int64_t{1} << 31;
  STD_TORCH_CHECK(p.part != Part::kUp || (0 < top_k && top_k < kMost), "expected slots of a token");
  STD_TORCH_CHECK(x.size(0) * (p.part == Part::kUp ? top_k : 1) >= p.rows,
                  "expected a row per token to go up, else one per row of the result");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(p.x) % 16 == 0 && p.x_row % 8 == 0 &&
                      p.depth % 16 == 0 && (x.stride(1) == 1 || p.depth <= 1),
                  "expected rows of x aligned to 16 bytes");
  const bool brain = x.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(!early || rows == kFewest, "expected ", kFewest, " rows per block to be early");
  if (rows == kWide) {
    STD_TORCH_CHECK(brain || x.scalar_type() == ScalarType::Half, "expected bfloat16 or float16");
    STD_TORCH_CHECK(p.width % 8 == 0 && reinterpret_cast<uintptr_t>(p.out) % 16 == 0 &&
                        reinterpret_cast<uintptr_t>(p.codes) % 16 == 0 &&
                        reinterpret_cast<uintptr_t>(p.scales) % 16 == 0,
                    "expected codes, scales and rows of the result aligned to 16 bytes");
    STD_TORCH_CHECK(p.rows < kMost && p.depth < kMost, "expected fewer elements");
    const char* refused = brain ? run_wide_part<bf16>(p, device) : run_wide_part<fp16>(p, device);
    STD_TORCH_CHECK(refused == nullptr, refused ? refused : "");
    device.check();
    return;
  }
  STD_TORCH_CHECK(brain || x.scalar_type() == ScalarType::Half, "expected bfloat16 or float16");
  if (early) {
    const auto launch = brain ? run_product<bf16, kFewest, true> : run_product<fp16, kFewest, true>;
    launch(p, device.stream());
    device.check();
    return;
  }
  const bool known = static_switch<kFewest, 16, 32>(int(rows), [&](auto columns) {
    const auto launch = brain ? run_product<bf16, columns, false> : run_product<fp16, columns, false>;
    launch(p, device.stream());
  });
  STD_TORCH_CHECK(known, "expected 8, 16, 32 or 256 rows per block, got ", rows);
  device.check();
}

STABLE_TORCH_LIBRARY_IMPL(nemokernels_C, NEMO_DEVICE_KEY, m) {
  m.impl("w4a16_product", TORCH_BOX(&product));
}

}  // namespace
}  // namespace nemo::w4a16
