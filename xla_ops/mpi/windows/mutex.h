// Mutexes of windows, for jfog.win_mutex.
#ifndef JFOG_XLA_OPS_MPI_WINDOWS_MUTEX_H_
#define JFOG_XLA_OPS_MPI_WINDOWS_MUTEX_H_

#include <cstdint>
#include <vector>

namespace jfog::mpi {

// Locks and unlocks the mutexes of these ranks, ascending, of the window with
// this handle. Called from Python, outside of XLA: errors are thrown.
void LockWindow(std::uint32_t handle, const std::vector<int>& ranks);
void UnlockWindow(std::uint32_t handle, const std::vector<int>& ranks);

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_WINDOWS_MUTEX_H_
