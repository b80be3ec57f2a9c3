// Allocations of the emulation: guarded, and quarantined once freed.
#ifndef JFOG_TESTS_EMULATION_HEAP_H_
#define JFOG_TESTS_EMULATION_HEAP_H_

#include <cstddef>
#include <deque>
#include <map>
#include <mutex>
#include <string>

#include "emulation.h"

namespace jfog::emulation {

struct Block {
  char* base;
  std::size_t size;
  Memory memory;
  bool freed = false;
};

// All allocations by address. Freed ones stay for a while, so that their use is
// detected.
class Heap {
 public:
  // False if the device has too little memory.
  bool Allocate(std::size_t size, Memory memory, void** pointer);
  // An empty text, or the error.
  std::string Free(void* pointer, Memory memory);
  // An empty text, or the error of using these bytes as that memory.
  std::string Check(const void* pointer, std::size_t bytes, Memory memory);
  bool IsPinned(const void* pointer);
  // The number of allocations that are not freed.
  long Live(Memory memory);

 private:
  std::mutex mutex_;
  std::map<char*, Block> blocks_;
  std::deque<char*> quarantine_;
  std::size_t quarantined_ = 0;
  std::size_t device_bytes_ = 0;
};

// Lives as long as the process, whose threads may outlast main().
Heap& TheHeap();

}  // namespace jfog::emulation

#endif  // JFOG_TESTS_EMULATION_HEAP_H_
