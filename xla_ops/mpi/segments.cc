// Segments: the cut of a payload for an average inside and between machines.
#include "mpi/segments.h"

#include <algorithm>

#include "common/cache_line.h"
#include "mpi/wire_format.h"

namespace jfog::mpi {

Segments::Segments(const Payload& payload, std::size_t parts)
    : parts_(parts), leaf_bytes_(parts, 0) {
  // Without the padding of the last leaf.
  const std::size_t end = payload.size() == 0
                              ? 0
                              : payload[payload.size() - 1].offset +
                                    payload[payload.size() - 1].bytes();
  is_short_ = end <= kShort;
  const std::size_t length =
      is_short_ ? std::max<std::size_t>(end, 1) : parts_ * kChunk;
  size_ = std::max<std::size_t>(1, (end + length - 1) / length);
  cuts_.reserve(size_ * parts_ + 1);
  for (std::size_t s = 0; s < size_; ++s) {
    const std::size_t first = s * length;
    const std::size_t last = std::min(first + length, end);
    for (std::size_t k = 0; k < parts_; ++k) {
      std::size_t cut = payload.Cut(first, last, k, parts_);
      if (!is_short_) {
        // `Cut` balances the bytes of leaves. Padding may make a part longer
        // than a chunk: parts 0 to k - 1 have k chunks for the bytes before the
        // cut, and the remaining parts have their chunks for those after it.
        const std::size_t behind = (parts_ - k) * kChunk;
        const std::size_t round = AlignUp(last);
        cut = std::min(cut, first + k * kChunk);
        if (round > first + behind) cut = std::max(cut, round - behind);
      }
      cuts_.push_back(cut);
    }
  }
  cuts_.push_back(end);
  for (std::size_t s = 0; s < size_; ++s) {
    for (std::size_t k = 0; k < parts_; ++k) {
      leaf_bytes_[k] += payload.BytesIn(Begin(s, k), End(s, k));
      longest_ = std::max(longest_, Size(s, k));
    }
  }
}

}  // namespace jfog::mpi
