// SPDX-License-Identifier: Apache-2.0
#include "host/build_info.h"

#include "cpu/isa.h"

namespace kvopt::host {

BuildInfo build_info() {
  BuildInfo info;
  info.compiler = "g++ " __VERSION__;
  for (int i = 0; i <= static_cast<int>(cpu::Isa::kAmx); ++i) {
    info.isa_compiled.emplace_back(cpu::isa_name(static_cast<cpu::Isa>(i)));
  }
  info.isa_best = cpu::isa_name(cpu::best_isa());
  info.isa_selected = cpu::isa_name(cpu::selected_isa());
  return info;
}

}  // namespace kvopt::host
