// Duplicates of MPI communicators, kept from one world to the next.
#include "mpi/duplicates.h"

#include <sched.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <map>
#include <utility>

#include "common/process_wide.h"
#include "mpi/collective_start.h"

namespace jfog::mpi {
namespace {

using Clock = std::chrono::steady_clock;

// The duplicates that have been made of one group of ranks, in this order on
// all of them; null while they are in use or have been given up.
using Made = std::vector<std::unique_ptr<Duplicates>>;

// Ranks agree by one word, on one of the last that have been made.
constexpr std::size_t kLast = 64;
// All ranks are in the same collective call, so that a control message which is
// still on its way comes at once.
constexpr std::chrono::seconds kPatience{2};

std::size_t FirstOf(const Made& made) {
  return made.size() < kLast ? 0 : made.size() - kLast;
}

struct Kept {
  std::mutex mutex;
  // By the ranks in MPI_COMM_WORLD, in their order.
  std::map<std::vector<int>, Made> made;
  std::map<const Duplicates*, std::pair<std::vector<int>, std::size_t>> in_use;
};

// The ranks of a communicator in MPI_COMM_WORLD; empty if some are not in it.
std::vector<int> WorldRanks(MPI_Comm comm) {
  std::vector<int> ranks = RanksOf(comm, MPI_COMM_WORLD);
  if (std::count(ranks.begin(), ranks.end(), MPI_UNDEFINED) > 0) ranks.clear();
  return ranks;
}

}  // namespace

Duplicates::Duplicates(MPI_Comm parent)
    : comm_(DuplicateOf(parent)),
      control_comm_(DuplicateOf(parent)),
      collective_comm_(DuplicateOf(parent)),
      agreement_comm_(DuplicateOf(parent)),
      sent_(SizeOfComm(parent)),
      received_(sent_.size()),
      control_sent_(sent_.size()),
      control_received_(sent_.size()) {}

std::unique_ptr<Duplicates> Duplicates::Acquire(MPI_Comm parent) {
  Kept& kept = ProcessWide<Kept>();
  const std::vector<int> ranks = WorldRanks(parent);
  std::uint64_t free = 0;
  std::size_t index = 0;
  // In a recovery all ranks take the same steps, see `AgreeInStart`, whatever
  // some of them have kept.
  if (!ranks.empty() && StartComm() == MPI_COMM_NULL) {
    std::lock_guard<std::mutex> lock(kept.mutex);
    const Made& made = kept.made[ranks];
    index = FirstOf(made);
    for (std::size_t i = index; i < made.size(); ++i) {
      if (made[i] != nullptr) free |= std::uint64_t{1} << (i - index);
    }
  }
  Require(MPI_Allreduce(MPI_IN_PLACE, &free, 1, MPI_UINT64_T, MPI_BAND, parent),
          "MPI_Allreduce");
  if (free != 0) {
    for (; (free & 1) == 0; free >>= 1) ++index;
    std::unique_ptr<Duplicates> found;
    {
      std::lock_guard<std::mutex> lock(kept.mutex);
      found = std::move(kept.made[ranks][index]);
    }
    // Without the lock: this waits for the other ranks.
    if (found->IsQuiet(parent)) {
      found->Reset();
      std::lock_guard<std::mutex> lock(kept.mutex);
      kept.in_use[found.get()] = {ranks, index};
      return found;
    }
    found.release();  // NOLINT: may get a message at any time
  }
  std::unique_ptr<Duplicates> fresh(new Duplicates(parent));
  if (ranks.empty()) return fresh;
  std::lock_guard<std::mutex> lock(kept.mutex);
  Made& made = kept.made[ranks];
  kept.in_use[fresh.get()] = {ranks, made.size()};
  made.emplace_back();
  return fresh;
}

void Duplicates::Release(std::unique_ptr<Duplicates> duplicates,
                         bool has_failed) {
  Kept& kept = ProcessWide<Kept>();
  std::lock_guard<std::mutex> lock(kept.mutex);
  const auto place = kept.in_use.find(duplicates.get());
  if (has_failed || place == kept.in_use.end()) {
    duplicates.release();  // NOLINT: MPI's for good
    return;
  }
  const auto& [ranks, index] = place->second;
  kept.made[ranks][index] = std::move(duplicates);
  kept.in_use.erase(place);
}

void Duplicates::SendControl(int rank, int tag, const void* bytes,
                             std::size_t count) {
  std::lock_guard<std::mutex> lock(mutex_);
  in_transit_.remove_if([](Sent& sent) {
    int done = 0;
    return MPI_Test(&sent.request, &done, MPI_STATUS_IGNORE) == MPI_SUCCESS &&
           done != 0;
  });
  Sent& sent = in_transit_.emplace_back();
  sent.bytes = Buffer(count);
  std::memcpy(sent.bytes.get(), bytes, count);
  if (MPI_Isend(sent.bytes.get(), static_cast<int>(count), MPI_BYTE, rank, tag,
                control_comm_, &sent.request) == MPI_SUCCESS) {
    Add(&control_sent_[rank]);
  }
}

bool Duplicates::IsQuiet(MPI_Comm parent) {
  const std::size_t size = sent_.size();
  // To each rank: the messages, and the control messages, sent to it.
  std::vector<std::uint64_t> sent(2 * size), theirs(2 * size);
  for (std::size_t rank = 0; rank < size; ++rank) {
    sent[2 * rank] = sent_[rank];
    sent[2 * rank + 1] = control_sent_[rank];
  }
  Require(MPI_Alltoall(sent.data(), 2, MPI_UINT64_T, theirs.data(), 2,
                       MPI_UINT64_T, parent),
          "MPI_Alltoall");
  int quiet = 1;
  for (std::size_t rank = 0; rank < size; ++rank) {
    quiet &= theirs[2 * rank] == received_[rank] ? 1 : 0;
  }
  // Control messages are read now and then, so some may be left.
  const auto is_drained = [&] {
    for (std::size_t rank = 0; rank < size; ++rank) {
      if (control_received_[rank] != theirs[2 * rank + 1]) return false;
    }
    return true;
  };
  const Clock::time_point begin = Clock::now();
  while (quiet != 0 && !is_drained()) {
    int found = 0, bytes = 0;
    MPI_Status status;
    MPI_Iprobe(MPI_ANY_SOURCE, MPI_ANY_TAG, control_comm_, &found, &status);
    if (found != 0) {
      MPI_Get_count(&status, MPI_BYTE, &bytes);
      Buffer message(static_cast<std::size_t>(bytes));
      MPI_Recv(message.get(), bytes, MPI_BYTE, status.MPI_SOURCE,
               status.MPI_TAG, control_comm_, MPI_STATUS_IGNORE);
      Add(&control_received_[status.MPI_SOURCE]);
      continue;
    }
    if (Clock::now() - begin > kPatience) quiet = 0;
    sched_yield();
  }
  Require(MPI_Allreduce(MPI_IN_PLACE, &quiet, 1, MPI_INT, MPI_MIN, parent),
          "MPI_Allreduce");
  return quiet != 0;
}

// All control messages have arrived, so their sends have completed.
void Duplicates::Reset() {
  std::lock_guard<std::mutex> lock(mutex_);
  for (Sent& sent : in_transit_) MPI_Wait(&sent.request, MPI_STATUS_IGNORE);
  in_transit_.clear();
  for (Counts* counts :
       {&sent_, &received_, &control_sent_, &control_received_}) {
    for (auto& count : *counts) count.store(0, std::memory_order_relaxed);
  }
}

}  // namespace jfog::mpi
