// Sends and receives of one operation, grouped into one.
#ifndef JFOG_XLA_OPS_NCCL_EXCHANGE_H_
#define JFOG_XLA_OPS_NCCL_EXCHANGE_H_

#include <cstddef>
#include <vector>

#include "nccl/communicator.h"
#include "nccl/operation.h"
#include "xla/ffi/api/ffi.h"

namespace jfog::nccl {

// What goes to one rank or comes from it: an edge and its pieces.
struct Parcel {
  struct Piece {
    DevicePointer address;
    std::size_t bytes;
  };

  int rank;
  std::vector<Piece> pieces;

  std::size_t bytes() const;
};

// Edges for an intent.
std::vector<Edge> EdgesOf(const std::vector<Parcel>& parcels);

// Posts what is not empty.
void PostParcels(const std::vector<Parcel>& outgoing,
                 const std::vector<Parcel>& incoming, Group& group);

XLA_FFI_DECLARE_HANDLER_SYMBOL(NcclExchange);

}  // namespace jfog::nccl

#endif  // JFOG_XLA_OPS_NCCL_EXCHANGE_H_
