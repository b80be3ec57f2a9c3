// Windows: what a rank exposes, and slots that its in-neighbors write.
#ifndef JFOG_XLA_OPS_MPI_WINDOW_H_
#define JFOG_XLA_OPS_MPI_WINDOW_H_

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "common/status.h"
#include "mpi/buffer_pool.h"
#include "mpi/communicator.h"
#include "mpi/payload.h"
#include "mpi/shared_memory.h"
#include "mpi/window_memory.h"

namespace jfog::mpi {

// What its ranks agree on, and this rank's place in it.
struct WindowPlan {
  std::uint64_t variant = 0;      // the graph and all else that must be equal
  std::vector<int> sources;       // in-neighbors, in the order of the slots
  std::vector<int> destinations;  // out-neighbors
  std::vector<int> slots;         // this rank's at each destination
  bool zero_init = false;
  // Of the associated p; PRED: there is none.
  DataType p_type = DataType::PRED;
};

// A window of this process. The parts of ranks that share memory with this one
// lie open here; the others are reached by messages to their service.
class Window : public std::enable_shared_from_this<Window> {
 public:
  // Collective: makes a window for values like the leaves, exposing them.
  static ffi::ErrorOr<std::shared_ptr<Window>> Make(
      std::shared_ptr<Communicator> comm, WindowPlan plan, Leaves leaves);
  Window(const Window&) = delete;
  Window& operator=(const Window&) = delete;

  const std::shared_ptr<Communicator>& comm() const { return comm_; }
  // Equal on all ranks.
  std::uint64_t id() const { return id_; }
  // What stands for it in this process's programs.
  std::uint32_t number() const { return number_; }
  std::uint64_t NextOperation() { return operations_.fetch_add(1); }

  // The leaves of a value with their places, and last the associated p.
  const Leaves& layout() const { return layout_; }
  bool has_p() const { return plan_.p_type != DataType::PRED; }
  // The leaves that lie at `payload`.
  Leaves At(const std::byte* payload) const;
  // Completes the leaves of a call with this rank's p; an error, if they are
  // not like the window's.
  ffi::Error Complete(Leaves* leaves, const char* name) const;

  const WindowMemory& own() const { return own_; }
  // The part of a rank, null where that is far away.
  const WindowMemory& part(int rank) const { return parts_[rank]; }
  // The record of an in-neighbor here, and this rank's at an out-neighbor; 0
  // for ranks that are none.
  int RecordOf(int source) const;
  int RecordAt(int destination) const;

  // Takes a lock of a rank's part. Fails the communicator after its timeout.
  ffi::Error Acquire(TicketLock& lock, int rank, const std::string& title);

  // Operations under way on this rank.
  void Begin() { active_.fetch_add(1, std::memory_order_relaxed); }
  void End() { active_.fetch_sub(1, std::memory_order_release); }

  // The user's mutexes of these ranks, ascending.
  ffi::Error Lock(const std::vector<int>& ranks);
  ffi::Error Unlock(const std::vector<int>& ranks);

  // Collective: waits for all ranks, and gives the memory back.
  ffi::Error Free();

 private:
  Window() = default;
  ffi::Error LockOne(int rank);
  ffi::Error UnlockOne(int rank);

  std::shared_ptr<Communicator> comm_;
  std::uint64_t id_ = 0;
  std::uint32_t number_ = 0;
  WindowPlan plan_;
  Leaves layout_;
  std::unique_ptr<SharedMemory> shared_;  // null: nobody shares this rank's
  Buffer private_;                        // instead
  WindowMemory own_;
  std::vector<WindowMemory> parts_;
  std::atomic<std::uint64_t> operations_{0};
  std::atomic<int> active_{0};
  std::mutex mutex_;                     // guards all below
  std::map<int, std::thread::id> held_;  // mutexes, by rank
};

// The window that a number stands for, open.
ffi::ErrorOr<std::shared_ptr<Window>> FindWindow(const std::uint32_t* number,
                                                 const char* name);
void WriteNumber(const Window& window, std::uint32_t* number);
// The same by the communicator and `id`; null where it is gone, and how.
std::shared_ptr<Window> FindWindow(const Communicator& comm, std::uint64_t id);
WindowMemory::State GoneState(const Communicator& comm);

// This rank takes part in no window of the communicator any more; without one,
// in no window at all.
void LeaveWindows(const Communicator* comm);

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_WINDOW_H_
