// Exceptions of native code, and what their errors say.
#ifndef JFOG_XLA_OPS_COMMON_OUT_OF_MEMORY_H_
#define JFOG_XLA_OPS_COMMON_OUT_OF_MEMORY_H_

#include <cstddef>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>
#include <system_error>

#include "common/status.h"

namespace jfog {

// Memory of a known size that there is none of.
class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(std::size_t bytes) : bytes_(bytes) {}
  const char* what() const noexcept override { return "no memory"; }
  std::size_t bytes() const { return bytes_; }

 private:
  std::size_t bytes_;
};

// The code and the text, after a title, of the exception that is being handled.
struct Thrown {
  ffi::ErrorCode code = ffi::ErrorCode::kResourceExhausted;
  std::string text;

  static Thrown Current() {
    try {
      throw;
    } catch (const OutOfMemory& error) {
      return {ffi::ErrorCode::kResourceExhausted,
              "has no memory for " + std::to_string(error.bytes()) + " bytes"};
    } catch (const std::bad_alloc&) {
      return {ffi::ErrorCode::kResourceExhausted, "has no memory"};
    } catch (const std::length_error& error) {
      return {
          ffi::ErrorCode::kResourceExhausted,
          std::string("has no memory for so long an array: ") + error.what()};
    } catch (const std::system_error& error) {
      return {
          ffi::ErrorCode::kResourceExhausted,
          std::string("got no thread or lock of the system: ") + error.what()};
    } catch (const std::exception& error) {
      return {ffi::ErrorCode::kInternal,
              std::string("failed: ") + error.what()};
    } catch (...) {
      return {ffi::ErrorCode::kInternal, "failed for unknown reasons"};
    }
  }
};

}  // namespace jfog

#endif  // JFOG_XLA_OPS_COMMON_OUT_OF_MEMORY_H_
