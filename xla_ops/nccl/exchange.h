// Sends and receives of one operation, grouped into one.
#ifndef JFOG_XLA_OPS_NCCL_EXCHANGE_H_
#define JFOG_XLA_OPS_NCCL_EXCHANGE_H_

#include <cstddef>
#include <vector>

#include "nccl/communicator.h"
#include "nccl/operation.h"
#include "xla/ffi/api/ffi.h"

namespace jfog::nccl {

// The message to or from one rank: an edge and its pieces.
struct PeerMessage {
  struct Piece {
    DevicePointer address;
    std::size_t bytes;
  };

  int rank;
  std::vector<Piece> pieces;

  std::size_t bytes() const;
};

// Edges for an spec.
std::vector<Edge> EdgesOf(const std::vector<PeerMessage>& messages);

// Posts what is not empty.
void PostPeerMessages(const std::vector<PeerMessage>& outgoing,
                      const std::vector<PeerMessage>& incoming, Group& group);

XLA_FFI_DECLARE_HANDLER_SYMBOL(NcclExchange);

}  // namespace jfog::nccl

#endif  // JFOG_XLA_OPS_NCCL_EXCHANGE_H_
