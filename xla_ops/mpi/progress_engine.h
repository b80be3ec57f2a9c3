// The progress engine: moves on all operations in flight, beside computation.
#ifndef JFOG_XLA_OPS_MPI_PROGRESS_ENGINE_H_
#define JFOG_XLA_OPS_MPI_PROGRESS_ENGINE_H_

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "mpi/operation.h"

namespace jfog::mpi {

// One for the process. Its threads take turns: one of them leads, moving on all
// operations, none before the others. When one ends, the leader gives the lead
// away before it calls whoever waits for it, for XLA continues the program on
// that thread, and may compute there for long.
class Engine {
 public:
  using Waiter = std::function<void(const ffi::Error&)>;

  static Engine& Get();

  // Takes over an operation. `waiter` is called once when it ends, on a thread
  // of the engine; without one nobody waits yet.
  void Submit(std::shared_ptr<Operation> operation, Waiter waiter);
  // Lets `waiter` wait for a submitted operation. False, and the waiter is not
  // kept, if the operation has ended.
  bool Attach(const std::shared_ptr<Operation>& operation, Waiter& waiter);

  // From now on reads the notes of a communicator also while this rank is in
  // no operation.
  void Watch(const std::shared_ptr<Communicator>& comm);
  // From now on calls `serve` again and again until the communicator is closed;
  // it does what others ask for, and says whether it is in the middle of that.
  void Serve(const std::shared_ptr<Communicator>& comm,
             std::function<bool()> serve);

  // Waits until every operation has ended, each within its deadline.
  void Drain();
  // Ends when no thread of the engine is inside MPI, and none will be.
  void Stop();

 private:
  struct Entry {
    std::shared_ptr<Operation> operation;
    Waiter waiter;
  };

  struct Watched {
    std::shared_ptr<Communicator> comm;
    std::function<bool()> serve;  // null: its notes are read
  };

  Engine() = default;
  void Run();
  void LookAfter(Watched watched);
  void LookAfter();
  // Moves operations on until one has ended.
  Entry Lead(std::unique_lock<std::mutex>& lock);

  std::mutex mutex_;
  std::condition_variable work_;     // for those who could lead
  std::condition_variable changed_;  // for the leader, and who stops it
  std::condition_variable stop_;     // for who looks after others
  std::vector<Entry> entries_;
  std::uint64_t version_ = 0;  // of the entries
  int idle_ = 0;               // threads that wait for work
  bool leading_ = false;
  std::vector<Watched> watched_;
  bool watching_ = false;  // a thread looks after these
  bool stopped_ = false;
};

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_PROGRESS_ENGINE_H_
