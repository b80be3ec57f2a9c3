// Ranks that fail, by ULFM, the extension of Open MPI for fault tolerance.
#include "mpi/fault_tolerance.h"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <atomic>
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

namespace {

// The communicators that are made, while a recovery makes others. Without a
// lock: Open MPI asks for them within any of its calls.
std::atomic<bool> makes_communicators{false};
std::array<std::atomic<MPI_Comm>, 64> made{};

bool IsMade(MPI_Comm comm) {
  return std::any_of(made.begin(), made.end(),
                     [comm](const auto& each) { return each.load() == comm; });
}

}  // namespace

void BeginMaking(MPI_Comm comm) {
  for (auto& each : made) each.store(MPI_COMM_NULL);
  AddMade(comm);
  makes_communicators.store(true);
}

void AddMade(MPI_Comm comm) {
  for (auto& each : made) {
    MPI_Comm none = MPI_COMM_NULL;
    if (each.compare_exchange_strong(none, comm)) return;
  }
}

void RemoveMade(MPI_Comm comm) {
  for (auto& each : made) {
    MPI_Comm expected = comm;
    each.compare_exchange_strong(expected, MPI_COMM_NULL);
  }
}

void EndMaking() { makes_communicators.store(false); }

// Two functions of Open MPI 5.0 end the process where a rank fails while others
// make a communicator. The definitions here come first for libmpi where libmpi
// is loaded because this module needs it; they call Open MPI's own ones
// otherwise.
extern "C" {

// Called for each communicator of a rank that has failed, with `collectives` to
// end these alone. Of a communicator that is being made the table of
// collectives is not there yet, and is read.
__attribute__((visibility("default"))) bool ompi_comm_revoke_local(
    MPI_Comm comm, bool collectives) {
  static const auto revoke = reinterpret_cast<bool (*)(MPI_Comm, bool)>(
      dlsym(RTLD_NEXT, "ompi_comm_revoke_local"));
  if (revoke == nullptr) return false;
  if (collectives && makes_communicators.load() && !IsMade(comm)) return false;
  return revoke(comm, collectives);
}

// Called without a communicator for a message that a collective has dropped,
// because it has failed, and that fails, too.
__attribute__((visibility("default"))) void
ompi_mpi_errors_are_fatal_comm_handler(MPI_Comm* comm, int* code,
                                       const char* what, ...) {
  static const auto end =
      reinterpret_cast<void (*)(MPI_Comm*, int*, const char*, ...)>(
          dlsym(RTLD_NEXT, "ompi_mpi_errors_are_fatal_comm_handler"));
  const bool is_dropped = comm == nullptr && IsFaultTolerant();
  if (end != nullptr && !is_dropped) end(comm, code, what);
}

}  // extern "C"

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

void BeginMaking(MPI_Comm) {}
void AddMade(MPI_Comm) {}
void RemoveMade(MPI_Comm) {}
void EndMaking() {}
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
