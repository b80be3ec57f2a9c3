// Base of collectives over all ranks: a consistency check, then MPI's
// collective.
#ifndef JFOG_XLA_OPS_MPI_COLLECTIVE_H_
#define JFOG_XLA_OPS_MPI_COLLECTIVE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "mpi/buffer_pool.h"
#include "mpi/operation.h"

namespace jfog::mpi {

// A collective over all ranks of a communicator. The ranks first check that all
// of them are in the same operation, since an MPI collective on mismatched
// arguments may hang or corrupt memory; then the data moves by MPI's
// nonblocking collectives. Per communicator one is in flight at a time, in
// program order.
class Collective : public Operation {
 protected:
  using Operation::Operation;

  // Starts MPI's collectives on buffers of this operation, with `Add`.
  virtual ffi::Error Begin() = 0;
  // Called when what was started has ended: may start more, with `Reserve` and
  // `Add`.
  virtual ffi::Error Continue(bool* has_more) {
    *has_more = false;
    return ffi::Error::Success();
  }
  // Writes the results.
  virtual ffi::Error Finish() = 0;

  // Memory that lives as long as MPI uses it.
  std::byte* Allocate(std::size_t bytes);
  // Makes slots for so many requests; `Add` returns the next of them.
  void Reserve(std::size_t requests);
  MPI_Request* Add() { return Slot(used_++); }

  // Counts a payload as the bytes that this rank contributes and receives,
  // under this rank itself: the messages between ranks are internal to MPI.
  void Count(std::size_t sent, std::size_t received);

 private:
  enum Stage { kQueued, kChecking, kComparing, kMoving };

  ffi::Error Post() override;
  ffi::Error Resume(bool* moved) override;
  bool is_waiting() const override { return stage_ == kQueued; }
  ffi::Error Completed(std::size_t) override { return ffi::Error::Success(); }
  ffi::Error Drained(bool* ended) override;
  std::vector<int> Missing() const override;
  // A collective waits in MPI for all ranks, or for some of them.
  std::vector<int> WaitedFor() const override { return {}; }
  void Leak() override;
  void Ended() override;

  ffi::Error StartCheck();
  ffi::Error StartCompare();

  Stage stage_ = kQueued;
  std::uint64_t ticket_ = 0;
  std::int64_t stage_since_ = 0;  // in the timeline
  std::size_t used_ = 0;
  std::uint64_t* check_ = nullptr;  // fingerprint and complement, reduced
  Header* headers_ = nullptr;       // of all ranks, after a failed check
  std::vector<Buffer> buffers_;
};

// The collective that moves no data: its check synchronizes the ranks.
class BarrierOperation : public Collective {
 public:
  using Collective::Collective;

 private:
  ffi::Error Begin() override { return ffi::Error::Success(); }
  ffi::Error Finish() override { return ffi::Error::Success(); }
};

// Gathers as many bytes of each rank, in the order of the ranks.
class RecordGather : public Collective {
 public:
  RecordGather(std::shared_ptr<Communicator> comm, const char* name,
               Payload payload, std::uint64_t variant, const void* own,
               std::size_t bytes, void* all)
      : Collective(std::move(comm), name, std::move(payload), variant),
        own_(own),
        bytes_(bytes),
        all_(all) {}

 private:
  ffi::Error Begin() override;
  ffi::Error Finish() override;

  const void* own_;
  std::size_t bytes_;
  void* all_;
  std::byte* gathered_ = nullptr;
};

// Waits until all ranks have called this with the same name, leaves and
// variant. Blocking; a step of a collective operation that runs outside of
// XLA's chain.
ffi::Error CheckedBarrier(const std::shared_ptr<Communicator>& comm,
                          const char* name, Payload payload,
                          std::uint64_t variant);

// The same, and returns the record of each rank.
template <typename Record>
ffi::ErrorOr<std::vector<Record>> CheckedGather(
    const std::shared_ptr<Communicator>& comm, const char* name,
    Payload payload, std::uint64_t variant, const Record& record) {
  static_assert(std::is_trivially_copyable_v<Record>);
  std::vector<Record> records(comm->size());
  RecordGather gather(comm, name, std::move(payload), variant, &record,
                      sizeof(Record), records.data());
  gather.Start();
  ffi::Error error = gather.Complete();
  if (error.failure()) return ffi::Unexpected(std::move(error));
  return records;
}

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_COLLECTIVE_H_
