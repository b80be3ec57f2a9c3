// Allocations of the emulation.
#include "heap.h"

#include <cstdlib>
#include <cstring>

namespace jfog::emulation {
namespace {

constexpr std::size_t kGuard = 256;  // bytes around each allocation
constexpr unsigned char kGuardByte = 0x5a;
constexpr unsigned char kUnwritten = 0xa5;
constexpr unsigned char kFreed = 0xdd;
constexpr std::size_t kQuarantine = std::size_t{64} << 20;

}  // namespace

bool Heap::Allocate(std::size_t size, Memory memory, void** pointer) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (memory == Memory::kDevice &&
      device_bytes_ + size >
          static_cast<std::size_t>(Setting("JFOG_EMULATION_MEMORY", 1L << 40)))
    return false;
  void* base = nullptr;
  if (posix_memalign(&base, kGuard, size + 2 * kGuard)) return false;
  char* const begin = static_cast<char*>(base) + kGuard;
  std::memset(base, kGuardByte, kGuard);
  std::memset(begin, kUnwritten, size);
  std::memset(begin + size, kGuardByte, kGuard);
  blocks_[begin] = {static_cast<char*>(base), size, memory};
  if (memory == Memory::kDevice) device_bytes_ += size;
  *pointer = begin;
  return true;
}

std::string Heap::Free(void* pointer, Memory memory) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = blocks_.find(static_cast<char*>(pointer));
  if (found == blocks_.end()) return "nothing was allocated there";
  Block& block = found->second;
  if (block.freed) return "it was freed before";
  if (block.memory != memory) return "it is memory of the other kind";
  bool whole = true;
  for (std::size_t i = 0; i < kGuard; ++i) {
    whole &= static_cast<unsigned char>(block.base[i]) == kGuardByte;
    whole &= static_cast<unsigned char>(block.base[kGuard + block.size + i]) ==
             kGuardByte;
  }
  std::memset(found->first, kFreed, block.size);
  block.freed = true;
  if (memory == Memory::kDevice) device_bytes_ -= block.size;
  quarantined_ += block.size;
  quarantine_.push_back(found->first);
  while (quarantined_ > kQuarantine) {
    const auto oldest = blocks_.find(quarantine_.front());
    quarantine_.pop_front();
    quarantined_ -= oldest->second.size;
    std::free(oldest->second.base);
    blocks_.erase(oldest);
  }
  return whole ? "" : "bytes just outside of it were written";
}

std::string Heap::Check(const void* pointer, std::size_t bytes, Memory memory) {
  std::lock_guard<std::mutex> lock(mutex_);
  const char* const begin = static_cast<const char*>(pointer);
  auto found = blocks_.upper_bound(const_cast<char*>(begin));
  // Bytes that begin outside of all allocations must not run into one.
  if (found != blocks_.end() && begin + bytes > found->second.base)
    return "it runs into an allocation";
  if (found == blocks_.begin()) return "";
  --found;
  const Block& block = found->second;
  const char* const end = found->first + block.size;
  if (begin >= end + kGuard) return "";  // XLA's, or the process's own
  if (begin >= end || begin + bytes > end)
    return "it ends beyond an allocation of " + std::to_string(block.size) +
           " bytes";
  if (block.freed) return "it was freed";
  if (block.memory != memory)
    return memory == Memory::kDevice ? "it is pinned memory of the host"
                                     : "it is memory of the device";
  return "";
}

bool Heap::IsPinned(const void* pointer) {
  std::lock_guard<std::mutex> lock(mutex_);
  char* const begin = static_cast<char*>(const_cast<void*>(pointer));
  auto found = blocks_.upper_bound(begin);
  if (found == blocks_.begin()) return false;
  --found;
  return found->second.memory == Memory::kHost && !found->second.freed &&
         begin < found->first + found->second.size;
}

long Heap::Live(Memory memory) {
  std::lock_guard<std::mutex> lock(mutex_);
  long live = 0;
  for (const auto& [begin, block] : blocks_)
    live += block.memory == memory && !block.freed;
  return live;
}

Heap& TheHeap() {
  static Heap& heap = *new Heap;
  return heap;
}

}  // namespace jfog::emulation
