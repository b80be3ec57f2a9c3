// Windows of this process: a value that each rank exposes, and slots that its
// in-neighbors write.
#ifndef JFOG_XLA_OPS_MPI_WINDOWS_WINDOW_H_
#define JFOG_XLA_OPS_MPI_WINDOWS_WINDOW_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "common/status.h"
#include "mpi/buffer_pool.h"
#include "mpi/communicator.h"
#include "mpi/payload.h"
#include "mpi/shared_memory.h"
#include "mpi/windows/memory.h"

namespace jfog::mpi {

constexpr const char* kCreate = "win_create";

// The description of a window, and this rank's neighbors in it.
struct WindowPlan {
  std::uint64_t variant = 0;      // hash of the graph and the options
  std::vector<int> sources;       // in-neighbors, in the order of the slots
  std::vector<int> destinations;  // out-neighbors
  std::vector<int> slots;         // of this rank, at each destination
  bool zero_init = false;
  DataType p_type = DataType::PRED;  // of the associated p; PRED: without p
};

// A window. The memory of ranks on this machine is mapped into this process;
// memory of remote ranks is accessed by requests to their service.
class Window : public std::enable_shared_from_this<Window> {
 public:
  // Collective: makes a window for payloads like this one, and exposes it. The
  // caller then starts a service for the requests of remote ranks.
  static ffi::ErrorOr<std::shared_ptr<Window>> Make(
      const std::shared_ptr<Communicator>& comm, WindowPlan plan,
      Payload payload);
  Window(const Window&) = delete;
  Window& operator=(const Window&) = delete;

  const std::shared_ptr<Communicator>& comm() const { return comm_; }
  // The window's ordinal on its communicator, equal on all ranks.
  std::uint64_t global_id() const { return global_id_; }
  // The value that represents the window in programs of this process.
  std::uint32_t local_handle() const { return local_handle_; }
  std::uint64_t NextOperation() { return operations_.fetch_add(1); }

  // The leaves of a record with their offsets; the associated p comes last.
  const Payload& layout() const { return layout_; }
  bool has_p() const { return plan_.p_type != DataType::PRED; }
  // A payload whose inputs are the leaves of the record at `bytes`.
  Payload PayloadAt(const std::byte* bytes) const;
  // Checks the leaves of an operation against the layout, and appends this
  // rank's p to them.
  ffi::Error BindPayload(Payload* payload, const char* name) const;

  const WindowMemory& own() const { return own_; }
  // The memory of a rank on this machine; null for a remote rank.
  const WindowMemory& part(int rank) const { return parts_[rank]; }
  bool has_remote_parts() const;
  // The record of an in-neighbor in this rank's memory, and this rank's record
  // at an out-neighbor; 0 for other ranks.
  int RecordOf(int source) const;
  int RecordAt(int destination) const;

  // Acquires a lock in the memory of `rank`. Fails the communicator after its
  // timeout, with the title of the operation. If the rank has failed, which the
  // communicator then knows, that is an error that fails nothing.
  ffi::Error Acquire(TicketLock& lock, int rank,
                     const std::function<std::string()>& title);
  // Frees a lock that is waited for from ranks that have failed.
  void FreeFromGone(TicketLock& lock, LockLook* look) const;
  // Goes on without ranks that have failed, and counts them, if the
  // communicator reweights; otherwise fails it.
  ffi::Error LeaveOut(const std::string& title, const std::vector<int>& gone);

  // The operations in flight on this rank, which `Free` waits for.
  void BeginOperation() { active_.fetch_add(1, std::memory_order_relaxed); }
  void EndOperation() { active_.fetch_sub(1, std::memory_order_release); }

  // The threads of this process that hold the mutex of a rank.
  bool IsHeldByThisThread(int rank);
  void SetHolder(int rank);
  bool ClearHolder(int rank);  // whether one held it

  // Collective: waits for all ranks, and releases the memory.
  ffi::Error Free();

 private:
  Window() = default;
  ffi::Error Expose(const Payload& payload, Payload described);
  ffi::Error UseParts(const std::vector<int>& ranks);
  void FillRecords(const Payload& payload);

  std::shared_ptr<Communicator> comm_;
  std::uint64_t global_id_ = 0;
  std::uint32_t local_handle_ = 0;
  WindowPlan plan_;
  Payload layout_;
  std::unique_ptr<SharedMemory> shared_;
  Buffer private_;  // where there is no shared memory
  WindowMemory own_;
  std::vector<WindowMemory> parts_;
  std::atomic<std::uint64_t> operations_{0};
  std::atomic<int> active_{0};
  std::mutex mutex_;                        // guards all below
  std::map<int, std::thread::id> holders_;  // of mutexes, by rank
};

// The open window of a handle, on a communicator that has not failed.
ffi::ErrorOr<std::shared_ptr<Window>> FindWindow(const std::uint32_t* handle,
                                                 const char* name);
void WriteHandle(const Window& window, std::uint32_t* handle);
// The open window of a communicator and a global id, or null; `GoneState` is
// the reason for null.
std::shared_ptr<Window> FindWindow(const Communicator& comm,
                                   std::uint64_t global_id);
WindowMemory::State GoneState(const Communicator& comm);

// Marks the windows of a communicator as left by this rank and drops them; null
// stands for all communicators.
void LeaveWindows(const Communicator* comm);

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_WINDOWS_WINDOW_H_
