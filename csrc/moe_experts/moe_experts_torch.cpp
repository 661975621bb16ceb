// nemokernels_C::moe_experts_product: tensors to parameters. Callers have checked shapes and dtypes
// and allocated the output (contiguous).
#include "moe_experts/moe_experts.h"
#include "nemo/static_switch.h"
#include "torch_stable.h"

namespace nemo::moe_experts {
namespace {

using Optional = std::optional<Tensor>;

constexpr int64_t kMost = int64_t{1} << 31;  // the tensor memory accelerator counts in 32 bits

bool aligned(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0; }

template <class T>
const char* run(Part part, int columns, bool across, Product& p, const Operands& operands,
                Stream stream) {
  const char* refused = "expected tiles of another width";
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

void gradient(const Optional& weights, const Optional& hidden, const Optional& partial, int columns,
              const Tensor& out, Product& p) {
  STD_TORCH_CHECK(weights && hidden && partial && weights->scalar_type() == ScalarType::Float &&
                      partial->scalar_type() == ScalarType::Float && weights->is_contiguous() &&
                      partial->is_contiguous() && weights->numel() == p.rows &&
                      partial->numel() == ceil_div(p.columns, columns) * p.rows,
                  "expected a float32 weight per slot and a sum per slot and tile");
  STD_TORCH_CHECK(hidden->scalar_type() == out.scalar_type() && hidden->is_contiguous() &&
                      hidden->numel() == out.numel() && aligned(*hidden),
                  "expected what went up, as large as the result and aligned to 16 bytes");
  p.weights = static_cast<const float*>(weights->data_ptr());
  p.hidden = hidden->data_ptr();
  p.partial = static_cast<float*>(partial->data_ptr());
}

void product(Tensor a, Tensor weights, Tensor order, Tensor offsets, Optional tokens,
             Tensor tile_expert, Tensor tile_row, Optional slot_weights, Optional hidden,
             Optional partial, int64_t top_k, int64_t part, int64_t tile_columns, int64_t first,
             Tensor out) {
  const OnDevice device(a);
  STD_TORCH_CHECK(a.dim() == 2 && weights.dim() == 3 && out.dim() == 2, "expected rows, weights");
  STD_TORCH_CHECK(a.scalar_type() == weights.scalar_type() && a.scalar_type() == out.scalar_type(),
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
  p.tile_expert = int32_data(tile_expert);
  p.tile_row = int32_data(tile_row);
  p.experts = weights.size(0);
  p.tiles = tile_expert.numel();
  p.top_k = top_k;
  const int64_t width = weights.size(1);
  STD_TORCH_CHECK(weights.size(2) == p.depth && offsets.numel() == p.experts &&
                      order.numel() == p.rows && tile_row.numel() == p.tiles,
                  "expected the route of every row and weights of as many experts");
  STD_TORCH_CHECK(first >= 0 && first + p.columns <= width, "expected columns of the weights");
  const auto kind = static_cast<Part>(part);
  p.tokens = int32_data(tokens);
  STD_TORCH_CHECK(!tokens || tokens->numel() == p.rows, "expected a token of every slot");
  STD_TORCH_CHECK((tokens && kind != Part::kSlots) ||
                      a.size(0) * (kind == Part::kSlots ? 1 : top_k) == p.rows,
                  "expected a row per token, or per slot where they go there");
  // Along the depth or, transposed, across it.
  const bool across = weights.stride(2) != 1;
  const int64_t line = weights.stride(across ? 2 : 1);
  STD_TORCH_CHECK(kind == Part::kSlots || across == (kind == Part::kDHidden),
                  "expected weights along their depth to go up, across it for the gradient");
  if (kind == Part::kDHidden) gradient(slot_weights, hidden, partial, int(tile_columns), out, p);
  STD_TORCH_CHECK(p.columns % 8 == 0 && p.depth % 8 == 0 && width % 8 == 0 && p.columns > 0 &&
                      p.depth > 0, "expected widths that are multiples of 8");
  STD_TORCH_CHECK(aligned(a) && aligned(weights) && aligned(out) && a.stride(1) == 1 &&
                      a.stride(0) % 8 == 0 && (!across || weights.stride(1) == 1) &&
                      line % 8 == 0 && weights.stride(0) % 8 == 0 && out.is_contiguous(),
                  "expected operands aligned to 16 bytes");
  STD_TORCH_CHECK(p.rows < kMost && width < kMost && p.depth < kMost, "expected fewer elements");
  const int64_t size = 2;
  const Operands operands{
      {p.a, {p.depth, p.rows, 1}, {p.a_row * size, p.rows * p.a_row * size}, 0},
      {weights.data_ptr(),
       {across ? width : p.depth, across ? p.depth : width, p.experts},
       {line * size, weights.stride(0) * size},
       0}};
  const auto of = [&](auto type) {
    using T = decltype(type);
    return run<T>(kind, int(tile_columns), across, p, operands, device.stream());
  };
  STD_TORCH_CHECK(a.scalar_type() == ScalarType::BFloat16 || a.scalar_type() == ScalarType::Half,
                  "expected bfloat16 or float16");
  const char* refused = a.scalar_type() == ScalarType::BFloat16 ? of(bf16{}) : of(fp16{});
  STD_TORCH_CHECK(refused == nullptr, refused ? refused : "");
  device.check();
}

STABLE_TORCH_LIBRARY_IMPL(nemokernels_C, NEMO_DEVICE_KEY, m) {
  m.impl("moe_experts_product", TORCH_BOX(&product));
}

}  // namespace
}  // namespace nemo::moe_experts
