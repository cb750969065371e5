// SPDX-License-Identifier: Apache-2.0
// kvopt._ops.explain_qlinear: which kernel a product takes and why, as text. Pure arithmetic, no
// device is needed: the CPU's answer is that of the instruction set in use, CUDA's that of the
// given chip.
#pragma once

#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030A0000  // Python 3.10
#endif
#include <Python.h>

#include <exception>
#include <stdexcept>
#include <string>

#include "cpu/qlinear.h"
#ifdef KVOPT_WITH_CUDA
#include "cuda/qlinear.h"
#endif

namespace kvopt::ops {

inline std::string explain_text(const QLinearParams& p, const std::string& device, int capability,
                                int multiprocessors) {
  constexpr int kSize = 2048;
  char text[kSize] = {};
  if (device == "cpu") {
    cpu::qlinear_explain(p, cpu::selected_isa(), text, kSize);
    return text;
  }
  if (device != "cuda") throw std::runtime_error("device must be 'cpu' or 'cuda', got " + device);
#ifdef KVOPT_WITH_CUDA
  cuda::qlinear_explain(p, capability, multiprocessors, text, kSize);
  return text;
#else
  (void)capability;
  (void)multiprocessors;
  throw std::runtime_error("this kvopt was built without CUDA");
#endif
}

// (m, n, k, bits, group_size, scheme, dtype, activation_bits, device, capability, multiprocessors)
inline PyObject* explain_qlinear(PyObject* /*self*/, PyObject* arguments) {
  long long m = 0, n = 0, k = 0;
  int bits = 0, group_size = 0, scheme = 0, dtype = 0, activation_bits = 0, capability = 0,
      multiprocessors = 0;
  const char* device = nullptr;
  if (!PyArg_ParseTuple(arguments, "LLLiiiiisii:explain_qlinear", &m, &n, &k, &bits, &group_size,
                        &scheme, &dtype, &activation_bits, &device, &capability,
                        &multiprocessors)) {
    return nullptr;
  }
  QLinearParams p{};
  p.m = m;
  p.n = n;
  p.k = k;
  p.dtype = static_cast<DType>(dtype);
  p.format = {bits, group_size, static_cast<Scheme>(scheme)};
  p.activation_bits = p.format.scheme == Scheme::kInt8Dynamic ? 8 : activation_bits;
  try {
    return PyUnicode_FromString(explain_text(p, device, capability, multiprocessors).c_str());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

inline constexpr PyMethodDef kExplainMethod = {"explain_qlinear", explain_qlinear, METH_VARARGS,
                                               "Which kernel a product takes and why."};

}  // namespace kvopt::ops
