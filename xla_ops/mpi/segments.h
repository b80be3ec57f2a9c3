// Segments: the cut of a payload for an average inside and between machines.
#ifndef JFOG_XLA_OPS_MPI_SEGMENTS_H_
#define JFOG_XLA_OPS_MPI_SEGMENTS_H_

#include <cstddef>
#include <vector>

#include "mpi/payload.h"

namespace jfog::mpi {

// A payload as consecutive segments, each of them as one part for every rank of
// a machine. Equal on all ranks that bring equal leaves. A short payload is one
// segment; otherwise a part is at most one chunk.
class Segments {
 public:
  Segments(const Payload& payload, std::size_t parts);

  // The payload fits into the first message on an edge.
  bool is_short() const { return is_short_; }
  std::size_t size() const { return size_; }
  std::size_t parts() const { return parts_; }
  // The bytes [Begin, End) of the payload in a part of a segment.
  std::size_t Begin(std::size_t segment, std::size_t part) const {
    return cuts_[segment * parts_ + part];
  }
  std::size_t End(std::size_t segment, std::size_t part) const {
    return cuts_[segment * parts_ + part + 1];
  }
  std::size_t Size(std::size_t segment, std::size_t part) const {
    return End(segment, part) - Begin(segment, part);
  }
  // Size of the longest part.
  std::size_t longest() const { return longest_; }
  // Bytes of leaves, without padding, in a part of all segments.
  std::size_t LeafBytes(std::size_t part) const { return leaf_bytes_[part]; }

 private:
  std::size_t parts_;
  bool is_short_;
  std::size_t size_;
  std::vector<std::size_t> cuts_;  // [segment * parts + part], and the end
  std::vector<std::size_t> leaf_bytes_;
  std::size_t longest_ = 0;
};

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_SEGMENTS_H_
