// Errors that travel to JAX: every text starts with "jfog:".
#ifndef JFOG_XLA_OPS_COMMON_STATUS_H_
#define JFOG_XLA_OPS_COMMON_STATUS_H_

#include <string>

#include "xla/ffi/api/ffi.h"

namespace jfog {

namespace ffi = xla::ffi;

inline ffi::Error MakeError(ffi::ErrorCode code, const std::string& text) {
  return ffi::Error(code, "jfog: " + text);
}

}  // namespace jfog

#define JFOG_RETURN_IF_ERROR(expression)         \
  do {                                           \
    ::xla::ffi::Error jfog_error = (expression); \
    if (jfog_error.failure()) return jfog_error; \
  } while (false)

#endif  // JFOG_XLA_OPS_COMMON_STATUS_H_
