// NCCL in this process: communicators from their start to their end.
#ifndef JFOG_XLA_OPS_NCCL_LIFECYCLE_H_
#define JFOG_XLA_OPS_NCCL_LIFECYCLE_H_

#include <cstdint>
#include <string>
#include <vector>

namespace jfog::nccl {

// Made by one rank; all ranks of a communicator are created with it.
std::string MakeUniqueId();

// Collective over the ranks of the ids: with one id the communicator is in
// non-blocking mode, with two in blocking mode (see Communicator). Operations
// name the communicator by `context`, and use the CUDA device of that ordinal.
// Throws std::runtime_error, also if the others do not come within `timeout`
// seconds.
void Create(std::int64_t context, const std::string& unique_ids, int rank,
            int size, int device, double timeout);

// Ends the use of a communicator on this rank; returns how many of its
// operations were started and not waited on.
int Close(std::int64_t context);

// Fails all operations, current and future: the process is going down.
void Abandon(const std::string& reason);

// Waits for operations in flight, and ends all communicators.
void Finish();

// The errors with which the open communicators that failed refuse operations.
std::vector<std::string> Failures();

// bytes_sent, bytes_received, messages_sent (one of each for every peer), and
// the number of operations and of consistency checks, which is 0 on NCCL.
std::vector<std::vector<std::int64_t>> ReadCounters(std::int64_t context);
void ResetCounters(std::int64_t context);

}  // namespace jfog::nccl

#endif  // JFOG_XLA_OPS_NCCL_LIFECYCLE_H_
