// The alignment of buffers and of counters that several threads write.
#ifndef JFOG_XLA_OPS_COMMON_CACHE_LINE_H_
#define JFOG_XLA_OPS_COMMON_CACHE_LINE_H_

#include <cstddef>

namespace jfog {

constexpr std::size_t kCacheLine = 64;

// The next multiple of a cache line.
constexpr std::size_t AlignUp(std::size_t bytes) {
  return (bytes + kCacheLine - 1) / kCacheLine * kCacheLine;
}

}  // namespace jfog

#endif  // JFOG_XLA_OPS_COMMON_CACHE_LINE_H_
