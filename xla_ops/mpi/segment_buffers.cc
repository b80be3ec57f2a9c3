// Buffers and request slots of the segments in flight.
#include "mpi/segment_buffers.h"

#include <algorithm>
#include <utility>

#include "common/cache_line.h"
#include "mpi/messages.h"

namespace jfog::mpi {

namespace {

std::size_t NumInFlight(const Segments& segments, const EdgeCounts& edges) {
  std::size_t wanted = SegmentBuffers::kNear;
  if (edges.sources + edges.destinations > 0) {
    wanted = std::max(wanted, edges.chunks / segments.parts());
  }
  return std::min(wanted, segments.size());
}

}  // namespace

SegmentBuffers::SegmentBuffers(const Segments& segments,
                               const EdgeCounts& edges)
    : stride_(AlignUp(std::max<std::size_t>(segments.longest(), 1))),
      in_flight_(NumInFlight(segments, edges)) {
  const std::size_t peers = edges.peers;
  const std::size_t sources = edges.sources;
  const std::size_t received = kHeaderBytes * (peers + sources);
  const std::size_t follows =
      segments.is_short() ? segments.longest() : sizeof(ClaimMessage);
  const std::size_t sent =
      AlignUp(sizeof(Header) + peers * (sizeof(Header) + follows));
  const std::size_t per_segment = stride_ * (3 * peers + 2 + sources);
  buffer_ = Buffer(received + sent + num_in_flight() * per_segment);
  sent_headers_ = buffer_.get() + received;
  std::byte* next = sent_headers_ + sent;
  const auto take = [&](std::size_t count) {
    return std::exchange(next, next + count * stride_);
  };
  for (InFlight& segment : in_flight_) {
    segment.inputs = take(peers);
    segment.packed = take(peers);
    segment.mean = take(1);
    segment.means = take(sources);
    segment.mixed = take(1);
    segment.results = take(peers);
    segment.has_result.assign(peers, false);
  }
  const std::size_t counts[kKinds] = {
      peers + sources, peers + edges.destinations, peers, peers,
      sources,         edges.destinations,         peers, peers};
  for (int kind = 0; kind < kKinds; ++kind) {
    first_[kind + 1] = first_[kind] + counts[kind];
  }
  slots_per_segment_ = first_[kKinds] - first_[kInput];
}

std::size_t SegmentBuffers::slots() const {
  return first_[kInput] + num_in_flight() * slots_per_segment_;
}

SegmentBuffers::Message SegmentBuffers::Decode(std::size_t slot) const {
  std::size_t segment = 0;
  if (slot >= first_[kInput]) {
    const std::size_t at = slot - first_[kInput];
    segment = at / slots_per_segment_;
    slot = first_[kInput] + at % slots_per_segment_;
  }
  int kind = 0;
  while (slot >= first_[kind + 1]) ++kind;
  return {static_cast<Kind>(kind), slot - first_[kind], segment};
}

}  // namespace jfog::mpi
