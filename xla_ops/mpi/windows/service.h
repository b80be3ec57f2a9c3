// Service of this rank's windows to remote ranks.
#ifndef JFOG_XLA_OPS_MPI_WINDOWS_SERVICE_H_
#define JFOG_XLA_OPS_MPI_WINDOWS_SERVICE_H_

#include <mpi.h>

#include <cstddef>
#include <cstdint>
#include <memory>

#include "common/cache_line.h"
#include "mpi/communicator.h"
#include "mpi/windows/requests.h"
#include "mpi/wire_format.h"

namespace jfog::mpi {

// A payload that follows its request goes in pieces, as MPI sends a message of
// their length at once; a long one leaves it to MPI, which then asks the
// receiver first, to cut it.
constexpr std::size_t kLongestInPieces = 4 << 20;
// The length of all pieces but the last.
constexpr std::size_t PieceBytes(std::size_t payload) {
  return payload <= kLongestInPieces ? kChunk : payload;
}
constexpr std::size_t Pieces(std::size_t payload) {
  return (payload + PieceBytes(payload) - 1) / PieceBytes(payload);
}
// The length of the piece at an offset.
constexpr std::size_t PieceAt(std::size_t at, std::size_t payload) {
  return payload - at < PieceBytes(payload) ? payload - at
                                            : PieceBytes(payload);
}
static_assert(kChunk % kCacheLine == 0);

// Payloads are counted in cache lines, to which they are padded, since MPI
// counts in an int.
constexpr int kLineBytes = static_cast<int>(kCacheLine);
MPI_Datatype Line();

// Serves the requests of remote ranks on the progress thread that reads control
// messages, also while this rank computes or sleeps.
void ServeWindows(const std::shared_ptr<Communicator>& comm);

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_WINDOWS_SERVICE_H_
