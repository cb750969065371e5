// SPDX-License-Identifier: Apache-2.0
// MiniCache's merge of two vectors, common/kv_store.h: four sums over the channels, then one pass
// that writes the direction. Sums run in lanes, channel d in lane d % 8, so that the compiler
// vectorises them without changing a bit.
#include <cmath>

#include "cpu/kv.h"
#include "cpu/kv_numbers.h"

namespace kvopt::cpu {
namespace {

template <typename Real, typename At>
Real norm(int64_t dim, At at) {
  constexpr int64_t kLanes = 8;
  Real lanes[kLanes] = {};
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) lanes[i] += at(d + i) * at(d + i);
  }
  for (int64_t i = 0; d + i < dim; ++i) lanes[i] += at(d + i) * at(d + i);
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return std::sqrt(lanes[0]);
}

template <typename Real>
void merge(const KvMergeParams& p, int64_t vector) {
  const Real pi = static_cast<Real>(3.14159265358979323846), t = static_cast<Real>(p.t_double);
  const Real nearly_straight = static_cast<Real>(1e-4);
  Real u[kKvMostDim], v[kKvMostDim];
  kv_load(p.type, p.a, vector * p.dim, p.dim, u);
  kv_load(p.type, p.b, vector * p.dim, p.dim, v);
  const auto norm_of = [&](auto at) { return norm<Real>(p.dim, at); };
  const Real norm_a = norm_of([&](int64_t d) { return u[d]; });
  const Real norm_b = norm_of([&](int64_t d) { return v[d]; });
  for (int64_t d = 0; d < p.dim; ++d) {
    u[d] = norm_a == 0 ? 0 : u[d] / norm_a;
    v[d] = norm_b == 0 ? 0 : v[d] / norm_b;
  }
  Real of_u = 1, of_v = 1, angle = 0;  // a zero vector adds nothing to the other's direction
  const bool both = norm_a != 0 && norm_b != 0;
  if (both) {
    angle = 2 * std::atan2(norm_of([&](int64_t d) { return u[d] - v[d]; }),
                           norm_of([&](int64_t d) { return u[d] + v[d]; }));
  }
  p.distance[vector] = static_cast<float>(angle / pi);
  if (p.direction == nullptr) return;
  if (both) {
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
}

}  // namespace

void kv_merge_pair(const KvMergeParams& p, int64_t begin, int64_t end) {
  for (int64_t vector = begin; vector < end; ++vector) {
    is_double(p.type) ? merge<double>(p, vector) : merge<float>(p, vector);
  }
}

}  // namespace kvopt::cpu
