// NCCL in this process: communicators from their start to their end.
#include "nccl/lifecycle.h"

#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <stdexcept>

#include "common/fork.h"
#include "nccl/communicator.h"
#include "nccl/handles.h"
#include "nccl/watchdog.h"

namespace jfog::nccl {
namespace {

// Grace period for aborts when the process goes down.
constexpr std::chrono::seconds kAbortWithin{5};
std::atomic<bool> abandoned{false};

void ThrowUnlessOpen() {
  if (NcclVersion() == 0 || Cuda().device_get == nullptr) {
    throw std::runtime_error("jfog: NCCL and the CUDA driver are not open");
  }
}

std::shared_ptr<Communicator> Get(std::int64_t context) {
  std::shared_ptr<Communicator> comm = Communicators().Find(context);
  if (comm == nullptr) {
    throw std::runtime_error("jfog: no communicator of NCCL " +
                             std::to_string(context));
  }
  return comm;
}

}  // namespace

std::string MakeUniqueId() {
  ThrowUnlessOpen();
  UniqueId id;
  const Result code = Nccl().get_unique_id(&id);
  if (code != kSuccess) {
    throw std::runtime_error("jfog: ncclGetUniqueId failed: " +
                             std::string(Nccl().get_error_string(code)));
  }
  return std::string(id.bytes, sizeof(id.bytes));
}

void Create(std::int64_t context, const std::string& unique_ids, int rank,
            int size, int device, double timeout) {
  WatchForks();
  ThrowUnlessOpen();
  std::vector<UniqueId> ids(unique_ids.size() / sizeof(UniqueId));
  if (ids.empty() || ids.size() > 2 ||
      ids.size() * sizeof(UniqueId) != unique_ids.size()) {
    throw std::runtime_error(
        "jfog: one or two unique ids have " + std::to_string(sizeof(UniqueId)) +
        " bytes each, not " + std::to_string(unique_ids.size()) + " in all");
  }
  if (rank < 0 || rank >= size) {
    throw std::runtime_error("jfog: no rank " + std::to_string(rank) + " of " +
                             std::to_string(size));
  }
  if (Communicators().Find(context) != nullptr) {
    throw std::runtime_error("jfog: there is a communicator of NCCL " +
                             std::to_string(context) + " already");
  }
  std::memcpy(ids.data(), unique_ids.data(), unique_ids.size());
  Communicators().Insert(context,
                         Communicator::Make(ids, rank, size, device, timeout));
}

int Close(std::int64_t context) {
  const std::shared_ptr<Communicator> comm = Communicators().Find(context);
  if (comm == nullptr) return 0;
  Communicators().Remove(context);
  const int forgotten = ForgetHandles(*comm);
  comm->Close();
  return forgotten;
}

std::vector<std::string> Failures() {
  return FailuresOf(Communicators().All());
}

void Abandon(const std::string& reason) {
  abandoned = true;
  const std::vector<std::shared_ptr<Communicator>> comms =
      Communicators().All();
  for (const auto& comm : comms) comm->Fail(ffi::ErrorCode::kAborted, reason);
  const Clock::time_point until = Clock::now() + kAbortWithin;
  for (const auto& comm : comms) comm->AwaitAbort(until);
}

void Finish() {
  if (abandoned) return;
  // Drains all before it closes one: an operation may depend on an operation of
  // another communicator.
  for (const auto& comm : Communicators().All()) comm->Drain();
  for (const auto& comm : Communicators().All()) comm->Close();
  Watchdog::Get().Stop();
}

std::vector<std::vector<std::int64_t>> ReadCounters(std::int64_t context) {
  return Get(context)->traffic().Read();
}

void ResetCounters(std::int64_t context) { Get(context)->traffic().Reset(); }

}  // namespace jfog::nccl
