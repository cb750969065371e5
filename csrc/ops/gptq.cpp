// SPDX-License-Identifier: Apache-2.0
#include "cpu/gptq.h"

#include "ops/gptq_common.h"

namespace kvopt::ops {
namespace {

template <typename T>
void solve(const GptqCall& c) {
  const GptqBlockParams<T> p = c.params<T>();
  const auto errors = cpu::candidate_errors<T>(cpu::selected_isa());
  constexpr int64_t kGrainRows = 4;
  torch::stable::parallel_for(0, p.n, kGrainRows, [&](int64_t begin, int64_t end) {
    cpu::gptq_block(p, errors, begin, end);
  });
}

}  // namespace

Quadruple gptq_block_cpu(Tensor weight, Tensor factor, std::optional<Tensor> importance,
                         std::optional<Tensor> scale, std::optional<Tensor> zero, int64_t begin,
                         int64_t end, int64_t bits, int64_t group_size, int64_t scheme,
                         int64_t steps, double smallest) {
  const GptqCall c = make_gptq(weight, factor, importance, scale, zero, begin, end, bits,
                               group_size, scheme, steps, smallest);
  c.is_double ? solve<double>(c) : solve<float>(c);
  return {c.codes, c.errors, c.scale, c.zero};
}

}  // namespace kvopt::ops
