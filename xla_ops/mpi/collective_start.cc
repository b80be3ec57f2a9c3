// Calls of MPI for all ranks, in which communicators are made.
#include "mpi/collective_start.h"

#include <algorithm>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/process_wide.h"
#include "mpi/fault_tolerance.h"

namespace jfog::mpi {
namespace {

struct Started {
  std::mutex mutex;  // guards all below
  MPI_Comm first = MPI_COMM_NULL;
  std::vector<MPI_Comm> comms;
  bool is_revoked = false;
  bool has_failed = false;
};

Started& TheStart() { return ProcessWide<Started>(); }

// Throws unless all ranks of a start have made a communicator.
void RequireMade(int code, const char* call) {
  const MPI_Comm first = StartComm();
  if (first == MPI_COMM_NULL) return Require(code, call);
  // Open MPI reports success, too, of a communicator whose making a failure has
  // ended, and which has no collectives.
  const bool is_made =
      code == MPI_SUCCESS && FailedRanks(first).empty() && !IsRevoked(first);
  if (AgreeInStart(is_made, false) == StartStep::kFailed) {
    Require(code, call);
    throw std::runtime_error("jfog: " + std::string(call) +
                             " failed on another rank");
  }
}

void Enter(MPI_Comm comm) {
  MPI_Comm_set_errhandler(comm, MPI_ERRORS_RETURN);
  Started& start = TheStart();
  std::lock_guard<std::mutex> lock(start.mutex);
  if (start.first == MPI_COMM_NULL) return;
  AddMade(comm);
  start.comms.push_back(comm);
  if (start.is_revoked) Revoke(comm);
}

}  // namespace

void Require(int code, const char* call) {
  if (code == MPI_SUCCESS) return;
  char text[MPI_MAX_ERROR_STRING];
  int length = 0;
  MPI_Error_string(code, text, &length);
  throw std::runtime_error("jfog: " + std::string(call) +
                           " failed: " + std::string(text, length));
}

int SizeOfComm(MPI_Comm comm) {
  int size = 0;
  MPI_Comm_size(comm, &size);
  return size;
}

std::vector<int> RanksOf(MPI_Comm part, MPI_Comm comm) {
  MPI_Group own, all;
  MPI_Comm_group(part, &own);
  MPI_Comm_group(comm, &all);
  const int size = SizeOfComm(part);
  std::vector<int> ranks(size), found(size);
  for (int rank = 0; rank < size; ++rank) ranks[rank] = rank;
  MPI_Group_translate_ranks(own, size, ranks.data(), all, found.data());
  MPI_Group_free(&own);
  MPI_Group_free(&all);
  return found;
}

TemporaryComm::TemporaryComm(MPI_Comm comm) : comm_(comm) { Enter(comm); }

TemporaryComm::~TemporaryComm() {
  Started& start = TheStart();
  std::lock_guard<std::mutex> lock(start.mutex);
  auto& comms = start.comms;
  RemoveMade(comm_);
  comms.erase(std::remove(comms.begin(), comms.end(), comm_), comms.end());
  // A revoked one is left as it is: other ranks may not come to free it.
  if (!start.is_revoked) MPI_Comm_free(&comm_);
}

TemporaryComm TemporaryComm::OfMachine(MPI_Comm comm, int key) {
  MPI_Comm made = MPI_COMM_NULL;
  RequireMade(MPI_Comm_split_type(comm, MPI_COMM_TYPE_SHARED, key,
                                  MPI_INFO_NULL, &made),
              "MPI_Comm_split_type");
  return TemporaryComm(made);
}

TemporaryComm TemporaryComm::Split(MPI_Comm comm, int color, int key) {
  MPI_Comm made = MPI_COMM_NULL;
  RequireMade(MPI_Comm_split(comm, color, key, &made), "MPI_Comm_split");
  return TemporaryComm(made);
}

MPI_Comm DuplicateOf(MPI_Comm comm) {
  MPI_Comm made = MPI_COMM_NULL;
  RequireMade(MPI_Comm_dup(comm, &made), "MPI_Comm_dup");
  Enter(made);
  return made;
}

MPI_Comm PartOf(MPI_Comm comm, int color, int key) {
  MPI_Comm made = MPI_COMM_NULL;
  RequireMade(MPI_Comm_split(comm, color, key, &made), "MPI_Comm_split");
  if (made != MPI_COMM_NULL) Enter(made);
  return made;
}

void BeginStart(MPI_Comm comm) {
  Started& start = TheStart();
  std::lock_guard<std::mutex> lock(start.mutex);
  AddMade(comm);
  start.first = comm;
  start.comms = {comm};
  start.is_revoked = false;
  start.has_failed = false;
}

void EndStart() {
  Started& start = TheStart();
  std::lock_guard<std::mutex> lock(start.mutex);
  start.first = MPI_COMM_NULL;
  start.comms.clear();
  start.is_revoked = false;
}

void RevokeStart() {
  Started& start = TheStart();
  std::lock_guard<std::mutex> lock(start.mutex);
  if (start.first == MPI_COMM_NULL || start.is_revoked) return;
  start.is_revoked = true;
  for (MPI_Comm comm : start.comms) Revoke(comm);
}

MPI_Comm StartComm() {
  Started& start = TheStart();
  std::lock_guard<std::mutex> lock(start.mutex);
  return start.first;
}

StartStep AgreeInStart(bool succeeds, bool ends) {
  constexpr int kSucceeds = 1, kEnds = 2;
  Started& start = TheStart();
  {
    std::lock_guard<std::mutex> lock(start.mutex);
    if (start.has_failed) return StartStep::kFailed;
  }
  // The others may wait in a communicator that this rank has given up.
  if (!succeeds) RevokeStart();
  const int agreed =
      AgreeOn(StartComm(), succeeds ? kSucceeds | (ends ? kEnds : 0) : 0);
  if ((agreed & kSucceeds) == 0) {
    std::lock_guard<std::mutex> lock(start.mutex);
    start.has_failed = true;
    return StartStep::kFailed;
  }
  return (agreed & kEnds) != 0 ? StartStep::kEnded : StartStep::kMade;
}

}  // namespace jfog::mpi
