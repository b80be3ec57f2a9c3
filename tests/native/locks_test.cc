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
    threads.emplace_back([&, t] {
      for (int i = 0; i < 2000; ++i) {
        if (!lock.Acquire(t, [] { return true; })) std::abort();
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
  CHECK_FALSE(lock.TryEnter(second, 1));
  CHECK(lock.TryEnter(first, 0));
  CHECK(lock.holder() == 0);
  CHECK_FALSE(lock.TryEnter(second, 1));
  lock.Release();
  CHECK(lock.TryEnter(second, 1));
}

TEST_CASE("a lock outlives a process that has ended as its holder") {
  TicketLock lock;
  CHECK(lock.Acquire(7, [] { return true; }));
  LockLook look;
  const std::uint32_t ticket = lock.TakeTicket();
  look.Free(lock, [](int) { return false; });
  CHECK_FALSE(lock.TryEnter(ticket, 1));
  look.Free(lock, [](int rank) { return rank == 7; });
  CHECK(lock.TryEnter(ticket, 1));
  // Its holder is another one now.
  lock.ReleaseFor(7);
  CHECK(lock.holder() == 1);
}

TEST_CASE("the ticket of a process that has ended in the queue is passed") {
  TicketLock lock;
  const std::uint32_t ended = lock.TakeTicket();
  LockLook look;
  const auto may_wait = [&] {
    look.Free(lock, [](int) { return false; });
    return true;
  };
  CHECK(lock.Acquire(1, may_wait));
  // It has not ended after all, and enters when the lock is free.
  CHECK_FALSE(lock.TryEnter(ended, 0));
  lock.Release();
  CHECK(lock.TryEnter(ended, 0));
  lock.Release();
  const std::uint32_t next = lock.TakeTicket();
  const std::uint32_t last = lock.TakeTicket();
  CHECK_FALSE(lock.TryEnter(last, 1));
  CHECK(lock.TryEnter(next, 1));
}

TEST_CASE("a lock excludes threads while tickets are passed") {
  TicketLock lock;
  std::atomic<int> inside{0};
  bool overlapped = false;
  std::atomic<bool> done{false};
  std::thread passes([&] {
    while (!done.load()) lock.Pass(lock.serving());
  });
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 1000; ++i) {
        if (!lock.Acquire(t, [] { return true; })) std::abort();
        overlapped |= inside.fetch_add(1) != 0;
        inside.fetch_sub(1);
        lock.Release();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  done.store(true);
  passes.join();
  CHECK_FALSE(overlapped);
}

TEST_CASE("a caller that may not wait gets no lock") {
  TicketLock lock;
  CHECK(lock.Acquire(0, [] { return true; }));
  CHECK_FALSE(lock.Acquire(1, [] { return false; }));
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
