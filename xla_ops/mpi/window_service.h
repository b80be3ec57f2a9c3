// What ranks that share no memory with this one ask of its windows.
#ifndef JFOG_XLA_OPS_MPI_WINDOW_SERVICE_H_
#define JFOG_XLA_OPS_MPI_WINDOW_SERVICE_H_

#include <mpi.h>

#include <cstdint>
#include <memory>

#include "mpi/communicator.h"

namespace jfog::mpi {

// Goes before the payload of a put or an accumulate; alone it asks for the
// value that is exposed, or for a mutex.
struct WindowRequest {
  enum Kind : std::int32_t { kPut, kAccumulate, kGet, kLock, kUnlock };
  std::uint64_t window = 0;
  std::uint64_t bytes = 0;  // of the payload
  double weight = 1;
  Kind kind = kPut;
  std::int32_t record = 0;
  std::int32_t tag = 0;  // of the reply
  std::int32_t padding = 0;
};

// Says that it is done; after a get the payload follows.
struct WindowReply {
  std::int32_t state = 0;  // a WindowMemory::State; open: it is done
};

// On the communicator for what is outside the ordered chain.
constexpr int kRequestTag = 5;
constexpr int kRequestPayloadTag = 6;
// Of the n-th request of a rank: its reply, and a payload of that.
int ReplyTag(std::uint64_t request);
int ReplyPayloadTag(int reply_tag);

// Lines of 64 bytes, so that long payloads can be counted.
constexpr int kLineBytes = 64;
MPI_Datatype Line();

// From now on a thread does what others ask, also while this rank computes or
// sleeps.
void ServeWindows(const std::shared_ptr<Communicator>& comm);

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_WINDOW_SERVICE_H_
