// Collectives over all ranks: allreduce, broadcast, allgather, barrier.
#include "mpi/collectives.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <limits>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "common/hash.h"
#include "common/weighted_sum.h"
#include "mpi/collective.h"
#include "mpi/datatypes.h"
#include "mpi/guarded_handler.h"
#include "mpi/launch.h"

namespace jfog::mpi {
namespace {

using Longs = ffi::Span<const std::int64_t>;

// MPI counts elements in an int, so longer vectors are moved in pieces.
constexpr std::size_t kPiece = std::size_t{1} << 28;

void Copy(void* to, const void* from, std::size_t bytes) {
  if (bytes > 0) std::memcpy(to, from, bytes);
}

// A longer vector, of not too many ranks, is reduced in two steps, in which
// each rank reduces one part of it. All messages of a step are in flight at
// once, and each rank sends 2 (n - 1) / n of the vector, the least that is
// possible. Open MPI 5 takes a tree for an MPI_Iallreduce in place or of fewer
// than 4 ranks, which sends all of it up to 2 log2(n) times, one after another.
constexpr std::size_t kPartsFrom = 64 << 10;  // bytes
constexpr int kPartsUpTo = 32;                // ranks

// y = op over the ranks of x; the mean is a sum and a division in the wire
// type.
class AllreduceOperation : public Collective {
 public:
  AllreduceOperation(std::shared_ptr<Communicator> comm, Payload leaves,
                     Reduction reduction)
      : Collective(std::move(comm), "allreduce", std::move(leaves), reduction),
        reduction_(reduction) {}

 private:
  // The leaves of one wire type, concatenated: one reduction for all of them.
  struct Vector {
    std::size_t count = 0;
    std::byte* wire = nullptr;
  };
  // A piece of a vector that is reduced in parts.
  struct Parts {
    DataType type;
    std::byte* wire;
    std::byte* received;              // this rank's part, of each rank
    std::vector<int> counts, starts;  // of elements, by rank
  };

  ffi::Error Begin() override {
    std::size_t pieces = 0;
    for (const Leaf& leaf : leaves()) {
      Vector& vector = vectors_[WireType(leaf.type)];
      starts_.push_back(vector.count);
      vector.count += leaf.count;
    }
    for (auto& [type, vector] : vectors_) {
      vector.wire = Allocate(vector.count * SizeOf(type));
      pieces += (vector.count + kPiece - 1) / kPiece;
    }
    for (std::size_t i = 0; i < leaves().size(); ++i) {
      const Leaf& leaf = leaves()[i];
      PackWire(leaf.type, leaf.input, leaf.count, WireOf(i));
    }
    Reserve(pieces);
    for (const auto& [type, vector] : vectors_) {
      for (std::size_t start = 0; start < vector.count; start += kPiece) {
        const int count =
            static_cast<int>(std::min(kPiece, vector.count - start));
        std::byte* piece = vector.wire + start * SizeOf(type);
        JFOG_RETURN_IF_ERROR(Reduce(type, count, piece));
      }
      Count(vector.count * SizeOf(type), vector.count * SizeOf(type));
    }
    return ffi::Error::Success();
  }

  ffi::Error Reduce(DataType type, int count, std::byte* piece) {
    const int size = comm().size();
    if (count * SizeOf(type) < kPartsFrom || size > kPartsUpTo) {
      JFOG_MPI_RETURN_IF_ERROR(MPI_Iallreduce(
          MPI_IN_PLACE, piece, count, MpiType(type), MpiOp(reduction_, type),
          comm().collective_comm(), Add()));
      return ffi::Error::Success();
    }
    Parts& parts = parts_.emplace_back(Parts{type, piece, nullptr, {}, {}});
    for (int rank = 0; rank < size; ++rank) {
      const auto cut = [&](std::int64_t r) {
        return static_cast<int>(count * r / size);
      };
      parts.starts.push_back(cut(rank));
      parts.counts.push_back(cut(rank + 1) - cut(rank));
    }
    const int own = parts.counts[comm().rank()];
    parts.received = Allocate(std::size_t{1} * size * own * SizeOf(type));
    // Counts of what is received; as long as the operation, for MPI reads them
    // until it ends.
    std::vector<int>& counts = received_.emplace_back(size, own);
    std::vector<int>& starts = received_.emplace_back();
    for (int rank = 0; rank < size; ++rank) starts.push_back(rank * own);
    JFOG_MPI_RETURN_IF_ERROR(MPI_Ialltoallv(
        piece, parts.counts.data(), parts.starts.data(), MpiType(type),
        parts.received, counts.data(), starts.data(), MpiType(type),
        comm().collective_comm(), Add()));
    return ffi::Error::Success();
  }

  // Reduces this rank's parts, in the order of the ranks, and gathers all.
  ffi::Error Continue(bool* has_more) override {
    *has_more = !parts_.empty() && !gathers_;
    if (!*has_more) return ffi::Error::Success();
    gathers_ = true;
    Reserve(parts_.size());
    for (const Parts& parts : parts_) {
      const int own = parts.counts[comm().rank()];
      const std::size_t width = SizeOf(parts.type);
      std::byte* sum = parts.wire + parts.starts[comm().rank()] * width;
      {
        Phase phase(trace(), "sum");
        Copy(sum, parts.received, own * width);
        for (int rank = 1; rank < comm().size(); ++rank) {
          JFOG_MPI_RETURN_IF_ERROR(MPI_Reduce_local(
              parts.received + std::size_t{1} * rank * own * width, sum, own,
              MpiType(parts.type), MpiOp(reduction_, parts.type)));
        }
      }
      JFOG_MPI_RETURN_IF_ERROR(MPI_Iallgatherv(
          MPI_IN_PLACE, 0, MPI_DATATYPE_NULL, parts.wire, parts.counts.data(),
          parts.starts.data(), MpiType(parts.type), comm().collective_comm(),
          Add()));
    }
    return ffi::Error::Success();
  }

  ffi::Error Finish() override {
    if (reduction_ == kMean) {
      for (const auto& [type, vector] : vectors_) {
        Divide(type, vector.count, comm().size(), vector.wire);
      }
    }
    for (std::size_t i = 0; i < leaves().size(); ++i) {
      const Leaf& leaf = leaves()[i];
      UnpackWire(leaf.type, WireOf(i), leaf.count, leaf.output);
    }
    return ffi::Error::Success();
  }

  std::byte* WireOf(std::size_t i) {
    const DataType type = WireType(leaves()[i].type);
    return vectors_[type].wire + starts_[i] * SizeOf(type);
  }

  const Reduction reduction_;
  std::map<DataType, Vector> vectors_;
  std::vector<std::size_t> starts_;  // of the leaves, in their vectors
  std::deque<Parts> parts_;
  std::deque<std::vector<int>> received_;
  bool gathers_ = false;
};

// y = x of the root. The payload is packed, so dtypes do not matter.
class BroadcastOperation : public Collective {
 public:
  BroadcastOperation(std::shared_ptr<Communicator> comm, Payload leaves,
                     std::int64_t root)
      : Collective(std::move(comm), "broadcast", std::move(leaves), root),
        root_(static_cast<int>(root)) {}

 private:
  ffi::Error Begin() override {
    const std::size_t total = leaves().payload_bytes;
    const bool is_root = comm().rank() == root_;
    packed_ = Allocate(total);
    if (is_root) {
      for (const Leaf& leaf : leaves()) {
        Copy(packed_ + leaf.offset, leaf.input, leaf.bytes());
      }
    }
    Reserve((total + kPiece - 1) / kPiece);
    for (std::size_t start = 0; start < total; start += kPiece) {
      const int count = static_cast<int>(std::min(kPiece, total - start));
      JFOG_MPI_RETURN_IF_ERROR(MPI_Ibcast(packed_ + start, count, MPI_BYTE,
                                          root_, comm().collective_comm(),
                                          Add()));
    }
    Count(is_root ? total : 0, is_root ? 0 : total);
    return ffi::Error::Success();
  }

  ffi::Error Finish() override {
    for (const Leaf& leaf : leaves()) {
      Copy(leaf.output, packed_ + leaf.offset, leaf.bytes());
    }
    return ffi::Error::Success();
  }

  const int root_;
  std::byte* packed_ = nullptr;
};

// y = [x_r for all ranks r], along axis 0. The lengths of the ranks may differ,
// so the signature covers all of them in place of this rank's leaves.
class AllgatherOperation : public Collective {
 public:
  // `rows[i * size + r]` is the length of axis 0 of leaf i on rank r, and
  // `row_bytes[i]` the bytes of one row.
  AllgatherOperation(std::shared_ptr<Communicator> comm, Payload leaves,
                     Longs rows, std::vector<std::size_t> row_bytes)
      : Collective(std::move(comm), "allgather", std::move(leaves), 0) {
    const std::size_t size = this->comm().size();
    std::uint64_t signature = this->leaves().size();
    for (std::size_t i = 0; i < this->leaves().size(); ++i) {
      const Leaf& leaf = this->leaves()[i];
      signature = Mix(signature, static_cast<std::uint64_t>(leaf.type));
      signature = Mix(signature, row_bytes[i]);
      std::size_t total = 0;
      lengths_.emplace_back();
      starts_.emplace_back();
      for (std::size_t r = 0; r < size; ++r) {
        const std::size_t bytes = rows[i * size + r] * row_bytes[i];
        signature = Mix(signature, bytes);
        lengths_.back().push_back(static_cast<int>(bytes));
        starts_.back().push_back(static_cast<int>(total));
        total += bytes;
      }
    }
    SetSignature(signature);
  }

 private:
  ffi::Error Begin() override {
    Reserve(leaves().size());
    for (std::size_t i = 0; i < leaves().size(); ++i) {
      const Leaf& leaf = leaves()[i];
      gathered_.push_back(Allocate(leaf.output_bytes()));
      Copy(gathered_[i] + starts_[i][comm().rank()], leaf.input, leaf.bytes());
      JFOG_MPI_RETURN_IF_ERROR(MPI_Iallgatherv(
          MPI_IN_PLACE, 0, MPI_DATATYPE_NULL, gathered_[i], lengths_[i].data(),
          starts_[i].data(), MPI_BYTE, comm().collective_comm(), Add()));
      Count(leaf.bytes(), leaf.output_bytes() - leaf.bytes());
    }
    return ffi::Error::Success();
  }

  ffi::Error Finish() override {
    for (std::size_t i = 0; i < leaves().size(); ++i) {
      Copy(leaves()[i].output, gathered_[i], leaves()[i].output_bytes());
    }
    return ffi::Error::Success();
  }

  std::vector<std::vector<int>> lengths_, starts_;  // in bytes, [leaf][rank]
  std::vector<std::byte*> gathered_;
};

Completion AllreduceImpl(ffi::Token, ffi::RemainingArgs args,
                         ffi::Result<ffi::Token>, ffi::RemainingRets results,
                         std::int64_t context, std::int64_t mode,
                         std::int64_t reduction_number) {
  JFOG_ASSIGN_OR_RETURN(comm, Ready(Communicators(), context, "allreduce"));
  JFOG_ASSIGN_OR_RETURN(leaves, ReadCall(args, 0, results, mode));
  const auto reduction = static_cast<Reduction>(reduction_number);
  for (const Leaf& leaf : leaves) {
    const DataType type = WireType(leaf.type);
    if (MpiType(type) == MPI_DATATYPE_NULL ||
        MpiOp(reduction, type) == MPI_OP_NULL) {
      return MakeError(ffi::ErrorCode::kInvalidArgument,
                       std::string("allreduce has no such reduction of ") +
                           NameOf(leaf.type));
    }
  }
  if (mode == kStart) leaves.Stage();
  return Launch(
      std::make_shared<AllreduceOperation>(comm, std::move(leaves), reduction),
      results, mode);
}

Completion BroadcastImpl(ffi::Token, ffi::BufferR0<ffi::S32> rank,
                         ffi::RemainingArgs args, ffi::Result<ffi::Token>,
                         ffi::RemainingRets results, std::int64_t context,
                         std::int64_t mode) {
  JFOG_ASSIGN_OR_RETURN(comm, Ready(Communicators(), context, "broadcast"));
  const std::int64_t root = *rank.typed_data();
  if (root < 0 || root >= comm->size()) {
    return MakeError(ffi::ErrorCode::kInvalidArgument,
                     "broadcast: root=" + std::to_string(root) +
                         " is out of range for a communicator of size " +
                         std::to_string(comm->size()));
  }
  JFOG_ASSIGN_OR_RETURN(leaves, ReadCall(args, 0, results, mode));
  if (mode == kStart) leaves.Stage();
  return Launch(
      std::make_shared<BroadcastOperation>(comm, std::move(leaves), root),
      results, mode);
}

Completion AllgatherImpl(ffi::Token, ffi::RemainingArgs args,
                         ffi::Result<ffi::Token>, ffi::RemainingRets results,
                         std::int64_t context, std::int64_t mode, Longs rows,
                         Longs row_sizes) {
  JFOG_ASSIGN_OR_RETURN(comm, Ready(Communicators(), context, "allgather"));
  JFOG_ASSIGN_OR_RETURN(leaves, ReadCall(args, 0, results, mode));
  std::vector<std::size_t> row_bytes;
  const std::size_t size = comm->size();
  for (std::size_t i = 0; i < leaves.size(); ++i) {
    Leaf& leaf = leaves[i];
    std::size_t total = 0;
    for (std::size_t r = 0; r < size; ++r) total += rows[i * size + r];
    leaf.output_count = total * row_sizes[i];
    row_bytes.push_back(row_sizes[i] * SizeOf(leaf.type));
    if (leaf.output_bytes() >
        static_cast<std::size_t>(std::numeric_limits<int>::max())) {
      return MakeError(ffi::ErrorCode::kInvalidArgument,
                       "allgather of more than 2 GiB of one leaf");
    }
  }
  if (mode == kStart) leaves.Stage();
  return Launch(std::make_shared<AllgatherOperation>(
                    comm, std::move(leaves), rows, std::move(row_bytes)),
                results, mode);
}

Completion BarrierImpl(ffi::Token, ffi::RemainingArgs, ffi::Result<ffi::Token>,
                       ffi::RemainingRets results, std::int64_t context,
                       std::int64_t mode) {
  JFOG_ASSIGN_OR_RETURN(comm, Ready(Communicators(), context, "barrier"));
  return Launch(
      std::make_shared<BarrierOperation>(comm, "barrier", Payload(), 0),
      results, mode);
}

}  // namespace

JFOG_DEFINE_HANDLER(Allreduce, "allreduce", AllreduceImpl,
                    ffi::Ffi::Bind()
                        .Arg<ffi::Token>()  // order in
                        .RemainingArgs()    // leaves
                        .Ret<ffi::Token>()  // order out
                        .RemainingRets()    // leaves, or handle
                        .Attr<std::int64_t>("context")
                        .Attr<std::int64_t>("mode")
                        .Attr<std::int64_t>("reduction"));

JFOG_DEFINE_HANDLER(Broadcast, "broadcast", BroadcastImpl,
                    ffi::Ffi::Bind()
                        .Arg<ffi::Token>()               // order in
                        .Arg<ffi::BufferR0<ffi::S32>>()  // root
                        .RemainingArgs()                 // leaves
                        .Ret<ffi::Token>()               // order out
                        .RemainingRets()                 // leaves, or handle
                        .Attr<std::int64_t>("context")
                        .Attr<std::int64_t>("mode"));

JFOG_DEFINE_HANDLER(Allgather, "allgather", AllgatherImpl,
                    ffi::Ffi::Bind()
                        .Arg<ffi::Token>()  // order in
                        .RemainingArgs()    // leaves
                        .Ret<ffi::Token>()  // order out
                        .RemainingRets()    // leaves, or handle
                        .Attr<std::int64_t>("context")
                        .Attr<std::int64_t>("mode")
                        .Attr<Longs>("rows")
                        .Attr<Longs>("row_sizes"));

JFOG_DEFINE_HANDLER(Barrier, "barrier", BarrierImpl,
                    ffi::Ffi::Bind()
                        .Arg<ffi::Token>()  // order in
                        .RemainingArgs()    // none
                        .Ret<ffi::Token>()  // order out
                        .RemainingRets()    // none
                        .Attr<std::int64_t>("context")
                        .Attr<std::int64_t>("mode"));

}  // namespace jfog::mpi
