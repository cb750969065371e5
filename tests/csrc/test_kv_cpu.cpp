// SPDX-License-Identifier: Apache-2.0
// The KV-cache kernels of the CPU without torch, for the sanitizers: buffers of exactly the
// promised size that start as NaN, random stores, every instruction set that this processor has.
// What is computed is compared with plain loops in fp64 over the vectors that kv_quant_unpack
// gives; the rules themselves are tested in Python.
//
//     test_kv_cpu [--seed N]
#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <set>

#include "check_cpu.h"
#include "cpu/kv.h"

namespace kvopt::test {
namespace {

constexpr int64_t kDims[] = {4, 8, 20, 64, 80, 96, 128, 256};
constexpr KvType kTypes[] = {KvType::kFloat32, KvType::kFloat16, KvType::kBFloat16,
                             KvType::kFloat64};
constexpr KvCodec kCodecs[] = {KvCodec::kModel, KvCodec::kFp8, KvCodec::kInt8, KvCodec::kInt4,
                               KvCodec::kInt2};

template <typename T, int64_t n>
T any_of(Random& random, const T (&values)[n]) {
  return values[below(random, n)];
}

double read(KvType type, const void* values, int64_t i) {
  if (type == KvType::kFloat64) return static_cast<const double*>(values)[i];
  return value_at(static_cast<DType>(type), values, i);
}

void write(KvType type, void* values, int64_t i, double value) {
  if (type == KvType::kFloat64) {
    static_cast<double*>(values)[i] = value;
  } else {
    set_value(static_cast<DType>(type), values, i, static_cast<float>(value));
  }
}

void randomize(Random& random, KvType type, const Buffer& buffer, int64_t count) {
  for (int64_t i = 0; i < count; ++i) write(type, buffer.data, i, normal(random));
}

struct Store {
  explicit Store(Random& random, bool always_factors = false)
      : dim(any_of(random, kDims)),
        rows(1 + below(random, 2)),
        heads(1 + below(random, 2)),
        type(any_of(random, kTypes)),
        codec(any_of(random, kCodecs)),
        group(kv_code_bits(codec) > 0 ? int64_t{8} << below(random, 3) : 1 + 3 * below(random, 2)) {
    for (int64_t i = 0; i < rows; ++i) {
      int64_t q = 0, p = 0;
      for (int64_t j = 0; j < heads; ++j) {
        const int64_t capacity = below(random, 4) == 0 ? below(random, 3) : below(random, 150);
        const int64_t packed = std::max<int64_t>(0, capacity - group) / group * group;
        for (const int64_t n : {q, packed, p, capacity - packed}) {
          segments.push_back(static_cast<int32_t>(n));
        }
        q += packed;
        p += capacity - packed;
      }
      packed_slots = std::max(packed_slots, q);
      plain_slots = std::max(plain_slots, p);
    }
    lengths.assign(static_cast<size_t>(rows * heads * 2), 0);
    const int64_t slots = packed_slots + plain_slots, width = kv_packed_bytes(codec, type, dim);
    const bool integer = kv_code_bits(codec) > 0, fp8 = codec == KvCodec::kFp8;
    const int64_t of_keys = integer ? packed_slots / group * 2 * dim : fp8 ? packed_slots : 0;
    const int64_t of_values = integer ? packed_slots * kv_value_groups(dim, group) * 2
                              : fp8   ? packed_slots
                                      : 0;
    has_factors = always_factors || below(random, 3) == 0;
    for (const int64_t size :
         {rows * slots * 4, rows * slots * 4, rows * plain_slots * dim * kv_type_bytes(type),
          rows * plain_slots * dim * kv_type_bytes(type), rows * packed_slots * width,
          rows * packed_slots * width, rows * of_keys * 2, rows * of_values * 2,
          has_factors ? rows * packed_slots * 8 : 0}) {
      buffers.push_back(std::make_unique<Buffer>(size));
    }
    const auto at = [&](size_t i) { return buffers[i]->data; };
    view = {rows,
            heads,
            dim,
            packed_slots,
            plain_slots,
            type,
            codec,
            group,
            segments.data(),
            lengths.data(),
            reinterpret_cast<int32_t*>(at(0)),
            reinterpret_cast<float*>(at(1)),
            at(2),
            at(3),
            at(4),
            at(5),
            reinterpret_cast<uint16_t*>(at(6)),
            reinterpret_cast<uint16_t*>(at(7)),
            has_factors ? reinterpret_cast<float*>(at(8)) : nullptr};
  }
  // An empty store that shares what `lower` packs.
  explicit Store(const Store& lower)
      : dim(lower.dim),
        rows(lower.rows),
        heads(lower.heads),
        type(lower.type),
        codec(lower.codec),
        group(lower.group),
        packed_slots(lower.packed_slots),
        plain_slots(lower.plain_slots),
        has_factors(lower.has_factors),
        segments(lower.segments),
        lengths(lower.lengths.size(), 0),
        view(lower.view) {
    for (const auto& buffer : lower.buffers) {
      buffers.push_back(std::make_unique<Buffer>(static_cast<int64_t>(buffer->bytes)));
    }
    view.segments = segments.data();
    view.lengths = lengths.data();
    view.positions = reinterpret_cast<int32_t*>(buffers[0]->data);
    view.scores = reinterpret_cast<float*>(buffers[1]->data);
    view.plain_keys = buffers[2]->data;
    view.plain_values = buffers[3]->data;
    view.factors = has_factors ? reinterpret_cast<float*>(buffers[8]->data) : nullptr;
  }

  int64_t numbers(int64_t vectors) const { return vectors * dim; }
  int64_t bytes(int64_t vectors) const { return numbers(vectors) * kv_type_bytes(type); }
  std::string name() const {
    return "codec " + std::to_string(static_cast<int>(codec)) + " type " +
           std::to_string(static_cast<int>(type)) + " D " + std::to_string(dim) + " G " +
           std::to_string(group);
  }

  int64_t dim, rows, heads;
  KvType type;
  KvCodec codec;
  int64_t group, packed_slots = 0, plain_slots = 0;
  bool has_factors = false;
  std::vector<int32_t> segments, lengths;
  std::vector<std::unique_ptr<Buffer>> buffers;
  KvStore view;
};

// Candidates 0 .. n - 1 at positions 0 .. n - 1, each segment the first of them.
void fill(Random& random, const Store& store, int64_t n) {
  const int64_t segments = store.rows * store.heads;
  Buffer keys(store.bytes(segments * n)), values(store.bytes(segments * n));
  randomize(random, store.type, keys, store.numbers(segments * n));
  randomize(random, store.type, values, store.numbers(segments * n));
  std::vector<int32_t> at, counts;
  std::vector<float> scores;
  for (int64_t row = 0; row < store.rows; ++row) {
    for (int64_t i = 0; i < n; ++i) at.push_back(static_cast<int32_t>(i));
  }
  for (int64_t i = 0; i < segments; ++i)
    counts.push_back(static_cast<int32_t>(below(random, n + 3)));
  for (int64_t i = 0; i < segments * n; ++i) scores.push_back(std::abs(normal(random)));
  const KvPackParams p{store.view,    n,         keys.data, values.data, at.data(),    1,
                       scores.data(), at.data(), 1,         n,           counts.data()};
  check(kv_quant_pack_fault(p) == -1, "no fault");
  std::vector<float> scratch(static_cast<size_t>(kv_pack_scratch(store.view)));
  kv_quant_pack(p, scratch.data(), 0, segments);
}

void append(Random& random, const Store& store, int32_t position) {
  const int64_t segments = store.rows * store.heads;
  Buffer key(store.bytes(segments)), value(store.bytes(segments));
  randomize(random, store.type, key, store.numbers(segments));
  randomize(random, store.type, value, store.numbers(segments));
  const std::vector<int32_t> at(static_cast<size_t>(store.rows), position);
  KvAppendParams p{};
  p.store = store.view;
  p.key = key.data;
  p.value = value.data;
  p.position = at.data();
  p.position_heads = p.victim_heads = 1;
  p.new_score = std::abs(normal(random));
  p.order = static_cast<KvOrder>(below(random, 2));
  p.first = static_cast<int32_t>(below(random, 5));
  p.recent = static_cast<int32_t>(below(random, 9)) - 1;
  p.age = below(random, 2) == 0;
  p.shared = store.heads == 1 && below(random, 2) == 0;
  std::vector<float> scratch(static_cast<size_t>(kv_pack_scratch(store.view)));
  kv_evict_append(p, scratch.data(), 0, store.rows);
}

struct Contents {
  explicit Contents(const Store& s) {
    for (int64_t i = 0; i < s.rows * s.heads; ++i) {
      slots = std::max<int64_t>(slots, s.lengths[2 * i] + s.lengths[2 * i + 1]);
    }
    slots += 3;
    const int64_t vectors = s.rows * s.heads * slots;
    keys = std::make_unique<Buffer>(s.bytes(vectors));
    values = std::make_unique<Buffer>(s.bytes(vectors));
    positions.assign(static_cast<size_t>(vectors), -7);
    const KvUnpackParams p{s.view, slots, keys->data, values->data, positions.data()};
    kv_quant_unpack(p, 0, s.rows * s.heads);
  }
  int64_t slots = 0;
  std::unique_ptr<Buffer> keys, values;
  std::vector<int32_t> positions;
};

void test_contents(const Store& s, int32_t newest) {
  const Contents c(s);
  bool right = true;
  for (int64_t i = 0; i < s.rows * s.heads; ++i) {
    const int64_t filled = s.lengths[2 * i] + s.lengths[2 * i + 1];
    std::set<int32_t> seen;
    for (int64_t j = 0; j < c.slots; ++j) {
      const int32_t position = c.positions[i * c.slots + j];
      right = right && (j < filled) == (position >= 0) && position <= newest;
      if (j < filled) seen.insert(position);
      for (int64_t d = 0; d < s.dim; ++d) {
        const double key = read(s.type, c.keys->data, (i * c.slots + j) * s.dim + d);
        right = right && std::isfinite(key) && (j < filled || key == 0.0);
      }
    }
    right = right && static_cast<int64_t>(seen.size()) == filled;
  }
  check(right, "contents " + s.name());
}

// Tokens 0 .. steps - 1 into two layers that share what they pack; both hold the same ones.
void test_pair(Random& random) {
  const Store lower(random, true), upper(lower);
  const int32_t steps = static_cast<int32_t>(below(random, 200));
  KvMergeEvictParams p{};
  p.lower = lower.view;
  p.upper = upper.view;
  p.position_heads = p.victim_heads = 1;
  p.order = static_cast<KvOrder>(below(random, 2));
  p.first = static_cast<int32_t>(below(random, 5));
  p.recent = static_cast<int32_t>(below(random, 9)) - 1;
  p.age = below(random, 2) == 0;
  p.shared = lower.heads == 1 && below(random, 2) == 0;
  p.residual = below(random, 3 * lower.group);
  p.t_double = 0.6;
  p.t = 0.6f;
  bool right = true;
  for (int32_t step = 0; step < steps; ++step) {
    const std::vector<int32_t> at(static_cast<size_t>(lower.rows), step);
    p.position = at.data();
    std::vector<int64_t> common(static_cast<size_t>(lower.rows));
    const Buffer scratch(kv_merge_evict_scratch(p));
    kv_merge_evict_common(p, common.data(), 0, lower.rows);
    kv_merge_evict(p, common.data(), scratch.data, 0, lower.rows * lower.heads);
    append(random, lower, step);
    append(random, upper, step);
    right = right && lower.lengths == upper.lengths;
  }
  check(right, "pair " + lower.name());
  test_contents(lower, steps);
  test_contents(upper, steps);
}

// Attention of one segment's query heads, written out, and how far each number may be off. u is the
// rounding of the store's type, v that of the sums (fp32, or double). What was read back from codes
// or with factors is rounded to the type, so the reference itself is off by u then:
//   logits   3.5 u |(q k)_d| scale, six standard deviations of the keys' roundings, then, and
//            4 v (sqrt D + 8) sum |q k| scale, a random walk; the worst slot's, off
//   out      off sum p |value - out|, what weights off by that make of it; u sum p |value| then;
//            4 v (sqrt n + 16) sum p |value|; and half a unit of the last place
struct Written {
  std::vector<double> out, allowed, weights;
};

Written write_out(const Store& s, const Contents& c, int64_t segment, int64_t query_group,
                  const void* query, double scale) {
  const int64_t filled = s.lengths[2 * segment] + s.lengths[2 * segment + 1];
  const auto numbers = static_cast<size_t>(query_group * s.dim);
  Written w{std::vector<double>(numbers, 0.0), std::vector<double>(numbers, 0.0),
            std::vector<double>(static_cast<size_t>(query_group * c.slots), 0.0)};
  constexpr double kUnits[] = {0x1p-24, 0x1p-11, 0x1p-8, 0x1p-53};
  const double unit = kUnits[static_cast<int>(s.type)];
  const double sum_unit = 4 * (s.type == KvType::kFloat64 ? 0x1p-53 : 0x1p-24);
  const bool as_stored = s.codec == KvCodec::kModel && s.view.factors == nullptr;
  const double read_back = as_stored ? 0.0 : unit;
  for (int64_t g = 0; g < query_group; ++g) {
    double* const p = w.weights.data() + g * c.slots;
    double largest = -INFINITY, total = 0.0, off = 0.0;
    for (int64_t j = 0; j < filled; ++j) {
      double squares = 0.0, magnitude = 0.0;
      for (int64_t d = 0; d < s.dim; ++d) {
        const double term = scale * read(s.type, query, (segment * query_group + g) * s.dim + d) *
                            read(s.type, c.keys->data, (segment * c.slots + j) * s.dim + d);
        p[j] += term;
        squares += term * term;
        magnitude += std::abs(term);
      }
      largest = std::max(largest, p[j]);
      off = std::max(off, 3.5 * read_back * std::sqrt(squares) +
                              sum_unit * (std::sqrt(s.dim) + 8) * magnitude);
    }
    for (int64_t j = 0; j < filled; ++j) total += p[j] = std::exp(p[j] - largest);
    for (int64_t j = 0; j < filled; ++j) {
      p[j] /= total;
      for (int64_t d = 0; d < s.dim; ++d) {
        w.out[g * s.dim + d] +=
            p[j] * read(s.type, c.values->data, (segment * c.slots + j) * s.dim + d);
      }
    }
    for (int64_t d = 0; d < s.dim; ++d) {
      const double out = w.out[g * s.dim + d];
      double size = 0.0, spread = 0.0;
      for (int64_t j = 0; j < filled; ++j) {
        const double v = read(s.type, c.values->data, (segment * c.slots + j) * s.dim + d);
        size += p[j] * std::abs(v);
        spread += p[j] * std::abs(v - out);
      }
      const double here =
          1.1 * off * spread + (read_back + sum_unit * (std::sqrt(filled) + 16)) * size;
      w.allowed[g * s.dim + d] = here + unit * (std::abs(out) + here) + 0x1p-25 * (unit == 0x1p-11);
    }
  }
  return w;
}

void test_attention(Random& random, const Store& s, Isa isa) {
  constexpr int64_t kGroups[] = {1, 2, 3, 4, 8, 11};
  const int64_t query_group = any_of(random, kGroups), segments = s.rows * s.heads;
  const Contents c(s);
  Buffer query(s.bytes(segments * query_group)), out(s.bytes(segments * query_group));
  randomize(random, s.type, query, s.numbers(segments * query_group));
  const bool is_double = s.type == KvType::kFloat64;
  const std::vector<int32_t> gap(static_cast<size_t>(s.rows), 0);  // turned by nothing
  const std::vector<float> frequencies(static_cast<size_t>(s.dim / 2), 0.5f);
  KvAttentionParams p{};
  p.store = s.view;
  p.query_group = query_group;
  p.query = query.data;
  p.scale_double = 1.0 / std::sqrt(static_cast<double>(s.dim));
  p.scale = static_cast<float>(p.scale_double);
  p.update = KvUpdate::kReplace;
  p.first = static_cast<int32_t>(below(random, 2) * 10);
  p.gap = gap.data();
  p.frequencies = frequencies.data();
  p.rotary = s.dim;
  p.out = out.data;
  for (int64_t i = 0; i < segments; ++i) {
    const int64_t filled = s.lengths[2 * i] + s.lengths[2 * i + 1];
    if (filled == 0) continue;
    std::vector<KvAttentionUnit> units;  // shorter ones than the op layer's
    for (int64_t begin = 0; begin < filled; begin += 50) {
      units.push_back({i, begin, std::min(filled, begin + 50), 0});
    }
    const int64_t count = static_cast<int64_t>(units.size()), width = is_double ? 8 : 4;
    Buffer partials(count * kv_attention_partial(p) * width), logits(filled * query_group * width);
    Buffer scratch(kv_attention_scratch(p) * 4);
    kv_attention_units(p, units.data(), partials.data, logits.data,
                       reinterpret_cast<float*>(scratch.data), 0, count, isa);
    kv_attention_join(p, units.data(), count, partials.data, logits.data, isa);
    const Written expected = write_out(s, c, i, query_group, query.data, p.scale_double);
    double worst = 0.0;
    for (int64_t j = 0; j < query_group * s.dim; ++j) {
      const double error =
          std::abs(read(s.type, out.data, i * query_group * s.dim + j) - expected.out[j]);
      const double ratio = error / expected.allowed[j];
      worst = std::isnan(ratio) ? INFINITY : std::max(worst, ratio);
    }
    check(worst <= 1.0, std::string("attention ") + isa_name(isa) + " " + s.name() + ": " +
                            std::to_string(worst) + " of the allowed");
  }
}

void test_select(Random& random, Isa isa) {
  const int64_t count = below(random, 70), rows = 1 + below(random, 3);
  Buffer logits(rows * count * 4), scores(count * 4);
  std::vector<int32_t> positions, newest;
  for (int64_t j = 0; j < count; ++j)
    positions.push_back(static_cast<int32_t>(below(random, 20)) - 2);
  for (int64_t i = 0; i < rows; ++i) newest.push_back(static_cast<int32_t>(below(random, 25)) - 2);
  std::vector<double> expected(static_cast<size_t>(count), 0.0);
  auto* const x = reinterpret_cast<float*>(logits.data);
  auto* const got = reinterpret_cast<float*>(scores.data);
  for (int64_t j = 0; j < count; ++j) got[j] = 0.0f;
  for (int64_t i = 0; i < rows; ++i) {
    double total = 0.0;
    for (int64_t j = 0; j < count; ++j) {
      const bool seen = positions[j] >= 0 && positions[j] <= newest[i];
      x[i * count + j] = seen ? 3.0f * normal(random) : NAN;
      if (seen) total += std::exp(static_cast<double>(x[i * count + j]));
    }
    for (int64_t j = 0; j < count; ++j) {
      const bool seen = positions[j] >= 0 && positions[j] <= newest[i];
      if (seen) expected[j] += std::exp(static_cast<double>(x[i * count + j])) / total;
    }
  }
  kv_select_rows(x, rows, count, positions.data(), newest.data(), false, got, isa);
  bool right = true;
  for (int64_t j = 0; j < count; ++j) right = right && std::abs(got[j] - expected[j]) < 1e-5;
  check(right, std::string("select ") + isa_name(isa) + " " + std::to_string(count));
}

void test_merge(Random& random) {
  const int64_t dim = any_of(random, kDims), vectors = 1 + below(random, 5);
  const KvType type = any_of(random, kTypes);
  const int64_t bytes = vectors * dim * kv_type_bytes(type);
  Buffer a(bytes), b(bytes), direction(bytes), numbers(vectors * 12);
  randomize(random, type, a, vectors * dim);
  randomize(random, type, b, vectors * dim);
  auto* const out = reinterpret_cast<float*>(numbers.data);
  const KvMergeParams p{vectors,        dim, type,          a.data,           b.data, 0.6f, 0.6,
                        direction.data, out, out + vectors, out + 2 * vectors};
  kv_merge_pair(p, 0, vectors);
  bool right = true;
  for (int64_t i = 0; i < vectors; ++i) {
    double length = 0.0, norm = 0.0;
    for (int64_t d = 0; d < dim; ++d) {
      length += std::pow(read(type, direction.data, i * dim + d), 2);
      norm += std::pow(read(type, a.data, i * dim + d), 2);
    }
    right = right && std::abs(length - 1.0) < 0.02 &&
            std::abs(out[i] / std::sqrt(norm) - 1) < 1e-5 && out[2 * vectors + i] >= 0.0f &&
            out[2 * vectors + i] <= 1.0f;
  }
  check(right, "merge " + std::to_string(dim));
}

}  // namespace
}  // namespace kvopt::test

int main(int count, char** arguments) {
  using namespace kvopt::test;
  uint64_t seed = std::random_device{}();
  if (count == 3 && std::string(arguments[1]) == "--seed") {
    seed = std::strtoull(arguments[2], nullptr, 10);
  } else if (count != 1) {
    std::fprintf(stderr, "test_kv_cpu [--seed N]\n");
    return 2;
  }
  std::printf("test_kv_cpu: seed %llu\n", static_cast<unsigned long long>(seed));
  Random random(seed);
  for (int i = 0; i < 150; ++i) {
    Store store(random);
    const int64_t tokens = below(random, 120);
    fill(random, store, tokens);
    const int64_t steps = below(random, 40);
    for (int64_t step = 0; step < steps; ++step) {
      append(random, store, static_cast<int32_t>(tokens + step));
    }
    test_contents(store, static_cast<int32_t>(tokens + steps));
    for (const Isa isa : {Isa::kScalar, Isa::kAvx2, Isa::kAvx512}) {
      if (isa > best_isa()) continue;
      test_attention(random, store, isa);
      test_select(random, isa);
    }
    test_merge(random);
    test_pair(random);
  }
  std::printf("test_kv_cpu: %d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
