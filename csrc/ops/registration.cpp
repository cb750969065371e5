// SPDX-License-Identifier: Apache-2.0
// Every operator's schema and its implementation per device; fake implementations are in
// python/kvopt/_library.py.
//
// Weights (N, K). A format is (bits, group_size, symmetric) as in common/quant_format.h; group_size
// = K is one group per row. `packed` (uint8) and `meta` (int16, fp16 bit patterns) are in the
// layout of their device.
#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030A0000  // Python 3.10
#endif
#include <Python.h>

#include "ops/ops.h"

using namespace kvopt::ops;

STABLE_TORCH_LIBRARY(kvopt, m) {
  m.def(
      "qlinear(Tensor x, Tensor packed, Tensor meta, Tensor? bias, int n, int bits, int "
      "group_size, "
      "bool symmetric) -> Tensor");
  m.def(
      "wquant_rtn(Tensor weight, int bits, int group_size, bool symmetric) -> (Tensor codes, "
      "Tensor "
      "scale, Tensor zero)");
  m.def(
      "wquant_pack(Tensor codes, Tensor scale, Tensor zero, int bits, int group_size, bool "
      "symmetric) "
      "-> (Tensor packed, Tensor meta)");
  m.def(
      "wquant_unpack(Tensor packed, Tensor meta, int n, int k, int bits, int group_size, bool "
      "symmetric) -> (Tensor codes, Tensor scale, Tensor zero)");
  m.def(
      "wquant_dequantize(Tensor packed, Tensor meta, int n, int k, int bits, int group_size, bool "
      "symmetric, ScalarType dtype) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(kvopt, CPU, m) {
  m.impl("qlinear", TORCH_BOX(&qlinear_cpu));
  m.impl("wquant_rtn", TORCH_BOX(&wquant_rtn_cpu));
  m.impl("wquant_pack", TORCH_BOX(&wquant_pack_cpu));
  m.impl("wquant_unpack", TORCH_BOX(&wquant_unpack_cpu));
  m.impl("wquant_dequantize", TORCH_BOX(&wquant_dequantize_cpu));
}

#ifdef KVOPT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(kvopt, CUDA, m) {
  m.impl("qlinear", TORCH_BOX(&qlinear_cuda));
  m.impl("wquant_rtn", TORCH_BOX(&wquant_rtn_cuda));
  m.impl("wquant_pack", TORCH_BOX(&wquant_pack_cuda));
  m.impl("wquant_unpack", TORCH_BOX(&wquant_unpack_cuda));
  m.impl("wquant_dequantize", TORCH_BOX(&wquant_dequantize_cuda));
}
#endif

// `import kvopt._ops` loads the library, which registers the operators, and tells what it was built
// with.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__ops() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_ops", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module == nullptr) return nullptr;
  PyModule_AddStringConstant(module, "cuda_archs", KVOPT_CUDA_ARCHS);
  PyModule_AddStringConstant(module, "cuda_reason", KVOPT_CUDA_REASON);
  return module;
}
