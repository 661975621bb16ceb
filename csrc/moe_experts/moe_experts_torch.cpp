// nemokernels_C::moe_experts_product: tensors to parameters. Callers have checked shapes and dtypes
// and allocated the output (contiguous).
#include "moe_experts/moe_experts.h"
#include "nemo/static_switch.h"
#include "torch_stable.h"

namespace nemo::moe_experts {
namespace {

using Optional = std::optional<Tensor>;

constexpr int64_t kMost = int64_t{1} << 31;  // the tensor memory accelerator counts in 32 bits
constexpr const char* kNoTile = "expected tiles of another width";

bool aligned(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0; }

const float* reals(const Optional& t, int64_t count) {
  STD_TORCH_CHECK(t && t->scalar_type() == ScalarType::Float && t->is_contiguous() &&
                      t->numel() == count,
                  "expected as many float32 values as the sizes say");
  return static_cast<const float*>(t->data_ptr());
}

template <class T>
const char* run(Part part, int columns, bool across, Product& p, const Operands& operands,
                Stream stream) {
  const char* refused = kNoTile;
  if (part == Part::kDHidden) {
    if (columns == 192) refused = run_product<T, 192, Part::kDHidden, true>(p, operands, stream);
  } else if (across) {
    static_switch<192, 256>(columns, [&](auto n) {
      refused = run_product<T, n, Part::kSlots, true>(p, operands, stream);
    });
  } else {
    static_switch<192, 224, 232, 256>(columns, [&](auto n) {
      refused = part == Part::kSlots ? run_product<T, n, Part::kSlots, false>(p, operands, stream)
                                     : run_product<T, n, Part::kUp, false>(p, operands, stream);
    });
  }
  return refused;
}

const char* run_e4m3(Part part, int columns, Product& p, const Operands& operands, Stream stream) {
  const char* refused = kNoTile;
  static_switch<128, 160>(columns, [&](auto n) {
    refused = part == Part::kSlots
                  ? run_product<e4m3, n, Part::kSlots, false>(p, operands, stream)
                  : run_product<e4m3, n, Part::kUp, false>(p, operands, stream);
  });
  return refused;
}

void set_gradient(const Optional& weights, const Optional& hidden, const Optional& partial,
                  int columns, const Tensor& out, Product& p) {
  p.weights = reals(weights, p.rows);
  p.partial = const_cast<float*>(reals(partial, ceil_div(p.columns, columns) * p.rows));
  STD_TORCH_CHECK(hidden && hidden->scalar_type() == out.scalar_type() &&
                      hidden->is_contiguous() && hidden->numel() == out.numel() &&
                      aligned(*hidden),
                  "expected what went up, as large as the result and aligned to 16 bytes");
  p.hidden = hidden->data_ptr();
}

void set_scales(const Optional& a, const Optional& b, const Optional& out, Part part,
                int64_t tokens, Product& p) {
  STD_TORCH_CHECK(a && b, "expected the scales of both operands");
  p.per_token = part == Part::kUp && a->numel() != 1;
  p.per_column = b->numel() != p.experts;
  p.a_scale = reals(a, p.per_token ? tokens : part == Part::kUp ? 1 : p.experts);
  p.b_scale = reals(b, p.per_column ? p.experts * p.b_width : p.experts);
  if (part == Part::kUp) p.out_scale = reals(out, p.experts);
}

void product(Tensor a, Tensor weights, Tensor order, Tensor offsets, Optional tokens,
             Tensor tile_expert, Tensor tile_row, Optional slot_weights, Optional hidden,
             Optional partial, Optional a_scale, Optional b_scale, Optional out_scale,
             int64_t top_k, int64_t part, int64_t tile_columns, int64_t first, Tensor out) {
  const OnDevice device(a);
  const auto kind = static_cast<Part>(part);
  const bool eight = a.scalar_type() == ScalarType::Byte;  // E4M3
  const ScalarType result =
      eight && kind == Part::kSlots ? ScalarType::BFloat16 : a.scalar_type();
  STD_TORCH_CHECK(a.dim() == 2 && weights.dim() == 3 && out.dim() == 2, "expected rows, weights");
  STD_TORCH_CHECK(a.scalar_type() == weights.scalar_type() && out.scalar_type() == result,
                  "expected operands of one dtype");
  Product p{};
  p.rows = out.size(0);
  p.columns = out.size(1);
  p.depth = a.size(1);
  p.first = first;
  p.a = a.data_ptr();
  p.a_row = a.stride(0);
  p.out = out.data_ptr();
  p.order = int32_data(order);
  p.offsets = int32_data(offsets);
  p.tokens = int32_data(tokens);
  p.tile_expert = int32_data(tile_expert);
  p.tile_row = int32_data(tile_row);
  p.experts = weights.size(0);
  p.tiles = tile_expert.numel();
  p.top_k = top_k;
  p.b_width = weights.size(1);
  STD_TORCH_CHECK(weights.size(2) == p.depth && offsets.numel() == p.experts &&
                      order.numel() == p.rows && tile_row.numel() == p.tiles,
                  "expected the route of every row and weights of as many experts");
  STD_TORCH_CHECK(first >= 0 && first + p.columns <= p.b_width, "expected columns of the weights");
  STD_TORCH_CHECK(!tokens || tokens->numel() == p.rows, "expected a token of every slot");
  STD_TORCH_CHECK((tokens && kind != Part::kSlots) ||
                      a.size(0) * (kind == Part::kSlots ? 1 : top_k) == p.rows,
                  "expected a row per token, or per slot where they go there");
  // Along the depth or, transposed, across it.
  const bool across = weights.stride(2) != 1;
  const int64_t line = weights.stride(across ? 2 : 1), size = eight ? 1 : 2, unit = 16 / size;
  STD_TORCH_CHECK(kind == Part::kSlots ? !(across && eight)
                                       : across == (kind == Part::kDHidden) &&
                                             !(eight && kind == Part::kDHidden),
                  "expected weights along their depth to go up, across it for the gradient");
  if (kind == Part::kDHidden) {
    set_gradient(slot_weights, hidden, partial, int(tile_columns), out, p);
  }
  if (eight) set_scales(a_scale, b_scale, out_scale, kind, a.size(0), p);
  STD_TORCH_CHECK(p.columns % unit == 0 && p.depth % unit == 0 && p.b_width % unit == 0 &&
                      p.columns > 0 && p.depth > 0,
                  "expected widths that are multiples of 16 bytes");
  STD_TORCH_CHECK(aligned(a) && aligned(weights) && aligned(out) && a.stride(1) == 1 &&
                      a.stride(0) % unit == 0 && (!across || weights.stride(1) == 1) &&
                      line % unit == 0 && weights.stride(0) % unit == 0 && out.is_contiguous(),
                  "expected operands aligned to 16 bytes");
  STD_TORCH_CHECK(p.rows < kMost && p.b_width < kMost && p.depth < kMost && top_k < kMost,
                  "expected fewer elements");
  const Operands operands{
      {p.a, {p.depth, p.rows, 1}, {p.a_row * size, p.rows * p.a_row * size}, 0},
      {weights.data_ptr(),
       {across ? p.b_width : p.depth, across ? p.depth : p.b_width, p.experts},
       {line * size, weights.stride(0) * size},
       0}};
  const char* refused = nullptr;
  switch (a.scalar_type()) {
    case ScalarType::BFloat16:
      refused = run<bf16>(kind, int(tile_columns), across, p, operands, device.stream());
      break;
    case ScalarType::Half:
      refused = run<fp16>(kind, int(tile_columns), across, p, operands, device.stream());
      break;
    default:
      STD_TORCH_CHECK(eight, "expected bfloat16, float16 or bytes of E4M3");
      refused = run_e4m3(kind, int(tile_columns), p, operands, device.stream());
  }
  STD_TORCH_CHECK(refused == nullptr, refused ? refused : "");
  device.check();
}

STABLE_TORCH_LIBRARY_IMPL(nemokernels_C, NEMO_DEVICE_KEY, m) {
  m.impl("moe_experts_product", TORCH_BOX(&product));
}

}  // namespace
}  // namespace nemo::moe_experts
