// The identity of an operation, as ranks exchange and compare it.
#include "common/operation_header.h"

#include <algorithm>
#include <cstring>

namespace jfog {
namespace {

constexpr std::uint64_t kMagic = 0x6a666f6731303034u;
constexpr int kTypeShift =
    56;  // of a summary: 8 bits of dtype, 0 if they differ
constexpr int kCountShift = 40;  // 16 bits of number, 40 of bytes
constexpr std::uint64_t kMostLeaves = (1u << 16) - 1;
constexpr std::uint64_t kMostBytes = (std::uint64_t{1} << kCountShift) - 1;

// The difference between two operations of one name and equal leaves.
std::string Variant(const std::string& name) {
  if (name == "allreduce") return "reduction";
  if (name == "broadcast") return "root";
  return "graph, or another step of it";
}

}  // namespace

OperationHeader MakeHeader(std::string_view name, std::uint64_t sequence,
                           std::uint64_t signature, std::uint64_t variant,
                           std::uint64_t leaves) {
  OperationHeader header;
  header.magic = kMagic;
  header.sequence = sequence;
  header.signature = signature;
  header.variant = variant;
  header.leaves = leaves;
  name.copy(header.operation, sizeof(header.operation) - 1);
  return header;
}

void Summary::Add(DataType type, std::size_t bytes) {
  is_mixed_ = is_mixed_ || (count_ > 0 && type != type_);
  type_ = type;
  ++count_;
  bytes_ += bytes;
}

std::uint64_t Summary::word() const {
  const auto type = is_mixed_ ? 0 : static_cast<std::uint64_t>(type_) & 0xff;
  return type << kTypeShift | std::min(count_, kMostLeaves) << kCountShift |
         std::min(bytes_, kMostBytes);
}

std::string Summary::Describe(std::uint64_t word) {
  const auto type = static_cast<DataType>(word >> kTypeShift);
  const std::uint64_t count = word >> kCountShift & kMostLeaves;
  const std::uint64_t bytes = word & kMostBytes;
  const std::size_t width = SizeOf(type);
  const std::string length = std::to_string(bytes) + " bytes";
  if (count == 0) return length;
  if (count == 1 && width > 0) {
    return std::string("1 leaf, ") + NameOf(type) + " x " +
           std::to_string(bytes / width);
  }
  std::string text = std::to_string(count) + (count == 1 ? " leaf" : " leaves");
  if (width > 0) text += std::string(" of ") + NameOf(type);
  return text + ", " + length;
}

std::optional<std::uint64_t> Summary::BytesOf(std::uint64_t word,
                                              std::size_t leaves) {
  const std::uint64_t count = word >> kCountShift & kMostLeaves;
  const std::uint64_t bytes = word & kMostBytes;
  if (count != leaves || count == kMostLeaves || bytes == kMostBytes) {
    return std::nullopt;
  }
  return bytes;
}

bool IsValid(const OperationHeader& header) { return header.magic == kMagic; }

std::string NameOf(const OperationHeader& header) {
  // A foreign message need not be terminated, nor be text.
  std::string name(header.operation,
                   strnlen(header.operation, sizeof(header.operation)));
  for (char& c : name) {
    if (c < ' ' || c > '~') c = '?';
  }
  return name;
}

std::string Title(const std::string& name, std::uint64_t sequence, int rank) {
  return name + " #" + std::to_string(sequence) + " on rank " +
         std::to_string(rank);
}

std::string Difference(const OperationHeader& mine,
                       const OperationHeader& theirs) {
  if (!IsValid(theirs)) return "not a message of jfog";
  if (theirs.sequence != mine.sequence || NameOf(theirs) != NameOf(mine)) {
    return "it is in " + NameOf(theirs) + " #" +
           std::to_string(theirs.sequence) +
           "; all ranks must run the same operations in one order";
  }
  if (theirs.signature != mine.signature) {
    std::string text = "it sent other dtypes or shapes";
    if (theirs.leaves != 0) text += ": " + Summary::Describe(theirs.leaves);
    if (NameOf(mine).find("allgather") != std::string::npos) {
      text += "; axis_sizes= allows first axes that differ";
    }
    return text;
  }
  if (theirs.variant != mine.variant) {
    return "it uses another " + Variant(NameOf(mine));
  }
  return "";
}

}  // namespace jfog
