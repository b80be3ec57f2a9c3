// Payload of an operation: its leaves, their offsets in a message, signature.
#ifndef JFOG_XLA_OPS_MPI_PAYLOAD_H_
#define JFOG_XLA_OPS_MPI_PAYLOAD_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "common/dtype.h"
#include "common/operation_header.h"
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

// The leaves of one operation as a single payload. Each leaf starts at a
// multiple of a cache line, so cache lines of a leaf are cache lines of the
// payload.
struct Payload {
  std::vector<Leaf> leaves;
  std::size_t payload_bytes = 0;
  std::size_t bytes = 0;      // of the leaves, without padding
  std::uint64_t summary = 0;  // see Summary
  Buffer staging;             // owns inputs and outputs after `Stage`

  std::size_t size() const { return leaves.size(); }
  const Leaf& operator[](std::size_t i) const { return leaves[i]; }
  Leaf& operator[](std::size_t i) { return leaves[i]; }
  auto begin() const { return leaves.begin(); }
  auto end() const { return leaves.end(); }

  // Dtypes and element counts, in order.
  std::uint64_t Signature() const;
  // "3 leaves, float32 x 1200, ..."
  std::string Describe() const;
  // "; x['b'] of shape (3,) is float32 x 3 here and float32 x 4 there": of
  // several leaves the one in which the payload of another rank's operation
  // differs. Empty if it is not one, or differs in dtype and length.
  std::string DescribeOther(const char* operation,
                            const OperationHeader& theirs) const;

  // Copies the inputs to memory of this object, for an operation that outlives
  // its call. An output of the input's length shares the input's memory, unless
  // `separate_outputs`.
  void Stage(bool separate_outputs = false);
  // Sets the offset of each leaf, and the totals.
  void ComputeOffsets();

  // Bytes of leaves, without padding, in [begin, end) of the payload.
  std::size_t BytesIn(std::size_t begin, std::size_t end) const;
  // The offset in [begin, end), between two elements, with about `part / parts`
  // of the range's bytes before it.
  std::size_t Cut(std::size_t begin, std::size_t end, std::size_t part,
                  std::size_t parts) const;

  // Copies bytes [begin, end) of the payload from the inputs to a message.
  void CopyOut(std::size_t begin, std::size_t end, std::byte* message) const;
  // Copies bytes [begin, end) of the payload from a message to the outputs.
  void CopyIn(std::size_t begin, std::size_t end,
              const std::byte* message) const;

  // Calls `f(leaf, first, count, at)` for each run of `count` elements of one
  // leaf, from element `first` on, in bytes [begin, end) of the payload; `at`
  // is the run's offset from `begin`. Both bounds are multiples of the
  // elements' widths, such as cache lines.
  template <typename F>
  void ForEachRun(std::size_t begin, std::size_t end, F f) const;
};

// Reads the operands from `first` on and, unless `results` is null, one result
// for each; without results the outputs are null and as long as the inputs.
ffi::ErrorOr<Payload> ReadLeaves(ffi::RemainingArgs args, std::size_t first,
                                 ffi::RemainingRets* results);

// Points the leaves at the operands and results of a later call; false if these
// differ in number, type or length.
bool FindLeaves(ffi::RemainingArgs args, ffi::RemainingRets results,
                Payload* leaves);

template <typename F>
void Payload::ForEachRun(std::size_t begin, std::size_t end, F f) const {
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
