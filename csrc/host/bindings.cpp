// SPDX-License-Identifier: Apache-2.0
// Python bindings of csrc/host: the C++ structures that are not tensor operations.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "host/build_info.h"
#include "host/memory.h"
#include "host/read_probe.h"

namespace py = pybind11;

PYBIND11_MODULE(_host, m) {
  m.doc() = "kvopt's C++ structures that are not tensor operations";
  m.def(
      "build_info",
      [] {
        const kvopt::host::BuildInfo info = kvopt::host::build_info();
        py::dict result;
        result["compiler"] = info.compiler;
        result["isa_compiled"] = info.isa_compiled;
        result["isa_best"] = info.isa_best;
        result["isa_selected"] = info.isa_selected;
        return result;
      },
      "What was compiled and which instruction set the CPU kernels use.\n\n"
      "Raises RuntimeError if KVOPT_ISA names an unknown one or one that this processor lacks.");

  m.def("release_free_memory", &kvopt::host::release_free_memory,
        "Hands pages that the C allocator keeps back to the operating system; True if there were "
        "any.");

  py::class_<kvopt::host::ReadProbe>(
      m, "ReadProbe", "Reads a buffer in order, to measure the machine's streaming-read rate.")
      .def(py::init<size_t>(), py::arg("bytes"))
      .def("run", &kvopt::host::ReadProbe::run, py::arg("threads"),
           py::call_guard<py::gil_scoped_release>(),
           "One pass on `threads` threads; returns bytes per second.");
}
