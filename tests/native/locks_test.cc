// Ticket locks, and the records of a window's memory.
#include <doctest/doctest.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

#include "mpi/windows/memory.h"

namespace jfog::mpi {

TEST_CASE("a ticket lock excludes threads from each other") {
  TicketLock lock;
  std::atomic<int> inside{0};
  int count = 0;
  bool overlapped = false;
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 2000; ++i) {
        if (!lock.Acquire([] { return true; })) std::abort();
        overlapped |= inside.fetch_add(1) != 0;
        ++count;
        inside.fetch_sub(1);
        lock.Release();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(count == 8000);
  CHECK_FALSE(overlapped);
}

TEST_CASE("tickets are served in their order") {
  TicketLock lock;
  const std::uint32_t first = lock.TakeTicket();
  const std::uint32_t second = lock.TakeTicket();
  CHECK(lock.IsTurn(first));
  CHECK_FALSE(lock.IsTurn(second));
  lock.Release();
  CHECK(lock.IsTurn(second));
}

TEST_CASE("a caller that may not wait gets no lock") {
  TicketLock lock;
  CHECK(lock.Acquire([] { return true; }));
  CHECK_FALSE(lock.Acquire([] { return false; }));
}

TEST_CASE("records of a window do not overlap") {
  constexpr std::size_t kBytes = 100;
  constexpr int kRecords = 3;
  const std::size_t size = WindowMemory::Bytes(kBytes, kRecords);
  std::unique_ptr<std::byte, decltype(&std::free)> memory(
      static_cast<std::byte*>(std::aligned_alloc(64, (size + 63) / 64 * 64)),
      &std::free);
  WindowMemory window(memory.get(), kBytes);
  window.Initialize(kRecords);
  for (int i = 0; i < kRecords; ++i) {
    std::byte* const payload = window.payload(i);
    CHECK(payload >= memory.get());
    CHECK(payload + kBytes <= memory.get() + size);
    if (i > 0) CHECK(payload >= window.payload(i - 1) + kBytes);
    CHECK(window.record(i).version.load() == 0);
  }
}

}  // namespace jfog::mpi
