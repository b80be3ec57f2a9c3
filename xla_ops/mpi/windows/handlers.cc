// FFI handlers of windows.
#include "mpi/windows/handlers.h"

#include <cstring>
#include <memory>
#include <string>
#include <utility>

#include "common/hash.h"
#include "common/weighted_sum.h"
#include "mpi/collective.h"
#include "mpi/guarded_handler.h"
#include "mpi/launch.h"
#include "mpi/timeline.h"
#include "mpi/windows/service.h"
#include "mpi/windows/transfer.h"
#include "mpi/windows/window.h"

namespace jfog::mpi {
namespace {

using Ints = ffi::Span<const std::int32_t>;
using HandleBuffer = ffi::BufferR0<ffi::U32>;

constexpr const char* kUpdate = "win_update";

// Dtypes of an associated p, in the order of the Python side.
constexpr DataType kAssociated[] = {DataType::PRED, DataType::F32,
                                    DataType::F64};

// Drops the last element of an attribute: Python appends one, since an FFI
// array may not be empty.
std::vector<int> WithoutLast(Ints ints) {
  return std::vector<int>(ints.begin(), ints.end() - 1);
}

ffi::ErrorOr<std::vector<double>> ReadWeights(const ffi::AnyBuffer& weights,
                                              std::size_t count) {
  const auto as_doubles = [&](const auto* first) {
    return std::vector<double>(first, first + count);
  };
  if (weights.element_count() == count) {
    const void* data = weights.untyped_data();
    switch (weights.element_type()) {
      case DataType::S32:
        return as_doubles(static_cast<const std::int32_t*>(data));
      case DataType::F32:
        return as_doubles(static_cast<const float*>(data));
      case DataType::F64:
        return as_doubles(static_cast<const double*>(data));
      default:
        break;
    }
  }
  return ffi::Unexpected(
      MakeError(ffi::ErrorCode::kInternal, "malformed operand of weights"));
}

// The result of an operation that returns the window's handle.
ffi::ErrorOr<Payload> ReadResult(ffi::RemainingRets results,
                                 std::int64_t mode) {
  Payload result;
  Leaf leaf{DataType::U32, 1, 1, nullptr, nullptr, 0};
  if (mode == kWhole) {
    auto handle = results.get<HandleBuffer>(0);
    if (!handle) return ffi::Unexpected(handle.error());
    leaf.output = reinterpret_cast<std::byte*>((*handle)->typed_data());
  }
  result.leaves.push_back(leaf);
  result.ComputeOffsets();
  if (mode == kStart) {
    result.staging = Buffer(result.payload_bytes);
    result[0].output = result.staging.get();
  }
  return result;
}

Completion WinCreateImpl(ffi::Token, ffi::RemainingArgs args,
                         ffi::Result<ffi::Token>,
                         ffi::Result<HandleBuffer> handle, std::int64_t context,
                         std::int64_t, std::int64_t graph,
                         std::int64_t structure, Ints sources,
                         Ints destinations, Ints slots, std::int64_t zero_init,
                         std::int64_t associated) {
  JFOG_ASSIGN_OR_RETURN(comm, Ready(Communicators(), context, kCreate));
  JFOG_ASSIGN_OR_RETURN(leaves, ReadLeaves(args, 0, nullptr));
  WindowPlan plan;
  for (std::int64_t part : {graph, structure, zero_init, associated}) {
    plan.variant = Mix(plan.variant, static_cast<std::uint64_t>(part));
  }
  plan.sources = WithoutLast(sources);
  plan.destinations = WithoutLast(destinations);
  plan.slots = WithoutLast(slots);
  plan.zero_init = zero_init != 0;
  plan.p_type = kAssociated[associated];
  JFOG_ASSIGN_OR_RETURN(window,
                        Window::Make(comm, std::move(plan), std::move(leaves)));
  if (window->has_remote_parts()) ServeWindows(comm);
  WriteHandle(*window, handle->typed_data());
  return ffi::Error::Success();
}

constexpr const char* OperationOf(WindowRequest::Kind kind) {
  switch (kind) {
    case WindowRequest::kPut:
      return "win_put";
    case WindowRequest::kAccumulate:
      return "win_accumulate";
    default:
      return "win_get";
  }
}

// Put, accumulate and get.
template <WindowRequest::Kind kKind>
Completion TransferImpl(ffi::Token, HandleBuffer handle, ffi::AnyBuffer weights,
                        ffi::RemainingArgs args, ffi::Result<ffi::Token>,
                        ffi::RemainingRets results, std::int64_t,
                        std::int64_t mode, Ints peers) {
  constexpr const char* kName = OperationOf(kKind);
  JFOG_ASSIGN_OR_RETURN(window, FindWindow(handle.typed_data(), kName));
  std::vector<int> ranks = WithoutLast(peers);
  JFOG_ASSIGN_OR_RETURN(row, ReadWeights(weights, ranks.size()));
  JFOG_ASSIGN_OR_RETURN(result, ReadResult(results, mode));
  Payload value;
  if (kKind != WindowRequest::kGet) {
    JFOG_ASSIGN_OR_RETURN(leaves, ReadLeaves(args, 0, nullptr));
    JFOG_RETURN_IF_ERROR(window->BindPayload(&leaves, kName));
    value = std::move(leaves);
  }
  return Launch(std::make_shared<WindowTransfer>(
                    window, kName, kKind, std::move(result), std::move(value),
                    std::move(ranks), std::move(row)),
                results, mode);
}

auto TransferBinding() {
  return ffi::Ffi::Bind()
      .Arg<ffi::Token>()      // order in
      .Arg<HandleBuffer>()    // the window
      .Arg<ffi::AnyBuffer>()  // weights, of peers
      .RemainingArgs()        // leaves; none of a get
      .Ret<ffi::Token>()      // order out
      .RemainingRets()        // the window, or handle
      .Attr<std::int64_t>("context")
      .Attr<std::int64_t>("mode")
      .Attr<Ints>("peers");
}

// y = weights[0] x + sum_i weights[1 + i] slot_i, under the locks of the slots.
void Combine(const Window& window, const Payload& leaves,
             const std::vector<int>& records,
             const std::vector<double>& weights, bool difference) {
  std::vector<Term> terms(records.size());
  for (const Leaf& leaf : leaves) {
    if (leaf.count == 0) continue;
    for (std::size_t i = 0; i < records.size(); ++i) {
      terms[i] = {window.own().payload(records[i]) + leaf.offset,
                  weights[1 + i]};
    }
    WeightedSum(leaf.type, leaf.count, leaf.input, weights[0], terms,
                difference, leaf.output);
  }
}

// The records of the sources that have not failed; the others go to `gone`.
// Their weights go from `weights` to the own value, as in
// jfog.topology.without; in a collect, where slots hold sums, they add nothing.
// Called under the locks: what a rank was writing at its end is left out.
std::vector<int> TakeGone(const Window& window, const std::vector<int>& records,
                          const std::vector<int>& sources, bool collects,
                          std::vector<double>* weights,
                          std::vector<int>* gone) {
  std::vector<int> read;
  std::vector<double> kept = {(*weights)[0]};
  for (std::size_t i = 0; i < records.size(); ++i) {
    const double weight = (*weights)[1 + i];
    if (window.comm()->IsGone(sources[i])) {
      gone->push_back(sources[i]);
      if (!collects) kept[0] += weight;
    } else {
      read.push_back(records[i]);
      kept.push_back(weight);
    }
  }
  *weights = std::move(kept);
  return read;
}

Completion WinUpdateImpl(ffi::Token, HandleBuffer handle,
                         ffi::AnyBuffer weights, ffi::RemainingArgs args,
                         ffi::Result<ffi::Token>, ffi::RemainingRets results,
                         std::int64_t, std::int64_t mode, Ints peers,
                         std::int64_t difference, std::int64_t reset,
                         std::int64_t expose) {
  if (mode != kWhole || results.size() != args.size() + 1) {
    return MakeError(ffi::ErrorCode::kInternal, "malformed call of win_update");
  }
  JFOG_ASSIGN_OR_RETURN(window, FindWindow(handle.typed_data(), kUpdate));
  const std::vector<int> ranks = WithoutLast(peers);
  JFOG_ASSIGN_OR_RETURN(row, ReadWeights(weights, 1 + ranks.size()));
  JFOG_ASSIGN_OR_RETURN(leaves, ReadLeaves(args, 0, nullptr));
  for (std::size_t i = 0; i < leaves.size(); ++i) {
    auto y = results.get<ffi::AnyBuffer>(i);
    if (!y) return y.error();
    leaves[i].output = static_cast<std::byte*>((*y)->untyped_data());
  }
  auto result = results.get<HandleBuffer>(leaves.size());
  if (!result) return result.error();
  JFOG_RETURN_IF_ERROR(window->BindPayload(&leaves, kUpdate));
  window->comm()->LookForGone();
  JFOG_RETURN_IF_ERROR(window->comm()->Refusal());
  alignas(8) std::byte p[8];
  if (window->has_p()) leaves[leaves.size() - 1].output = p;

  const WindowMemory& own = window->own();
  const int rank = window->comm()->rank();
  const auto title = [rank] {
    return std::string(kUpdate) + " on rank " + std::to_string(rank);
  };
  Trace trace;
  trace.Begin(kUpdate, window->global_id(), leaves.bytes,
              window->comm()->number());
  std::int64_t since = trace.Now();
  // Holding all locks for the whole sum makes the update atomic: data and p of
  // a put are both in it, or both not. In-neighbors hold one lock each, so the
  // order in which these are taken does not matter.
  std::vector<int> records;
  for (int source : ranks) {
    const int record = window->RecordOf(source);
    JFOG_RETURN_IF_ERROR(window->Acquire(own.record(record).lock, rank, title));
    records.push_back(record);
  }
  trace.RecordSince(since, "lock");
  since = trace.Now();
  std::vector<int> gone;
  const std::vector<int> read =
      window->comm()->any_gone()
          ? TakeGone(*window, records, ranks, reset != 0, &row, &gone)
          : records;
  ffi::Error error =
      gone.empty() ? ffi::Error::Success() : window->LeaveOut(title(), gone);
  if (error.success()) {
    // In difference form what is left out would count as the own value.
    const bool in_difference = difference != 0 && (gone.empty() || reset == 0);
    Combine(*window, leaves, read, row, in_difference);
    for (int record : read) {
      if (reset != 0) {
        std::memset(own.payload(record), 0, window->layout().payload_bytes);
      }
      own.record(record).version.store(0, std::memory_order_relaxed);
    }
  }
  trace.RecordSince(since, "sum");
  for (int record : records) own.record(record).lock.Release();
  JFOG_RETURN_IF_ERROR(std::move(error));

  if (expose != 0) {
    WindowMemory::Record& exposed = own.record(0);
    JFOG_RETURN_IF_ERROR(window->Acquire(exposed.lock, rank, title));
    for (const Leaf& leaf : leaves) {
      if (leaf.count == 0) continue;
      std::memcpy(own.payload(0) + leaf.offset, leaf.output, leaf.bytes());
    }
    exposed.lock.Release();
  }
  trace.Record(TimelineEvent::kEnd);
  WriteHandle(*window, (*result)->typed_data());
  return ffi::Error::Success();
}

ffi::Error WinMissingImpl(ffi::Token, HandleBuffer handle,
                          ffi::Result<ffi::Token>,
                          ffi::Result<ffi::BufferR1<ffi::PRED>> missing,
                          std::int64_t, std::int64_t) {
  auto window = FindWindow(handle.typed_data(), "win_missing");
  if (!window) return window.error();
  Communicator& comm = *(*window)->comm();
  comm.LookForGone();
  for (int rank = 0; rank < comm.size(); ++rank) {
    missing->typed_data()[rank] = comm.IsGone(rank);
  }
  return ffi::Error::Success();
}

ffi::Error WinVersionImpl(ffi::Token, HandleBuffer handle,
                          ffi::Result<ffi::Token>,
                          ffi::Result<ffi::BufferR1<ffi::S32>> versions,
                          std::int64_t, std::int64_t) {
  auto window = FindWindow(handle.typed_data(), "win_version");
  if (!window) return window.error();
  for (int rank = 0; rank < (*window)->comm()->size(); ++rank) {
    const int record = (*window)->RecordOf(rank);
    std::int64_t version = 0;
    if (record > 0) {
      version = (*window)->own().record(record).version.load(
          std::memory_order_acquire);
    }
    versions->typed_data()[rank] = static_cast<std::int32_t>(version);
  }
  return ffi::Error::Success();
}

ffi::Error WinAssociatedPImpl(ffi::Token, HandleBuffer handle,
                              ffi::Result<ffi::Token>,
                              ffi::Result<ffi::AnyBuffer> p, std::int64_t,
                              std::int64_t) {
  auto window = FindWindow(handle.typed_data(), "win_associated_p");
  if (!window) return window.error();
  const Payload& layout = (*window)->layout();
  if (!(*window)->has_p() ||
      p->element_type() != layout[layout.size() - 1].type) {
    return MakeError(ffi::ErrorCode::kInternal,
                     "malformed call of win_associated_p");
  }
  const Leaf& leaf = layout[layout.size() - 1];
  // Without the record's lock: only updates of this rank write its p.
  std::memcpy(p->untyped_data(), (*window)->own().payload(0) + leaf.offset,
              leaf.bytes());
  return ffi::Error::Success();
}

ffi::Error WinFreeImpl(ffi::Token, HandleBuffer handle, ffi::Result<ffi::Token>,
                       ffi::Result<HandleBuffer> result, std::int64_t,
                       std::int64_t) {
  auto window = FindWindow(handle.typed_data(), "win_free");
  if (!window) return window.error();
  WriteHandle(**window, result->typed_data());
  return (*window)->Free();
}

}  // namespace

JFOG_DEFINE_HANDLER(WinCreate, "win_create", WinCreateImpl,
                    ffi::Ffi::Bind()
                        .Arg<ffi::Token>()    // order in
                        .RemainingArgs()      // leaves
                        .Ret<ffi::Token>()    // order out
                        .Ret<HandleBuffer>()  // the window
                        .Attr<std::int64_t>("context")
                        .Attr<std::int64_t>("mode")
                        .Attr<std::int64_t>("graph")
                        .Attr<std::int64_t>("structure")
                        .Attr<Ints>("sources")
                        .Attr<Ints>("destinations")
                        .Attr<Ints>("slots")
                        .Attr<std::int64_t>("zero_init")
                        .Attr<std::int64_t>("associated"));

JFOG_DEFINE_HANDLER(WinPut, "win_put", TransferImpl<WindowRequest::kPut>,
                    TransferBinding());
JFOG_DEFINE_HANDLER(WinAccumulate, "win_accumulate",
                    TransferImpl<WindowRequest::kAccumulate>,
                    TransferBinding());
JFOG_DEFINE_HANDLER(WinGet, "win_get", TransferImpl<WindowRequest::kGet>,
                    TransferBinding());

JFOG_DEFINE_HANDLER(WinUpdate, "win_update", WinUpdateImpl,
                    ffi::Ffi::Bind()
                        .Arg<ffi::Token>()      // order in
                        .Arg<HandleBuffer>()    // the window
                        .Arg<ffi::AnyBuffer>()  // weights, own first
                        .RemainingArgs()        // leaves
                        .Ret<ffi::Token>()      // order out
                        .RemainingRets()        // leaves, and the window
                        .Attr<std::int64_t>("context")
                        .Attr<std::int64_t>("mode")
                        .Attr<Ints>("peers")
                        .Attr<std::int64_t>("difference")
                        .Attr<std::int64_t>("reset")
                        .Attr<std::int64_t>("expose"));

JFOG_DEFINE_HANDLER(WinMissing, "win_missing", WinMissingImpl,
                    ffi::Ffi::Bind()
                        .Arg<ffi::Token>()                // order in
                        .Arg<HandleBuffer>()              // the window
                        .Ret<ffi::Token>()                // order out
                        .Ret<ffi::BufferR1<ffi::PRED>>()  // by rank
                        .Attr<std::int64_t>("context")
                        .Attr<std::int64_t>("mode"));

JFOG_DEFINE_HANDLER(WinVersion, "win_version", WinVersionImpl,
                    ffi::Ffi::Bind()
                        .Arg<ffi::Token>()               // order in
                        .Arg<HandleBuffer>()             // the window
                        .Ret<ffi::Token>()               // order out
                        .Ret<ffi::BufferR1<ffi::S32>>()  // by rank
                        .Attr<std::int64_t>("context")
                        .Attr<std::int64_t>("mode"));

JFOG_DEFINE_HANDLER(WinAssociatedP, "win_associated_p", WinAssociatedPImpl,
                    ffi::Ffi::Bind()
                        .Arg<ffi::Token>()      // order in
                        .Arg<HandleBuffer>()    // the window
                        .Ret<ffi::Token>()      // order out
                        .Ret<ffi::AnyBuffer>()  // p
                        .Attr<std::int64_t>("context")
                        .Attr<std::int64_t>("mode"));

JFOG_DEFINE_HANDLER(WinFree, "win_free", WinFreeImpl,
                    ffi::Ffi::Bind()
                        .Arg<ffi::Token>()    // order in
                        .Arg<HandleBuffer>()  // the window
                        .Ret<ffi::Token>()    // order out
                        .Ret<HandleBuffer>()  // its handle
                        .Attr<std::int64_t>("context")
                        .Attr<std::int64_t>("mode"));

}  // namespace jfog::mpi
