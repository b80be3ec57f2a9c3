// Sends and receives of one operation, grouped into one.
#include "nccl/exchange.h"

#include <algorithm>
#include <optional>
#include <string>
#include <utility>

#include "common/hash.h"
#include "nccl/call_context.h"

namespace jfog::nccl {
namespace {

// Cuts the buffers of one side into slices, rank by rank.
class Slices {
 public:
  struct Buffer {
    DevicePointer address;
    std::size_t bytes;
    std::size_t width;   // of an element
    std::size_t offset;  // that the next slice begins at
  };

  // Elements by leaf and rank, or if that is empty each buffer in `slots`.
  Slices(const std::vector<std::int64_t>& counts, int size, std::int64_t slots)
      : counts_(counts), size_(size), slots_(slots) {}

  void Add(DevicePointer address, std::size_t bytes, std::size_t width) {
    buffers_.push_back({address, bytes, width, 0});
  }

  // Returns false if the slice exceeds a buffer.
  bool Next(int rank, PeerMessage* message) {
    message->rank = rank;
    for (std::size_t i = 0; i < buffers_.size(); ++i) {
      Buffer& buffer = buffers_[i];
      std::size_t bytes = 0;
      if (!counts_.empty()) {
        if (i * size_ + rank >= counts_.size()) return false;
        bytes = counts_[i * size_ + rank] * buffer.width;
      } else if (slots_ > 0) {
        bytes = buffer.bytes / slots_;
      }
      if (buffer.offset + bytes > buffer.bytes) return false;
      message->pieces.push_back({buffer.address + buffer.offset, bytes});
      buffer.offset += bytes;
    }
    return true;
  }

  const std::vector<Buffer>& buffers() const { return buffers_; }

 private:
  const std::vector<std::int64_t>& counts_;
  const std::size_t size_;
  const std::int64_t slots_;
  std::vector<Buffer> buffers_;
};

ffi::Error MalformedExchange(const Plan& plan) {
  return MakeError(ffi::ErrorCode::kInternal,
                   "malformed call of " + plan.operation);
}

// The peers of this call, from the operand or from the graph.
ffi::ErrorOr<Round> ReadRound(const ExchangePlan& plan, Call& call,
                              const ffi::AnyBuffer& selector,
                              OperationSpec* spec) {
  std::vector<std::int32_t> values{0};
  if (plan.selects || plan.rounds.size() > 1) {
    ffi::Error error = call.ReadInts(selector, &values);
    if (error.failure()) return ffi::Unexpected(std::move(error));
  }
  if (!plan.selects) {
    if (values.size() != 1) return ffi::Unexpected(MalformedExchange(plan));
    auto round = FindRound(plan.rounds, values[0]);
    if (!round) return ffi::Unexpected(round.error());
    spec->variant = Mix(spec->variant, values[0]);
    return **round;
  }
  Round round;
  for (std::size_t k = 0; k < values.size(); ++k) {
    const int rank = values[k];
    if (rank < 0 || rank >= plan.comm->size()) {
      return ffi::Unexpected(
          MakeError(ffi::ErrorCode::kInvalidArgument,
                    plan.operation + " with rank " + std::to_string(rank) +
                        ", which is none of the communicator's " +
                        std::to_string(plan.comm->size())));
    }
    const bool is_source = k < static_cast<std::size_t>(plan.source_count);
    (is_source ? round.sources : round.destinations).push_back(rank);
  }
  return round;
}

// Removes the messages of this rank to itself, and copies their data.
ffi::Error CopyOwn(const Plan& plan, Call& call,
                   std::vector<PeerMessage>* outgoing,
                   std::vector<PeerMessage>* incoming) {
  const auto take = [&](std::vector<PeerMessage>* messages) {
    std::vector<PeerMessage> own;
    for (auto message = messages->begin(); message != messages->end();) {
      if (message->rank == plan.comm->rank()) {
        own.push_back(std::move(*message));
        message = messages->erase(message);
      } else {
        ++message;
      }
    }
    return own;
  };
  const std::vector<PeerMessage> from = take(outgoing);
  const std::vector<PeerMessage> to = take(incoming);
  if (from.size() != to.size()) {
    return MakeError(ffi::ErrorCode::kInvalidArgument,
                     plan.operation + " with rank " +
                         std::to_string(plan.comm->rank()) +
                         ", which is this rank itself, on one side only");
  }
  for (std::size_t k = 0; k < from.size(); ++k) {
    for (std::size_t i = 0; i < from[k].pieces.size(); ++i) {
      const PeerMessage::Piece& source = from[k].pieces[i];
      if (source.bytes != to[k].pieces[i].bytes) return MalformedExchange(plan);
      JFOG_RETURN_IF_ERROR(
          call.Copy(to[k].pieces[i].address, source.address, source.bytes));
    }
  }
  return ffi::Error::Success();
}

// A hash of the dtypes, which must be equal on all ranks. The two ends of an
// edge compare the bytes of a slice.
std::uint64_t SignatureOf(const ExchangePlan& plan,
                          const std::vector<Leaf>& leaves) {
  std::uint64_t signature = Mix(plan.signature, leaves.size());
  for (const Leaf& leaf : leaves) {
    signature = Mix(signature, static_cast<std::uint64_t>(leaf.type));
  }
  return signature;
}

ffi::Error ExchangeImpl(CudaStream stream, State* state, ffi::Token,
                        ffi::AnyBuffer selector, ffi::RemainingArgs args,
                        ffi::Result<ffi::Token>, ffi::RemainingRets results,
                        ffi::Dictionary) {
  const auto& plan = As<ExchangePlan>(state);
  const int size = plan.comm->size();
  Call call(plan, stream);
  JFOG_RETURN_IF_ERROR(call.Check());
  OperationSpec choice;
  choice.variant = plan.variant;
  auto round = ReadRound(plan, call, selector, &choice);
  if (!round) return round.error();
  JFOG_RETURN_IF_ERROR(call.ReadLeaves(args, results, [&](const Leaf& leaf) {
    return leaf.bytes * plan.slots;
  }));
  OperationSpec spec = call.MakeOperationSpec();
  spec.variant = choice.variant;
  spec.signature = SignatureOf(plan, call.leaves());

  Slices inputs(plan.send_counts, size, plan.send_slots);
  Slices outputs(plan.receive_counts, size, plan.slots);
  for (const Leaf& leaf : call.leaves()) {
    inputs.Add(leaf.input, leaf.bytes, leaf.width());
    outputs.Add(leaf.output, leaf.output_bytes, leaf.width());
  }
  std::vector<PeerMessage> outgoing(round->destinations.size());
  for (std::size_t k = 0; k < outgoing.size(); ++k) {
    if (plan.apart) {
      if (!inputs.Next(round->destinations[k], &outgoing[k])) {
        return MalformedExchange(plan);
      }
      continue;
    }
    outgoing[k].rank = round->destinations[k];
    for (const Leaf& leaf : call.leaves()) {
      outgoing[k].pieces.push_back({leaf.input, leaf.bytes});
    }
  }
  std::vector<PeerMessage> incoming(round->sources.size());
  for (std::size_t k = 0; k < incoming.size(); ++k) {
    if (!outputs.Next(round->sources[k], &incoming[k]))
      return MalformedExchange(plan);
  }
  JFOG_RETURN_IF_ERROR(CopyOwn(plan, call, &outgoing, &incoming));
  if (!plan.receive_counts.empty()) {
    for (const Slices::Buffer& buffer : outputs.buffers()) {
      if (buffer.offset == buffer.bytes) continue;
      JFOG_RETURN_IF_ERROR(call.CheckCuda(
          Cuda().set_bytes(buffer.address + buffer.offset, 0,
                           buffer.bytes - buffer.offset, call.stream()),
          "cuMemsetD8Async"));
    }
  }
  spec.sources = EdgesOf(incoming);
  spec.destinations = EdgesOf(outgoing);
  JFOG_RETURN_IF_ERROR(call.Launch(
      plan.comm, std::move(spec),
      [&](Group& group) { PostPeerMessages(outgoing, incoming, group); }));
  return call.Finish(results);
}

}  // namespace

std::size_t PeerMessage::bytes() const {
  std::size_t sum = 0;
  for (const Piece& piece : pieces) sum += piece.bytes;
  return sum;
}

std::vector<Edge> EdgesOf(const std::vector<PeerMessage>& messages) {
  std::vector<Edge> edges;
  for (const PeerMessage& message : messages) {
    edges.push_back({message.rank, message.bytes()});
  }
  return edges;
}

void PostPeerMessages(const std::vector<PeerMessage>& outgoing,
                      const std::vector<PeerMessage>& incoming, Group& group) {
  for (const PeerMessage& message : outgoing) {
    for (const PeerMessage::Piece& piece : message.pieces) {
      if (piece.bytes > 0) group.Send(piece.address, piece.bytes, message.rank);
    }
  }
  for (const PeerMessage& message : incoming) {
    for (const PeerMessage::Piece& piece : message.pieces) {
      if (piece.bytes > 0) {
        group.Receive(piece.address, piece.bytes, message.rank);
      }
    }
  }
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(NcclExchange, ExchangeImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<CudaStream>>()
                                  .Ctx<ffi::State<State>>()
                                  .Arg<ffi::Token>()      // order in
                                  .Arg<ffi::AnyBuffer>()  // step, or ranks
                                  .RemainingArgs()        // leaves
                                  .Ret<ffi::Token>()      // order out
                                  .RemainingRets()        // received, or handle
                                  .Attrs());              // see ReadExchange

}  // namespace jfog::nccl
