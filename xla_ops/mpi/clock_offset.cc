// The difference between the clocks of two ranks, measured by messages.
#include "mpi/clock_offset.h"

#include <mpi.h>
#include <sched.h>
#include <time.h>

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>

#include "common/deadline.h"
#include "mpi/communicator.h"

namespace jfog::mpi {
namespace {

constexpr int kClockTag = 7;
constexpr int kPings = 64;
// While a rank waits for its turn it naps, and leaves the cores to the two that
// measure.
constexpr timespec kTurnNap{0, 50'000};

std::int64_t Now() {
  return std::chrono::nanoseconds(Clock::now().time_since_epoch()).count();
}

// Messages of one number with one rank.
class PingPong {
 public:
  PingPong(std::shared_ptr<Communicator> comm, int peer)
      : comm_(std::move(comm)),
        peer_(peer),
        had_left_(comm_->HasLeft(peer)),
        words_(std::make_unique<std::int64_t[]>(2)) {}

  void Send(std::int64_t word) {
    words_[0] = word;
    MPI_Request request = MPI_REQUEST_NULL;
    comm_->duplicates().CountSent(peer_);
    Wait(MPI_Isend(&words_[0], 1, MPI_INT64_T, peer_, kClockTag,
                   comm_->control_comm(), &request),
         &request, /*naps=*/false);
  }

  std::int64_t Receive(bool naps = false) {
    MPI_Request request = MPI_REQUEST_NULL;
    Wait(MPI_Irecv(&words_[1], 1, MPI_INT64_T, peer_, kClockTag,
                   comm_->control_comm(), &request),
         &request, naps);
    comm_->duplicates().CountReceived(peer_);
    return words_[1];
  }

 private:
  void Wait(int code, MPI_Request* request, bool naps) {
    WaitTime wait;
    for (int turn = 0, done = 0; code == MPI_SUCCESS; ++turn) {
      code = MPI_Test(request, &done, MPI_STATUS_IGNORE);
      if (done) return;
      if (naps) {
        nanosleep(&kTurnNap, nullptr);
      } else {
        sched_yield();
      }
      if (turn % 100 != 0) continue;
      comm_->ReadControlMessages();
      const bool is_late = Seconds(wait.Look()) > comm_->timeout();
      const bool has_gone = !had_left_ && comm_->HasLeft(peer_);
      if (is_late || comm_->failed() || has_gone) break;
    }
    words_.release();  // NOLINT: MPI's for good
    throw std::runtime_error(
        "jfog: the clock of rank " + std::to_string(comm_->rank()) +
        " cannot be compared with that of rank " + std::to_string(peer_));
  }

  const std::shared_ptr<Communicator> comm_;
  const int peer_;
  const bool had_left_;  // at the end of all ranks, who still measure
  std::unique_ptr<std::int64_t[]> words_;
};

}  // namespace

std::tuple<std::int64_t, std::int64_t, std::int64_t> MeasureClock(
    std::int64_t context) {
  const std::shared_ptr<Communicator> comm = Communicators().Find(context);
  if (comm == nullptr) {
    throw std::runtime_error("jfog: no communicator " +
                             std::to_string(context));
  }
  if (comm->rank() == 0) {
    for (int rank = 1; rank < comm->size(); ++rank) {
      PingPong pings(comm, rank);
      pings.Send(0);  // its turn
      for (int i = 0; i < kPings; ++i) {
        pings.Receive(/*naps=*/i == 0);
        pings.Send(Now());
      }
    }
    return {0, 0, Now()};
  }
  PingPong pings(comm, 0);
  pings.Receive(/*naps=*/true);
  const std::int64_t begin = Now();
  std::int64_t least = INT64_MIN, largest = INT64_MAX;
  for (int i = 0; i < kPings; ++i) {
    const std::int64_t sent = Now();
    pings.Send(i);
    const std::int64_t there = pings.Receive();
    const std::int64_t received = Now();
    least = std::max(least, there - received);
    largest = std::min(largest, there - sent);
  }
  return {least, largest, begin + (Now() - begin) / 2};
}

}  // namespace jfog::mpi
