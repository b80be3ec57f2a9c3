// FFI handlers as Python capsules, for the tables of the extension modules.
#ifndef JFOG_XLA_OPS_COMMON_MODULE_H_
#define JFOG_XLA_OPS_COMMON_MODULE_H_

#include <pybind11/pybind11.h>

#include <type_traits>

#include "xla/ffi/api/ffi.h"

namespace jfog {

template <typename Handler>
pybind11::capsule Capsule(Handler* handler) {
  static_assert(
      std::is_invocable_r_v<XLA_FFI_Error*, Handler*, XLA_FFI_CallFrame*>,
      "an FFI handler is wanted");
  return pybind11::capsule(reinterpret_cast<void*>(handler));
}

template <typename Execute>
pybind11::dict Stages(Execute* execute) {
  pybind11::dict stages;
  stages["execute"] = Capsule(execute);
  return stages;
}

template <typename Instantiate, typename Execute>
pybind11::dict Stages(Instantiate* instantiate, Execute* execute) {
  pybind11::dict stages = Stages(execute);
  stages["instantiate"] = Capsule(instantiate);
  return stages;
}

// The table of FFI types of a module, which has one.
template <typename State>
pybind11::dict Types(const char* name) {
  static auto info = xla::ffi::MakeTypeInfo<State>();
  pybind11::dict type;
  type["type_id"] = pybind11::capsule(static_cast<void*>(&State::id));
  type["type_info"] = pybind11::capsule(static_cast<void*>(&info));
  pybind11::dict types;
  types[name] = type;
  return types;
}

}  // namespace jfog

#endif  // JFOG_XLA_OPS_COMMON_MODULE_H_
