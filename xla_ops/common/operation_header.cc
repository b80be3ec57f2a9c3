// The identity of an operation, as ranks exchange and compare it.
#include "common/operation_header.h"

#include <cstring>

namespace jfog {
namespace {

constexpr std::uint64_t kMagic = 0x6a666f6731303034u;

}  // namespace

OperationHeader MakeHeader(std::string_view name, std::uint64_t sequence,
                           std::uint64_t signature, std::uint64_t variant,
                           std::size_t bytes) {
  OperationHeader header;
  header.magic = kMagic;
  header.sequence = sequence;
  header.signature = signature;
  header.variant = variant;
  header.bytes = bytes;
  name.copy(header.operation, sizeof(header.operation) - 1);
  return header;
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
    return "it sent other dtypes or shapes (" + std::to_string(theirs.bytes) +
           " bytes)";
  }
  if (theirs.variant != mine.variant) {
    return "it uses another graph, step, reduction or root";
  }
  return "";
}

}  // namespace jfog
