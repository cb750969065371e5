// SPDX-License-Identifier: Apache-2.0
// MiniCache's merge of two vectors, common/kv_store.h: three sums over the channels, then one pass
// that writes the direction.
#include <cmath>

#include "cpu/kv.h"
#include "cpu/kv_numbers.h"

namespace kvopt::cpu {
namespace {

template <typename Real>
void merge(const KvMergeParams& p, int64_t vector) {
  const Real pi = static_cast<Real>(3.14159265358979323846), t = static_cast<Real>(p.t_double);
  const Real nearly_straight = static_cast<Real>(1e-4);
  Real u[kKvMostDim], v[kKvMostDim];
  kv_load(p.type, p.a, vector * p.dim, p.dim, u);
  kv_load(p.type, p.b, vector * p.dim, p.dim, v);
  const auto norm_of = [&](auto at) {
    Real sum = 0;
    for (int64_t d = 0; d < p.dim; ++d) sum += at(d) * at(d);
    return std::sqrt(sum);
  };
  const Real norm_a = norm_of([&](int64_t d) { return u[d]; });
  const Real norm_b = norm_of([&](int64_t d) { return v[d]; });
  for (int64_t d = 0; d < p.dim; ++d) {
    u[d] = norm_a == 0 ? 0 : u[d] / norm_a;
    v[d] = norm_b == 0 ? 0 : v[d] / norm_b;
  }
  Real of_u = 1, of_v = 1, angle = 0;  // a zero vector adds nothing to the other's direction
  if (norm_a != 0 && norm_b != 0) {
    angle = 2 * std::atan2(norm_of([&](int64_t d) { return u[d] - v[d]; }),
                           norm_of([&](int64_t d) { return u[d] + v[d]; }));
    const Real sine = std::sin(angle);
    if (sine < nearly_straight) {
      of_u = 1 - t, of_v = t;
      const Real length = norm_of([&](int64_t d) { return of_u * u[d] + of_v * v[d]; });
      if (length < nearly_straight) {
        of_u = 1, of_v = 0;
      } else {
        of_u /= length, of_v /= length;
      }
    } else {
      of_u = std::sin((1 - t) * angle) / sine;
      of_v = std::sin(t * angle) / sine;
    }
  }
  for (int64_t d = 0; d < p.dim; ++d) u[d] = of_u * u[d] + of_v * v[d];
  kv_save(p.type, u, p.dim, p.direction, vector * p.dim);
  p.norm_a[vector] = static_cast<float>(norm_a);
  p.norm_b[vector] = static_cast<float>(norm_b);
  p.distance[vector] = static_cast<float>(angle / pi);
}

}  // namespace

void kv_merge_pair(const KvMergeParams& p, int64_t begin, int64_t end) {
  for (int64_t vector = begin; vector < end; ++vector) {
    is_double(p.type) ? merge<double>(p, vector) : merge<float>(p, vector);
  }
}

}  // namespace kvopt::cpu
