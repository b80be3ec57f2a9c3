// Ranks that fail, by ULFM, the extension of Open MPI for fault tolerance.
#ifndef JFOG_XLA_OPS_MPI_FAULT_TOLERANCE_H_
#define JFOG_XLA_OPS_MPI_FAULT_TOLERANCE_H_

#include <mpi.h>

#include <vector>

namespace jfog::mpi {

// Whether jfog was built with an MPI that has the extension.
bool HasFaultTolerance();
// Whether this job outlives its ranks: `jfog run --fault-tolerant` sets
// JFOG_FAULT_TOLERANT=1. In other jobs the functions below are not used.
bool IsFaultTolerant();

// Whether an MPI return code is that of a failed rank or a revoked
// communicator.
bool IsRankFailure(int code);
// The same of a call for several requests, with their statuses.
bool IsRankFailure(int code, const std::vector<MPI_Status>& statuses);
// The ranks of a communicator that this process knows to have failed. Local.
std::vector<int> FailedRanks(MPI_Comm comm);
// Lets receives and probes from any source succeed again after a failure.
void AcknowledgeFailures(MPI_Comm comm);

// Ends all communication on a communicator, on all of its ranks.
void Revoke(MPI_Comm comm);
bool IsRevoked(MPI_Comm comm);

// A recovery makes communicators out of one, and names those that are made. The
// failure of a rank does not end collectives on others meanwhile.
void BeginMaking(MPI_Comm comm);
void AddMade(MPI_Comm comm);
void RemoveMade(MPI_Comm comm);
void EndMaking();

// Collective over the ranks that are left: a communicator of them, in their
// order; MPI_COMM_NULL if that fails.
MPI_Comm Shrink(MPI_Comm comm);
// Collective over the ranks that are left: the bits that all of them bring,
// with one answer for all; 0 if a rank has failed that was there before.
int AgreeOn(MPI_Comm comm, int bits);

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_FAULT_TOLERANCE_H_
