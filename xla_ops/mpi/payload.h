// The leaves of one operation: their layout inside a message, their signature.
#ifndef JFOG_XLA_OPS_MPI_PAYLOAD_H_
#define JFOG_XLA_OPS_MPI_PAYLOAD_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "common/dtype.h"
#include "common/status.h"
#include "mpi/buffer_pool.h"

namespace jfog::mpi {

struct Leaf {
  DataType type;
  std::size_t count;         // elements of the input
  std::size_t output_count;  // elements of the output
  const std::byte* input;
  std::byte* output;
  std::size_t offset;  // bytes from the start of the payload

  std::size_t bytes() const { return count * SizeOf(type); }
  std::size_t output_bytes() const { return output_count * SizeOf(type); }
};

// All leaves of a pytree form one payload, every leaf at an offset that suits
// its alignment.
struct Leaves {
  std::vector<Leaf> leaves;
  std::size_t payload_bytes = 0;
  std::size_t bytes = 0;  // of the payload without what aligns it
  Buffer staging;

  std::size_t size() const { return leaves.size(); }
  const Leaf& operator[](std::size_t i) const { return leaves[i]; }
  Leaf& operator[](std::size_t i) { return leaves[i]; }
  auto begin() const { return leaves.begin(); }
  auto end() const { return leaves.end(); }

  // Dtypes and element counts, in order.
  std::uint64_t Signature() const;
  // "3 leaves, float32 x 1200, ..."
  std::string Describe() const;

  // Copies the inputs to memory of our own, for an operation that outlives its
  // call. Outputs of the same length share it, or none where `apart`.
  void Stage(bool apart = false);
  // Gives the leaves their places in the payload.
  void ComputeOffsets();

  // The leaves' own bytes in [begin, end) of the payload.
  std::size_t BytesIn(std::size_t begin, std::size_t end) const;
  // The place, between two elements, that has `part` of `parts` of those before
  // it.
  std::size_t Cut(std::size_t begin, std::size_t end, std::size_t part,
                  std::size_t parts) const;

  // Calls `f(leaf, first, count, bytes)` for every run of elements of one leaf
  // between two multiples of 64 bytes of the payload; `bytes` counts from
  // `begin`.
  template <typename F>
  void ForEachRun(std::size_t begin, std::size_t end, F f) const;
};

// Reads the operands from `first` on, and one result for each if `results` are
// given; without them outputs are null and counted like the inputs.
ffi::ErrorOr<Leaves> ReadLeaves(ffi::RemainingArgs args, std::size_t first,
                                ffi::RemainingRets* results);

// Takes the places of operands and results of a later call; false if those are
// not leaves of the same types and lengths.
bool FindLeaves(ffi::RemainingArgs args, ffi::RemainingRets results,
                Leaves* leaves);

template <typename F>
void Leaves::ForEachRun(std::size_t begin, std::size_t end, F f) const {
  // The last leaf that starts at or before `begin`.
  std::size_t low = 0, high = leaves.size();
  while (high - low > 1) {
    const std::size_t middle = (low + high) / 2;
    (leaves[middle].offset <= begin ? low : high) = middle;
  }
  for (std::size_t i = low; i < leaves.size() && leaves[i].offset < end; ++i) {
    const Leaf& leaf = leaves[i];
    const std::size_t start = leaf.offset < begin ? begin : leaf.offset;
    const std::size_t stop =
        leaf.offset + leaf.bytes() < end ? leaf.offset + leaf.bytes() : end;
    if (start >= stop) continue;
    const std::size_t width = SizeOf(leaf.type);
    f(leaf, (start - leaf.offset) / width, (stop - start) / width,
      start - begin);
  }
}

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_PAYLOAD_H_
