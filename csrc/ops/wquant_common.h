// SPDX-License-Identifier: Apache-2.0
// The part of the wquant operators that does not depend on the device: validate, allocate, describe
// to the kernel. `layout` is tile32 or mma16 of quant_format.h, given as its two size functions.
#pragma once

#include "common/dynamic_map.h"
#include "ops/ops.h"

namespace kvopt::ops {

struct Layout {
  int64_t (*packed_bytes)(const QuantFormat&, int64_t n, int64_t k);
  int64_t (*meta_count)(const QuantFormat&, int64_t n, int64_t k);
};

inline constexpr Layout kTile32 = {tile32::packed_bytes, tile32::meta_count};
inline constexpr Layout kMma16 = {mma16::packed_bytes, mma16::meta_count};

struct RtnCall {
  Tensor weight, codes, scale, zero;
  RtnParams params;
};

inline RtnCall make_rtn(const Tensor& weight_in, int64_t bits, int64_t group_size, int64_t scheme) {
  const char* op = "wquant_rtn";
  STD_TORCH_CHECK(weight_in.dim() == 2, op, ": weight must be 2-dimensional (N, K), got ",
                  weight_in.dim(), " dimensions");
  const int64_t n = weight_in.size(0), k = weight_in.size(1);
  const QuantFormat format = check_format(bits, group_size, scheme, n, k, op);
  const DType dtype = kernel_dtype(weight_in.scalar_type(), op, "weight");
  Tensor weight = torch::stable::contiguous(weight_in);
  const int64_t groups = group_count(format, k);
  Tensor codes = torch::stable::new_empty(weight, {n, k}, ScalarType::Byte);
  Tensor scale = torch::stable::new_empty(weight, {n, groups}, ScalarType::Half);
  Tensor zero = torch::stable::new_empty(weight, {n, groups}, ScalarType::Half);
  RtnParams p{n,
              k,
              dtype,
              format,
              weight.const_data_ptr(),
              static_cast<uint8_t*>(codes.mutable_data_ptr()),
              static_cast<uint16_t*>(scale.mutable_data_ptr()),
              static_cast<uint16_t*>(zero.mutable_data_ptr())};
  return {weight, codes, scale, zero, p};
}

struct PackCall {
  Tensor codes, scale, zero, packed, meta;
  PackParams params;
};

inline PackParams pack_params(const PackCall& c, int64_t n, int64_t k, const QuantFormat& format) {
  return {n,
          k,
          format,
          static_cast<uint8_t*>(c.codes.mutable_data_ptr()),
          static_cast<uint16_t*>(c.scale.mutable_data_ptr()),
          static_cast<uint16_t*>(c.zero.mutable_data_ptr()),
          static_cast<uint8_t*>(c.packed.mutable_data_ptr()),
          static_cast<uint16_t*>(c.meta.mutable_data_ptr())};
}

using EmptyWeight = Tensor (*)(const Tensor& like, int64_t count, ScalarType dtype);

inline Tensor empty_tensor(const Tensor& like, int64_t count, ScalarType dtype) {
  return torch::stable::new_empty(like, {count}, dtype);
}

inline PackCall make_pack(const Tensor& codes, const Tensor& scale, const Tensor& zero,
                          int64_t bits, int64_t group_size, int64_t scheme, const Layout& layout,
                          EmptyWeight empty = empty_tensor) {
  const char* op = "wquant_pack";
  STD_TORCH_CHECK(codes.dim() == 2, op, ": codes must be 2-dimensional (N, K), got ", codes.dim(),
                  " dimensions");
  const int64_t n = codes.size(0), k = codes.size(1);
  const QuantFormat format = check_format(bits, group_size, scheme, n, k, op);
  const int64_t groups = group_count(format, k);
  check_type(codes, ScalarType::Byte, "uint8", op, "codes");
  check_type(scale, ScalarType::Half, "float16", op, "scale");
  check_type(zero, ScalarType::Half, "float16", op, "zero");
  check_shape(scale, {n, groups}, op, "scale");
  check_shape(zero, {n, groups}, op, "zero");
  check_same_device(scale, codes, op, "scale");
  check_same_device(zero, codes, op, "zero");
  Tensor packed = empty(codes, layout.packed_bytes(format, n, k), ScalarType::Byte);
  Tensor meta = empty(codes, layout.meta_count(format, n, k), ScalarType::Short);
  PackCall c{codes, scale, zero, packed, meta, {}};
  c.params = pack_params(c, n, k, format);
  return c;
}

inline QuantFormat check_packed(const Tensor& packed, const Tensor& meta, int64_t n, int64_t k,
                                int64_t bits, int64_t group_size, int64_t scheme,
                                const Layout& layout, const char* op) {
  const QuantFormat format = check_format(bits, group_size, scheme, n, k, op);
  check_type(packed, ScalarType::Byte, "uint8", op, "packed");
  check_type(meta, ScalarType::Short, "int16 (fp16 bit patterns)", op, "meta");
  check_shape(packed, {layout.packed_bytes(format, n, k)}, op, "packed");
  check_shape(meta, {layout.meta_count(format, n, k)}, op, "meta");
  check_same_device(meta, packed, op, "meta");
  return format;
}

inline PackCall make_unpack(const Tensor& packed, const Tensor& meta, int64_t n, int64_t k,
                            int64_t bits, int64_t group_size, int64_t scheme,
                            const Layout& layout) {
  const QuantFormat format =
      check_packed(packed, meta, n, k, bits, group_size, scheme, layout, "wquant_unpack");
  const int64_t groups = group_count(format, k);
  Tensor codes = torch::stable::new_empty(packed, {n, k}, ScalarType::Byte);
  Tensor scale = torch::stable::new_empty(packed, {n, groups}, ScalarType::Half);
  Tensor zero = torch::stable::new_empty(packed, {n, groups}, ScalarType::Half);
  PackCall c{codes, scale, zero, packed, meta, {}};
  c.params = pack_params(c, n, k, format);
  return c;
}

struct DequantizeCall {
  Tensor weight;
  DequantizeParams params;
};

inline DequantizeCall make_dequantize(const Tensor& packed, const Tensor& meta, int64_t n,
                                      int64_t k, int64_t bits, int64_t group_size, int64_t scheme,
                                      ScalarType dtype, const Layout& layout) {
  const char* op = "wquant_dequantize";
  const QuantFormat format = check_packed(packed, meta, n, k, bits, group_size, scheme, layout, op);
  const DType kernel_type = kernel_dtype(dtype, op, "dtype");
  Tensor weight = torch::stable::new_empty(packed, {n, k}, dtype);
  return {weight,
          {n, k, kernel_type, format, static_cast<const uint8_t*>(packed.const_data_ptr()),
           static_cast<const uint16_t*>(meta.const_data_ptr()), weight.mutable_data_ptr()}};
}

struct ExpandScalesCall {
  Tensor codes, scale, offset, meta;
  ExpandScalesParams params;
};

inline ExpandScalesCall make_expand_scales(const Tensor& codes, const Tensor& scale,
                                           const Tensor& offset, int64_t n, int64_t k, int64_t bits,
                                           int64_t group_size, int64_t scheme,
                                           const Layout& layout) {
  const char* op = "wquant_expand_scales";
  const QuantFormat format = check_format(bits, group_size, scheme, n, k, op);
  STD_TORCH_CHECK(format.has_book(), op, ": scheme must be 2 (nf4) or 3 (fp4), got ", scheme);
  const int64_t count = n * group_count(format, k);
  check_type(codes, ScalarType::Byte, "uint8", op, "absmax_codes");
  check_type(scale, ScalarType::Float, "float32", op, "absmax_scale");
  check_type(offset, ScalarType::Float, "float32", op, "offset");
  check_shape(codes, {count}, op, "absmax_codes");
  check_shape(scale, {ceil_div(count, kDoubleBlock)}, op, "absmax_scale");
  check_shape(offset, {}, op, "offset");
  check_same_device(scale, codes, op, "absmax_scale");
  check_same_device(offset, codes, op, "offset");
  Tensor meta =
      torch::stable::new_empty(codes, {layout.meta_count(format, n, k)}, ScalarType::Short);
  return {codes,
          scale,
          offset,
          meta,
          {n, k, format, static_cast<const uint8_t*>(codes.const_data_ptr()),
           static_cast<const float*>(scale.const_data_ptr()),
           static_cast<const float*>(offset.const_data_ptr()),
           static_cast<uint16_t*>(meta.mutable_data_ptr())}};
}

}  // namespace kvopt::ops
