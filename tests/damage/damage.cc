// Damages one message that this process sends by MPI: bits of all but the
// payload, or the length.
//
// Loaded before jfog's extension, into the global scope, its MPI_Isend takes
// the place of MPI's. The bytes of a payload stay as they are, since messages
// have no checksum of them. Collectives of MPI send inside of the library and
// stay whole.
#include <dlfcn.h>
#include <mpi.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>

namespace {

// As in xla_ops/mpi: tags, and lengths of what is not payload.
constexpr int kEnvelopeTag = 1, kControlTag = 3, kRequestTag = 5;
constexpr int kFirstFreeTag = 16;
constexpr int kHeader = 96, kClaim = 24, kRequest = 48, kReply = 16;

// The damage: to bits, or to the length of messages of any kind.
enum Kind { kBits, kLength };

std::mutex mutex;  // guards all below
int kind = kBits;
int left_to_pass = -1;  // messages before the damaged one; -1: none is damaged
std::uint64_t state = 0;
int damaged = 0;

std::uint64_t Random() {  // xorshift64*
  state ^= state >> 12;
  state ^= state << 25;
  state ^= state >> 27;
  return state * 0x2545f4914f6cdd1du;
}

template <typename Function>
Function* Find(const char* name) {
  for (const char* library : {"libmpi.so.40", "libmpi.so.12"}) {
    if (void* found = dlopen(library, RTLD_LAZY | RTLD_NOLOAD)) {
      return reinterpret_cast<Function*>(dlsym(found, name));
    }
  }
  std::abort();
}

// The bytes at the front of a message that are not payload.
int Described(int bytes, int tag) {
  switch (tag) {
    case kEnvelopeTag:
      return bytes == kHeader + kClaim ? bytes : kHeader;
    case kControlTag:
      return bytes;
    case kRequestTag:
      return kRequest;
    default:
      return tag >= kFirstFreeTag && bytes == kReply ? bytes : 0;
  }
}

// The count of a damaged copy; -1 if the message stays as it is.
int Damage(std::byte* copy, int bytes, int width, int tag) {
  std::lock_guard<std::mutex> lock(mutex);
  const int described = Described(bytes, tag);
  if (left_to_pass < 0 || bytes == 0) return -1;
  if (kind == kBits && described == 0) return -1;
  if (left_to_pass-- > 0) return -1;
  ++damaged;
  if (kind == kLength) return static_cast<int>(Random() % (bytes / width));
  // One bit, or all bits of a byte, somewhere.
  const std::uint64_t bits = Random() % 9;
  copy[Random() % described] ^=
      static_cast<std::byte>(bits == 8 ? 0xff : 1 << bits);
  return bytes / width;
}

}  // namespace

extern "C" {

void damage_arm(int what, int after, std::uint64_t seed) {
  std::lock_guard<std::mutex> lock(mutex);
  kind = what;
  left_to_pass = after;
  state = seed * 2 + 1;
  damaged = 0;
}

// The number of messages that have been damaged since.
int damage_done() {
  std::lock_guard<std::mutex> lock(mutex);
  return damaged;
}

int MPI_Isend(const void* buffer, int count, MPI_Datatype type, int rank,
              int tag, MPI_Comm comm, MPI_Request* request) {
  static auto* const size = Find<decltype(MPI_Type_size)>("PMPI_Type_size");
  static auto* const send = Find<decltype(MPI_Isend)>("PMPI_Isend");
  int width = 0;
  size(type, &width);
  const int bytes = count * width;
  // Lives as long as the process, as MPI may read it until the message is gone.
  auto* copy = static_cast<std::byte*>(std::malloc(bytes + 1));
  std::memcpy(copy, buffer, bytes);
  const int damaged_count = Damage(copy, bytes, width, tag);
  if (damaged_count < 0) {
    std::free(copy);
    return send(buffer, count, type, rank, tag, comm, request);
  }
  return send(copy, damaged_count, type, rank, tag, comm, request);
}

}  // extern "C"
