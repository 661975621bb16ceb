// nemokernels_C::moe_route: tensors to parameters. Callers have checked shapes and dtypes and
// allocated the outputs (contiguous).
#include "moe_route/moe_route.h"
#include "torch_stable.h"

namespace nemo::moe_route {
namespace {

int32_t* rows(const Tensor& t, int64_t count) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int && t.numel() == count && t.is_contiguous(),
                  "expected ", count, " contiguous int32");
  return static_cast<int32_t*>(t.data_ptr());
}

void route(Tensor logits, std::optional<Tensor> bias, int64_t top_k, int64_t n_group,
           int64_t topk_group, bool normalise, double scale, Tensor weights, Tensor chosen,
           Tensor counts, Tensor offsets, Tensor order) {
  const OnDevice device(logits);
  STD_TORCH_CHECK(logits.dim() == 2, "expected two axes, got ", logits.dim());
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  STD_TORCH_CHECK(0 < experts && experts <= kMostExperts && tokens * top_k <= kMostSlots,
                  "expected at most ", kMostExperts, " experts and ", kMostSlots, " slots");
  STD_TORCH_CHECK(0 < topk_group && topk_group <= n_group && n_group <= kMostChosen &&
                      experts % n_group == 0,
                  "expected at most ", kMostChosen, " groups of equal size");
  STD_TORCH_CHECK(0 < top_k && top_k <= kMostChosen && top_k <= experts / n_group * topk_group,
                  "expected at most ", kMostChosen, " experts per token, out of the groups kept");
  Route p{};
  p.tokens = tokens;
  p.experts = int32_t(experts);
  p.top_k = int32_t(top_k);
  p.n_group = int32_t(n_group);
  p.topk_group = int32_t(topk_group);
  p.normalise = normalise;
  p.scale = float(scale);
  p.logits = logits.data_ptr();
  p.logits_dtype = dtype_of(logits);
  p.logits_row = logits.stride(0);
  p.logits_column = logits.stride(1);
  if (bias) {
    STD_TORCH_CHECK(bias->numel() == experts, "expected a bias per expert");
    p.bias = bias->data_ptr();
    p.bias_dtype = dtype_of(*bias);
    p.bias_stride = bias->stride(0);
  }
  STD_TORCH_CHECK(weights.scalar_type() == ScalarType::Float && weights.is_contiguous() &&
                      weights.numel() == tokens * top_k,
                  "expected a contiguous float32 weight per slot");
  p.weights = static_cast<float*>(weights.data_ptr());
  p.chosen = rows(chosen, tokens * top_k);
  p.counts = rows(counts, experts);
  p.offsets = rows(offsets, experts);
  p.order = rows(order, tokens * top_k);
  const char* refused = run(p, device.stream());
  STD_TORCH_CHECK(refused == nullptr, refused ? refused : "");
  device.check();
}

STABLE_TORCH_LIBRARY_IMPL(nemokernels_C, NEMO_DEVICE_KEY, m) {
  m.impl("moe_route", TORCH_BOX(&route));
}

}  // namespace
}  // namespace nemo::moe_route
