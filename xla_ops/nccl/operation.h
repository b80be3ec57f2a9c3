// One operation on the device: its identity, its headers, its clock, its end.
#ifndef JFOG_XLA_OPS_NCCL_OPERATION_H_
#define JFOG_XLA_OPS_NCCL_OPERATION_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "common/deadline.h"
#include "common/operation_header.h"
#include "nccl/communicator.h"

namespace jfog::nccl {

using Header = OperationHeader;

// An operation is launched once, then polled by the next call and by the
// watchdog. The device does not wait for the polls.
class Operation : public InFlightOperation,
                  public std::enable_shared_from_this<Operation> {
 public:
  Operation(std::shared_ptr<Communicator> comm, OperationSpec spec);
  Operation(const Operation&) = delete;
  Operation& operator=(const Operation&) = delete;

  // Posts it with its headers on a stream. With `is_awaited` the clock of the
  // deadline starts when the stream reaches it.
  ffi::Error Launch(CudaStream stream, bool is_awaited, const Post& post);
  // Starts the clock at the end of an earlier operation of the same call.
  void Follow(std::shared_ptr<Operation> other) { before_ = std::move(other); }

  // Starts the clock of the deadline: when an event has passed, or now.
  void Await(std::shared_ptr<Event> reached);
  void Await() override;
  bool HasEnded() const override {
    return ended_ != nullptr && ended_->HasPassed();
  }
  const std::shared_ptr<Event>& ended() const { return ended_; }

  bool Poll(Clock::time_point now) override;
  void Peek() override;
  ffi::Error CheckDeadline(Clock::duration waited) override;
  ffi::Error Fail(ffi::ErrorCode code, const std::string& text) override;
  void Report(ffi::ErrorCode code, const std::string& text) override;

  // "neighbor_allreduce #41 on rank 0"
  std::string Title() const;
  std::string Peers() const override { return RankList(peers_); }
  Communicator& comm() const { return *comm_; }

 private:
  ffi::Error Post(CudaStream stream, const nccl::Post& post);
  ffi::Error Stage(CudaStream stream);
  void PostHeaders(Group& group) const;
  // The first mismatch of the received headers; with `partly` some may still be
  // missing.
  std::optional<std::string> FindMismatch(const Header* headers, bool partly);
  std::optional<std::string> FindMismatchOfAll(const Header& header,
                                               bool partly);
  void Release();

  const std::shared_ptr<Communicator> comm_;
  const OperationSpec spec_;
  std::vector<int> peers_;  // ascending
  std::uint64_t sequence_ = 0;

  // Headers: on the device the outgoing, then the incoming; on the host both,
  // then two copies of the incoming, of the end and of the last peek.
  std::size_t outgoing_ = 0;
  std::size_t incoming_ = 0;
  Buffer device_headers_;
  Buffer host_headers_;

  std::shared_ptr<Event> staged_;
  std::shared_ptr<Event> ended_;
  std::shared_ptr<Event> peeked_;
  std::shared_ptr<Operation> before_;
  Clock::duration next_peek_;
  std::optional<Clock::time_point> reached_at_;
  Deadline deadline_;

  std::mutex mutex_;  // guards all below
  std::shared_ptr<Event> reached_;
  bool is_awaited_ = false;
};

}  // namespace jfog::nccl

#endif  // JFOG_XLA_OPS_NCCL_OPERATION_H_
