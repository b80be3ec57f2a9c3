// Puts, accumulates and gets: operations on windows of other ranks.
#ifndef JFOG_XLA_OPS_MPI_WINDOW_TRANSFER_H_
#define JFOG_XLA_OPS_MPI_WINDOW_TRANSFER_H_

#include <memory>
#include <string>
#include <vector>

#include "mpi/operation.h"
#include "mpi/windows/service.h"
#include "mpi/windows/window.h"

namespace jfog::mpi {

// An operation on the windows of some peers. Parts in shared memory are
// accessed when it is posted; remote parts by a request to the service of their
// rank. It is not in the ordered chain: other ranks take no part in it. Its
// errors, other than the deadline's, do not fail the communicator.
class WindowTransfer : public Operation {
 public:
  // `result` holds the leaf of the window's handle, or none; `value` the leaves
  // of a put or an accumulate, and the associated p. One weight for each peer.
  WindowTransfer(std::shared_ptr<Window> window, const char* name,
                 WindowRequest::Kind kind, Payload result, Payload value,
                 std::vector<int> peers, std::vector<double> weights);

 private:
  // The messages with one remote peer.
  struct RemoteTransfer {
    std::size_t peer = 0;  // index into `peers_`
    Buffer request, reply, value;
    int tag = 0;
    std::int64_t since = 0;  // in the timeline
    bool answered = false;
  };
  // Request slots of a remote peer; those from `kPayload` on are of the pieces
  // of a payload.
  enum { kRequest, kReply, kValue, kPayload };

  ffi::Error Post() override;
  ffi::Error Completed(std::size_t slot) override;
  ffi::Error Drained(bool* ended) override;
  std::vector<int> Missing() const override;
  void Leak() override;
  ffi::Error GoOnWithout(const std::vector<int>& gone) override;
  ffi::Error RequestFailed(std::size_t slot) override;
  void Ended() override { window_->EndOperation(); }
  bool is_ordered() const override { return false; }

  // The whole transfer with a peer that shares memory.
  ffi::Error TransferShared(std::size_t peer);
  ffi::Error SendRequest(std::size_t number);
  void Answered(RemoteTransfer& remote);
  void RecordTransfer(std::int64_t since, int rank);
  // Writes a value from a peer to its slot here.
  ffi::Error WriteSlot(int rank, double weight, const std::byte* value);
  ffi::Error CheckState(int rank, WindowMemory::State state);
  // Goes on without a rank that has failed, or fails.
  ffi::Error LeaveOut(int rank);
  bool has_payload() const {
    return kind_ == WindowRequest::kPut || kind_ == WindowRequest::kAccumulate;
  }

  std::shared_ptr<Window> window_;
  WindowRequest::Kind kind_;
  Payload value_;
  std::vector<int> peers_;
  std::vector<double> weights_;
  std::vector<RemoteTransfer> remote_transfers_;
  std::size_t messages_ = 0;  // slots of each
  ffi::Error outcome_;        // of all peers: the first error
};

// Locks or unlocks the mutex of a remote rank; blocking.
ffi::Error RequestMutex(std::shared_ptr<Window> window,
                        WindowRequest::Kind kind, int rank);

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_WINDOW_TRANSFER_H_
