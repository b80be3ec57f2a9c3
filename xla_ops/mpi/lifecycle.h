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
// returns the context number of the communicator in operations. The last
// `spares` ranks of a job are not in its world: they get -1.
std::int64_t OpenWorld(int local_size, double timeout, int spares);
std::int64_t OpenFortran(int handle, int local_size, double timeout);
// Collective: the ranks of equal `color`, ordered by `key`, with the timeout of
// the communicator that they come from.
std::int64_t Split(std::int64_t context, int color, int key);

int Rank(std::int64_t context);
int Size(std::int64_t context);
// For every rank, the lowest rank on its machine (sharing its memory).
std::vector<int> Machines(std::int64_t context);
// In a job with spares, its lowest rank on this machine.
int LeaderInJob();

// Collective: the equally long texts of all ranks, by rank. Throws
// std::runtime_error if one does not come in time; with `patient` only if one
// has failed or left.
std::vector<std::string> Gather(std::int64_t context, const std::string& text,
                                bool patient);

// The ranks that have failed, as far as this rank knows; never waits.
std::vector<int> Missing(std::int64_t context);
// Whether averages with neighbors go on without those that have failed.
void SetReweights(std::int64_t context, bool reweights);

// Finds and ends stuck ranks from now on, see HangDetector.
void FindHangs(std::int64_t context, double shortest,
               const std::vector<int>& processes);

// The way to a world of the ranks that are left. A rank interrupts its
// communicators, which fails them on the others as well, and calls the spares.
// Then, until they agree: all shrink the job, gather who they are, open the
// world, split its parts off, and agree on whether that succeeded. Meanwhile
// another thread calls `LookAtStart` now and then, which ends the calls of this
// rank and of the others if a further rank fails.
void Interrupt(std::int64_t context);
void CallSpares();
void ShrinkJob();
// The equally long texts of all ranks, in the order of the shrunk job.
std::vector<std::string> GatherInStart(const std::string& text);
// The context of the new world, whose ranks are ordered by `place`; -1 for a
// place below 0, that of a rank which remains a spare.
std::int64_t OpenInStart(int place, int machine, double timeout);
void LookAtStart();
bool AgreeOnSurvivors(bool is_made);

// Of a spare: whether it has been called, and the ranks of the job that have
// failed. Never waits.
struct SpareState {
  bool is_called = false;
  std::vector<int> failed;
};
SpareState LookAsSpare();

// Gives a communicator another context.
void Renumber(std::int64_t context, std::int64_t number);

// Ends the use of a communicator on this rank; returns how many of its
// operations were started and not waited on.
int Close(std::int64_t context);

// The errors with which the open communicators that failed refuse operations.
std::vector<std::string> Failures();

// Fails all operations, current and future: the process is going down.
void Abandon(const std::string& reason);

// Announces the end of this rank to all peers, and waits for theirs. Returns
// false after a failure, when others may not come.
bool Leave();

// Leaves, and finalizes MPI if `Start` initialized it. After a failure MPI is
// left as it is, because MPI_Finalize could wait forever.
void Finish();

// bytes_sent, bytes_received, messages_sent (one of each for every peer); the
// number of operations; averages without a peer.
std::vector<std::vector<std::int64_t>> ReadCounters(std::int64_t context);
void ResetCounters(std::int64_t context);
// Nanoseconds waited for each rank, then those waited in all.
std::vector<std::int64_t> ReadWaits(std::int64_t context);
// The other ranks that share memory with this one.
std::vector<int> SharedMemoryRanks(std::int64_t context);
// Of a long value, between machines.
int ChunksInFlight(std::int64_t context);

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_LIFECYCLE_H_
