// Ranks that fail, by ULFM, the extension of Open MPI for fault tolerance.
#include "mpi/fault_tolerance.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#if defined(OPEN_MPI) && __has_include(<mpi-ext.h>)
#include <mpi-ext.h>
#endif

namespace jfog::mpi {

bool IsFaultTolerant() {
  static const bool is_requested = [] {
    const char* text = std::getenv("JFOG_FAULT_TOLERANT");
    return text != nullptr && std::strcmp(text, "1") == 0;
  }();
  return is_requested && HasFaultTolerance();
}

bool IsRankFailure(int code, const std::vector<MPI_Status>& statuses) {
  if (code != MPI_ERR_IN_STATUS) return IsRankFailure(code);
  return std::any_of(
      statuses.begin(), statuses.end(),
      [](const MPI_Status& status) { return IsRankFailure(status.MPI_ERROR); });
}

#if defined(OMPI_HAVE_MPI_EXT_FTMPI)

bool HasFaultTolerance() { return true; }

bool IsRankFailure(int code) {
  int kind = MPI_SUCCESS;
  if (code == MPI_SUCCESS || MPI_Error_class(code, &kind) != MPI_SUCCESS) {
    return false;
  }
  return kind == MPIX_ERR_PROC_FAILED || kind == MPIX_ERR_REVOKED ||
         kind == MPIX_ERR_PROC_FAILED_PENDING;
}

std::vector<int> FailedRanks(MPI_Comm comm) {
  MPI_Group failed = MPI_GROUP_NULL;
  if (MPIX_Comm_get_failed(comm, &failed) != MPI_SUCCESS) return {};
  int count = 0;
  MPI_Group_size(failed, &count);
  std::vector<int> ranks(count), own(count);
  if (count > 0) {
    for (int i = 0; i < count; ++i) ranks[i] = i;
    MPI_Group all;
    MPI_Comm_group(comm, &all);
    MPI_Group_translate_ranks(failed, count, ranks.data(), all, own.data());
    MPI_Group_free(&all);
  }
  MPI_Group_free(&failed);
  return own;
}

void AcknowledgeFailures(MPI_Comm comm) { MPIX_Comm_failure_ack(comm); }

void Revoke(MPI_Comm comm) { MPIX_Comm_revoke(comm); }

bool IsRevoked(MPI_Comm comm) {
  int revoked = 0;
  return MPIX_Comm_is_revoked(comm, &revoked) == MPI_SUCCESS && revoked != 0;
}

MPI_Comm Shrink(MPI_Comm comm) {
  MPI_Comm made = MPI_COMM_NULL;
  if (MPIX_Comm_shrink(comm, &made) != MPI_SUCCESS) return MPI_COMM_NULL;
  MPI_Comm_set_errhandler(made, MPI_ERRORS_RETURN);
  return made;
}

int AgreeOn(MPI_Comm comm, int bits) {
  int all = bits;
  // It returns an error where a rank has failed; the value is agreed on anyway.
  MPIX_Comm_failure_ack(comm);
  const int code = MPIX_Comm_agree(comm, &all);
  return code == MPI_SUCCESS ? all : 0;
}

#else

bool HasFaultTolerance() { return false; }
bool IsRankFailure(int) { return false; }
std::vector<int> FailedRanks(MPI_Comm) { return {}; }
void AcknowledgeFailures(MPI_Comm) {}
void Revoke(MPI_Comm) {}
bool IsRevoked(MPI_Comm) { return false; }
MPI_Comm Shrink(MPI_Comm) { return MPI_COMM_NULL; }
int AgreeOn(MPI_Comm, int) { return 0; }

#endif

}  // namespace jfog::mpi
