// SPDX-License-Identifier: Apache-2.0
#include "cpu/wsearch.h"

#include "ops/wsearch_common.h"

namespace kvopt::ops {
namespace {

int64_t grain_rows(int64_t k) { return std::max<int64_t>(1, (int64_t{1} << 12) / k); }

template <typename T>
void search(const SearchCall& c) {
  const SearchParams<T> p = c.params<T>();
  const auto errors = cpu::candidate_errors<T>(cpu::selected_isa());
  torch::stable::parallel_for(0, p.n, grain_rows(p.k), [&](int64_t begin, int64_t end) {
    cpu::wsearch(p, errors, begin, end);
  });
}

}  // namespace

Triple wsearch_cpu(Tensor weight, std::optional<Tensor> importance, int64_t bits,
                   int64_t group_size, int64_t scheme, int64_t steps, double smallest) {
  const SearchCall c = make_search(weight, importance, bits, group_size, scheme, steps, smallest);
  c.is_double ? search<double>(c) : search<float>(c);
  return {c.codes, c.scale, c.zero};
}

Triple wsearch_hqq_cpu(Tensor weight, int64_t bits, int64_t group_size, int64_t scheme,
                       int64_t iterations, double beta, double kappa, double norm) {
  const HqqCall c = make_hqq(weight, bits, group_size, scheme, iterations, beta, kappa, norm);
  torch::stable::parallel_for(
      0, c.params.n, grain_rows(c.params.k),
      [&](int64_t begin, int64_t end) { cpu::wsearch_hqq(c.params, begin, end); });
  return {c.codes, c.scale, c.zero};
}

}  // namespace kvopt::ops
