// Errors that travel to JAX: every text starts with "jfog:".
#ifndef JFOG_XLA_OPS_COMMON_STATUS_H_
#define JFOG_XLA_OPS_COMMON_STATUS_H_

#include <string>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace jfog {

namespace ffi = xla::ffi;

// The name of a code, as in the text of a JaxRuntimeError.
inline const char* CodeName(ffi::ErrorCode code) {
  const char* const names[] = {"OK",
                               "CANCELLED",
                               "UNKNOWN",
                               "INVALID_ARGUMENT",
                               "DEADLINE_EXCEEDED",
                               "NOT_FOUND",
                               "ALREADY_EXISTS",
                               "PERMISSION_DENIED",
                               "RESOURCE_EXHAUSTED",
                               "FAILED_PRECONDITION",
                               "ABORTED",
                               "OUT_OF_RANGE",
                               "UNIMPLEMENTED",
                               "INTERNAL",
                               "UNAVAILABLE"};
  return names[static_cast<int>(code)];
}

// The text ends with the code: a program whose argument has failed passes the
// text on with the code INTERNAL (XLA: "Error dispatching computation").
inline ffi::Error MakeError(ffi::ErrorCode code, const std::string& text) {
  return ffi::Error(code, "jfog: " + text + " [" + CodeName(code) + "]");
}

// The text that a JaxRuntimeError of this error has: its code and its message.
inline std::string StatusText(const ffi::Error& error) {
  const auto code = error.errc().value_or(ffi::ErrorCode::kUnknown);
  return std::string(CodeName(code)) + ": " + error.message();
}

// An error on its way out of a function that returns an error, a value or an
// error, or the completion of a handler.
struct Failure {
  ffi::Error error;

  operator ffi::Error() && { return std::move(error); }
  template <typename T>
  operator ffi::ErrorOr<T>() && {
    return ffi::Unexpected(std::move(error));
  }
};

}  // namespace jfog

#define JFOG_RETURN_IF_ERROR(expression)                                     \
  do {                                                                       \
    ::xla::ffi::Error jfog_error = (expression);                             \
    if (jfog_error.failure()) return ::jfog::Failure{std::move(jfog_error)}; \
  } while (false)

// Declares `variable`, a reference to the value of an ErrorOr.
#define JFOG_ASSIGN_OR_RETURN(variable, expression)                  \
  auto variable##_or = (expression);                                 \
  if (!variable##_or) return ::jfog::Failure{variable##_or.error()}; \
  auto& variable = *variable##_or

#endif  // JFOG_XLA_OPS_COMMON_STATUS_H_
