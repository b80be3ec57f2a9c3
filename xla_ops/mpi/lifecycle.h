// MPI in this process: its start, its end, and the communicators made of it.
#ifndef JFOG_XLA_OPS_MPI_LIFECYCLE_H_
#define JFOG_XLA_OPS_MPI_LIFECYCLE_H_

#include <cstdint>
#include <string>
#include <vector>

namespace jfog::mpi {

// The version text of the MPI library that is loaded.
std::string LibraryVersion();

// Starts MPI with full thread support unless it runs already. Throws
// std::runtime_error if it has been finalized or has no such support.
void Start();

// Collective over the given communicator (a Fortran handle, or COMM_WORLD);
// returns the number that operations name the communicator by.
std::int64_t OpenWorld(int local_size, double timeout);
std::int64_t OpenFortran(int handle, int local_size, double timeout);
// Collective: the ranks of equal `color`, ordered by `key`.
std::int64_t Split(std::int64_t context, int color, int key, double timeout);

int Rank(std::int64_t context);
int Size(std::int64_t context);
// For every rank, the lowest rank on its machine (sharing its memory).
std::vector<int> Machines(std::int64_t context);

// Collective: the equally long texts of all ranks, by rank. Throws
// std::runtime_error if one does not come in time.
std::vector<std::string> Gather(std::int64_t context, const std::string& text);

// Ends the use of a communicator on this rank; returns how many of its
// operations were started and not waited on.
int Close(std::int64_t context);

// Fails all operations, running and to come: this process is going down.
void Abandon(const std::string& reason);

// Tells all peers that this rank has ended, waits for them to end, and ends
// MPI if `Start` started it. Leaves MPI as it is after a failure, for it could
// wait for ever.
void Finish();

// bytes_sent, bytes_received, messages_sent (one of each for every peer), and
// the number of operations as the last element.
std::vector<std::vector<std::int64_t>> ReadCounters(std::int64_t context);
void ResetCounters(std::int64_t context);

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_LIFECYCLE_H_
