// Puts, accumulates and gets: operations on windows of other ranks.
#ifndef JFOG_XLA_OPS_MPI_WINDOW_TRANSFER_H_
#define JFOG_XLA_OPS_MPI_WINDOW_TRANSFER_H_

#include <memory>
#include <string>
#include <vector>

#include "mpi/operation.h"
#include "mpi/window.h"
#include "mpi/window_service.h"

namespace jfog::mpi {

// Reaches at once for the parts that lie in shared memory, and asks the service
// of the other ranks. It is in no order with operations of other ranks, and its
// errors, but for the deadline, leave the communicator as it is.
class WindowTransfer : public Operation {
 public:
  // `result` holds the leaves of the result, or none; `value` those of a put or
  // an accumulate, the associated p among them. One weight for each peer.
  WindowTransfer(std::shared_ptr<Window> window, const char* name,
                 WindowRequest::Kind kind, Leaves result, Leaves value,
                 std::vector<int> peers, std::vector<double> weights);

 private:
  // What goes on with a rank that is far away.
  struct RemoteTransfer {
    std::size_t peer = 0;  // its place among the peers
    Buffer request, reply, value;
    int tag = 0;
    bool answered = false;
  };
  // Its messages.
  enum { kRequest, kPayload, kReply, kValue, kMessages };

  ffi::Error Post() override;
  ffi::Error Completed(std::size_t slot) override;
  ffi::Error Drained(bool* ended) override;
  std::vector<int> Missing() const override;
  void Leak() override;
  void Ended() override { window_->End(); }
  bool is_ordered() const override { return false; }

  ffi::Error Reach(std::size_t peer);
  ffi::Error Ask(std::size_t number);
  ffi::Error Take(int rank, double weight, const std::byte* value);
  ffi::Error CheckState(int rank, WindowMemory::State state) const;
  bool has_payload() const {
    return kind_ == WindowRequest::kPut || kind_ == WindowRequest::kAccumulate;
  }

  std::shared_ptr<Window> window_;
  WindowRequest::Kind kind_;
  Leaves value_;
  std::vector<int> peers_;
  std::vector<double> weights_;
  std::vector<RemoteTransfer> remote_transfers_;
  ffi::Error outcome_;
};

// Asks a rank that is far away for its mutex, or gives it back, and waits.
ffi::Error AskFor(std::shared_ptr<Window> window, WindowRequest::Kind kind,
                  int rank);

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_WINDOW_TRANSFER_H_
