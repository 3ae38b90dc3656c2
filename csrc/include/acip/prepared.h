// A call of acip::fused_linear whose arguments were looked up before (bindings in csrc/prepared.cpp).
#pragma once

#include <pybind11/pybind11.h>

namespace acip {

void bind_prepared(pybind11::module_& module);

}  // namespace acip
