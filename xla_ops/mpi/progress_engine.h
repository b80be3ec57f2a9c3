// The progress engine: advances all operations in flight, beside computation.
#ifndef JFOG_XLA_OPS_MPI_PROGRESS_ENGINE_H_
#define JFOG_XLA_OPS_MPI_PROGRESS_ENGINE_H_

#include <condition_variable>
#include <cstddef>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "mpi/operation.h"

namespace jfog::mpi {

// One per process. Of its threads one leads: it advances all operations in
// turn. When an operation ends, the leader passes the lead to another thread
// before it calls the waiter, because XLA continues the program on that thread
// and may compute there for long.
class Engine {
 public:
  using Waiter = std::function<void(const ffi::Error&)>;

  static Engine& Get();

  // Adds an operation. `waiter`, if there is one, is called once when it ends,
  // on a thread of the engine.
  void Submit(std::shared_ptr<Operation> operation, Waiter waiter);
  // Adds a waiter to a submitted operation. Returns false, and does not keep
  // the waiter, if the operation has ended.
  bool Attach(const std::shared_ptr<Operation>& operation, Waiter& waiter);

  // Reads the control messages of a communicator from now on, also between
  // operations.
  void Watch(const std::shared_ptr<Communicator>& comm);
  // Calls `serve` repeatedly until the communicator is closed. It serves
  // requests of other ranks and returns whether one is in progress.
  void Serve(const std::shared_ptr<Communicator>& comm,
             std::function<bool()> serve);

  // Whether some caller waits in an operation.
  bool IsWaiting();
  // Lines about the operations in flight, for the user.
  std::string State();

  // Waits until every operation has ended, each within its deadline.
  void Drain();
  // Ends when no thread of the engine is inside MPI, and none will be.
  void Stop();

 private:
  struct Entry {
    std::shared_ptr<Operation> operation;
    Waiter waiter;
  };
  // An entry moves from list to list, in constant time and without an
  // allocation; its address stays.
  using Entries = std::list<Entry>;

  struct Watched {
    std::shared_ptr<Communicator> comm;
    std::function<bool()> serve;  // null: control messages only
  };

  void Run();
  // Starts a thread; false if the system has none.
  bool Spawn();
  // Ends an operation for which no thread can be started.
  void GiveUp(const Operation* operation);
  void LookAfter(Watched watched);
  void LookAfter();
  // Advances operations until one has ended that has a waiter; returns it.
  Entries Lead(std::unique_lock<std::mutex>& lock);
  // For the leader, under the lock: takes up what was submitted and attached.
  bool TakeUp();
  // For the leader, without the lock: advances the first operations and so many
  // of the others, and moves those that have ended to `ended`.
  bool Poll(std::size_t others, Entries* ended);
  bool has_work() const { return !open_.empty() || !ended_.empty(); }

  std::mutex mutex_;
  std::condition_variable work_;     // for threads that can lead
  std::condition_variable changed_;  // for the leader, Drain and Stop
  std::condition_variable stop_;     // for the thread that serves
  // The operations in flight, in these two lists: those that the leader polls,
  // which it alone may access while it leads, and those that it takes up next.
  Entries polled_, added_;
  Entries::iterator next_ = polled_.end();  // of the polled, in turn
  std::unordered_map<const Operation*, Entries::iterator> open_;
  std::vector<const Operation*> attached_;  // since the leader has looked
  Entries ended_;                           // their waiters are still to call
  int threads_ = 0;
  int idle_ = 0;  // threads without work
  bool leading_ = false;
  std::vector<Watched> watched_;
  bool watching_ = false;  // a thread serves these
  bool stopped_ = false;
};

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_PROGRESS_ENGINE_H_
