// SPDX-License-Identifier: Apache-2.0
// What was compiled and what this processor offers.
#pragma once

#include <string>
#include <vector>

namespace kvopt::host {

struct BuildInfo {
  std::string compiler;
  std::vector<std::string> isa_compiled;  // worst to best
  std::string isa_best;                   // the best this processor runs
  std::string isa_selected;               // the one in use: KVOPT_ISA or the best
};

BuildInfo build_info();  // throws std::runtime_error if KVOPT_ISA names something impossible

}  // namespace kvopt::host
