// Calls of MPI for all ranks, in which communicators are made.
#ifndef JFOG_XLA_OPS_MPI_COLLECTIVE_START_H_
#define JFOG_XLA_OPS_MPI_COLLECTIVE_START_H_

#include <mpi.h>

#include <vector>

namespace jfog::mpi {

// Throws std::runtime_error for a code that is not MPI_SUCCESS.
void Require(int code, const char* call);

int SizeOfComm(MPI_Comm comm);
// Of each rank of `part` its rank in `comm`; MPI_UNDEFINED where it is none.
std::vector<int> RanksOf(MPI_Comm part, MPI_Comm comm);

// A communicator of MPI for the time in which something is made with it.
//
// While a world is made after a failure, a further rank may fail. The others
// may then wait in any of these communicators, so all of them are revoked.
class TemporaryComm {
 public:
  // Collective over `comm`; throw std::runtime_error if MPI fails.
  static TemporaryComm OfMachine(MPI_Comm comm, int key);
  static TemporaryComm Split(MPI_Comm comm, int color, int key);
  // Collective over its ranks.
  ~TemporaryComm();
  TemporaryComm(const TemporaryComm&) = delete;
  TemporaryComm& operator=(const TemporaryComm&) = delete;

  MPI_Comm comm() const { return comm_; }

 private:
  explicit TemporaryComm(MPI_Comm comm);

  MPI_Comm comm_;
};

// Duplicates, or splits, for good. Collective over `comm`.
MPI_Comm DuplicateOf(MPI_Comm comm);
// Null for MPI_UNDEFINED as the color.
MPI_Comm PartOf(MPI_Comm comm, int color, int key);

// Begins and ends a time in which communicators that are made can be revoked
// together.
void BeginStart(MPI_Comm comm);
void EndStart();
// Revokes them, and those that are made from now on until the end.
void RevokeStart();
// The communicator with which it began; null outside of such a time.
MPI_Comm StartComm();

// The steps of such a time, in which all of its ranks take part: the making of
// a communicator, and the end. Open MPI loses a revocation, or crashes, on a
// rank that is still making the communicator, so that none is revoked before
// all have it.
enum class StartStep { kFailed, kMade, kEnded };
// Collective over the ranks of the start: whether all succeed in a step. The
// first failure is the last step.
StartStep AgreeInStart(bool succeeds, bool ends);

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_COLLECTIVE_START_H_
