// Payload of an operation: its leaves, their offsets in a message, signature.
#include "mpi/payload.h"

#include <algorithm>
#include <cstring>
#include <optional>

#include "common/cache_line.h"
#include "common/format.h"
#include "common/hash.h"
#include "common/operation_header.h"
#include "common/places.h"
#include "mpi/wire_format.h"

namespace jfog::mpi {

namespace {

// The search below is quadratic.
constexpr std::size_t kMostSearched = 5000;

std::uint64_t MixLeaf(std::uint64_t hash, DataType type, std::size_t count) {
  return Mix(Mix(hash, static_cast<std::uint64_t>(type)), count);
}

}  // namespace

std::uint64_t Payload::Signature() const {
  std::uint64_t hash = size();
  for (const Leaf& leaf : leaves) hash = MixLeaf(hash, leaf.type, leaf.count);
  return hash;
}

std::string Payload::DescribeOther(const char* operation,
                                   const OperationHeader& theirs) const {
  const std::optional<std::uint64_t> total =
      Summary::BytesOf(theirs.leaves, size());
  if (!total || size() == 1 || size() > kMostSearched) return "";
  std::uint64_t before = size();  // hash of the leaves before this one
  for (std::size_t i = 0; i < size(); ++i) {
    const Leaf& leaf = leaves[i];
    const std::uint64_t start = before;
    before = MixLeaf(before, leaf.type, leaf.count);
    if (*total < bytes - leaf.bytes()) continue;
    const std::uint64_t length = *total - (bytes - leaf.bytes());
    for (const DataType type : kDtypes) {
      const std::size_t count = length / SizeOf(type);
      const bool one_differs = (type == leaf.type) != (count == leaf.count);
      if (!one_differs || count * SizeOf(type) != length) continue;
      std::uint64_t hash = MixLeaf(start, type, count);
      for (std::size_t k = i + 1; k < size(); ++k) {
        hash = MixLeaf(hash, leaves[k].type, leaves[k].count);
      }
      if (hash != theirs.signature) continue;
      return "; " + LeafOf(operation, bytes, size(), i) + " is " +
             NameOf(leaf.type) + " x " + std::to_string(leaf.count) +
             " here and " + NameOf(type) + " x " + std::to_string(count) +
             " there";
    }
  }
  return "";
}

std::string Payload::Describe() const {
  std::vector<Shape> shapes;
  for (const Leaf& leaf : leaves) shapes.push_back({leaf.type, leaf.count});
  return jfog::Describe(shapes);
}

void Payload::Stage(bool separate_outputs) {
  const auto shares = [separate_outputs](const Leaf& leaf) {
    return !separate_outputs && leaf.output_count == leaf.count;
  };
  std::size_t total = payload_bytes;
  for (const Leaf& leaf : leaves) {
    if (!shares(leaf)) total += AlignUp(leaf.output_bytes());
  }
  staging = Buffer(total);
  std::byte* next = staging.get() + payload_bytes;
  for (Leaf& leaf : leaves) {
    std::byte* own = staging.get() + leaf.offset;
    if (leaf.bytes() > 0) std::memcpy(own, leaf.input, leaf.bytes());
    leaf.input = own;
    leaf.output = own;
    if (!shares(leaf)) {
      leaf.output = next;
      next += AlignUp(leaf.output_bytes());
    }
  }
}

void Payload::ComputeOffsets() {
  payload_bytes = bytes = 0;
  Summary all;
  for (Leaf& leaf : leaves) {
    leaf.offset = payload_bytes;
    payload_bytes += AlignUp(leaf.bytes());
    bytes += leaf.bytes();
    all.Add(leaf.type, leaf.bytes());
  }
  summary = all.word();
}

std::size_t Payload::BytesIn(std::size_t begin, std::size_t end) const {
  std::size_t sum = 0;
  ForEachRun(begin, end,
             [&](const Leaf& leaf, std::size_t, std::size_t count,
                 std::size_t) { sum += count * SizeOf(leaf.type); });
  return sum;
}

std::size_t Payload::Cut(std::size_t begin, std::size_t end, std::size_t part,
                         std::size_t parts) const {
  if (part == 0) return begin;
  std::size_t wanted = BytesIn(begin, end) * part / parts;
  std::size_t cut = end;
  ForEachRun(
      begin, end,
      [&](const Leaf& leaf, std::size_t, std::size_t count, std::size_t at) {
        const std::size_t width = SizeOf(leaf.type);
        if (cut == end && wanted < count * width) {
          cut = begin + at + wanted / width * width;
        }
        wanted -= std::min(wanted, count * width);
      });
  return cut;
}

void Payload::CopyOut(std::size_t begin, std::size_t end,
                      std::byte* message) const {
  ForEachRun(begin, end,
             [&](const Leaf& leaf, std::size_t first, std::size_t count,
                 std::size_t at) {
               const std::size_t width = SizeOf(leaf.type);
               std::memcpy(message + at, leaf.input + first * width,
                           count * width);
             });
}

void Payload::CopyIn(std::size_t begin, std::size_t end,
                     const std::byte* message) const {
  ForEachRun(begin, end,
             [&](const Leaf& leaf, std::size_t first, std::size_t count,
                 std::size_t at) {
               const std::size_t width = SizeOf(leaf.type);
               std::memcpy(leaf.output + first * width, message + at,
                           count * width);
             });
}

ffi::ErrorOr<Payload> ReadLeaves(ffi::RemainingArgs args, std::size_t first,
                                 ffi::RemainingRets* results) {
  Payload leaves;
  const std::size_t size = args.size() < first ? 0 : args.size() - first;
  if (results != nullptr && results->size() != size) {
    return ffi::Unexpected(
        MakeError(ffi::ErrorCode::kInternal,
                  "got " + std::to_string(size) + " operands for " +
                      std::to_string(results->size()) + " results"));
  }
  leaves.leaves.reserve(size);
  for (std::size_t i = 0; i < size; ++i) {
    auto x = args.get<ffi::AnyBuffer>(first + i);
    if (!x) return ffi::Unexpected(x.error());
    Leaf leaf{x->element_type(),
              x->element_count(),
              x->element_count(),
              static_cast<const std::byte*>(x->untyped_data()),
              nullptr,
              /*offset=*/0};
    if (results != nullptr) {
      auto y = results->get<ffi::AnyBuffer>(i);
      if (!y) return ffi::Unexpected(y.error());
      leaf.output_count = (*y)->element_count();
      leaf.output = static_cast<std::byte*>((*y)->untyped_data());
    }
    leaves.leaves.push_back(leaf);
  }
  leaves.ComputeOffsets();
  return leaves;
}

bool FindLeaves(ffi::RemainingArgs args, ffi::RemainingRets results,
                Payload* leaves) {
  if (args.size() != leaves->size() || results.size() != leaves->size()) {
    return false;
  }
  for (std::size_t i = 0; i < leaves->size(); ++i) {
    Leaf& leaf = (*leaves)[i];
    auto x = args.get<ffi::AnyBuffer>(i);
    auto y = results.get<ffi::AnyBuffer>(i);
    if (!x || !y || x->element_type() != leaf.type ||
        x->element_count() != leaf.count) {
      return false;
    }
    leaf.input = static_cast<const std::byte*>(x->untyped_data());
    leaf.output = static_cast<std::byte*>((*y)->untyped_data());
  }
  return true;
}

}  // namespace jfog::mpi
