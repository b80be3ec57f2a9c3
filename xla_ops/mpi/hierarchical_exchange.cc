// Exchange of an average inside and between machines.
#include "mpi/hierarchical_exchange.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "mpi/wire_format.h"

namespace jfog::mpi {

HierarchicalExchange::HierarchicalExchange(std::shared_ptr<Communicator> comm,
                                           const char* name, Payload payload,
                                           std::uint64_t variant,
                                           const std::vector<int>& members,
                                           Round round)
    : Operation(std::move(comm), name, std::move(payload), variant),
      round_(std::move(round)),
      segments_(leaves(), members.size()),
      buffers_(segments_,
               {members.size() - 1, round_.sources.size(),
                round_.destinations.size(), this->comm().chunks_in_flight()}) {
  for (std::size_t k = 0; k < members.size(); ++k) {
    if (members[k] == this->comm().rank()) {
      me_ = k;
    } else {
      Peer peer;
      peer.rank = members[k];
      peer.part = k;
      peers_.push_back(peer);
    }
  }
  mean_terms_.assign(peers_.size(), {nullptr, 1.0 / segments_.parts()});
  for (double weight : round_.source_weights) {
    mix_terms_.push_back({nullptr, weight});
  }
  Resize(buffers_.slots());
  if (!segments_.is_short() && this->comm().channels() != nullptr) {
    for (const Peer& peer : peers_) {
      const int rank = RankInRoot(peer);
      if (channels().Reaches(rank)) readers_.push_back(rank);
    }
  }
  shares_channels_ = !readers_.empty() && readers_.size() == peers_.size();
  tags_.Enter(this->comm().tags(), sequence());
}

// Messages.

// Two tags are enough: of the two kinds that share one, `kInput` comes from
// peers and `kMeans` from sources, which are different ranks; messages of one
// kind from one rank arrive in the order of the segments.
int HierarchicalExchange::tag(SegmentBuffers::Kind kind) const {
  const int number = comm().tags().NumberOf(sequence());
  return kind == SegmentBuffers::kResults || kind == SegmentBuffers::kMixed
             ? kSecondTag + number
             : kChunkTag + number;
}

ffi::Error HierarchicalExchange::Post() {
  // A peer receives its part of the input from this rank, and this rank's part
  // of the result; a destination receives the mean of this rank's part.
  for (const Peer& peer : peers_) {
    CountSent(peer.rank,
              segments_.LeafBytes(peer.part) + segments_.LeafBytes(me_));
  }
  for (int destination : round_.destinations) {
    CountSent(destination, segments_.LeafBytes(me_));
  }
  // Either may be busy with the results of an earlier operation; then messages
  // replace it.
  if (shares_channels_) {
    inputs_channel_ = channels().Acquire(readers_, InputChunks());
    results_channel_ = channels().Acquire(readers_, segments_.size());
  }
  unchecked_ = peers_.size() + round_.sources.size();
  for (std::size_t e = 0; e < unchecked_; ++e) {
    JFOG_RETURN_IF_ERROR(Receive(
        buffers_.header(e), SegmentBuffers::kHeaderBytes, RankOfHeader(e),
        kEnvelopeTag, buffers_.SlotOfHeader(SegmentBuffers::kHeader, e),
        /*has_header=*/true));
  }
  JFOG_RETURN_IF_ERROR(SendHeaders());
  return tags_.BecomesReady() ? StartSegments() : ffi::Error::Success();
}

ffi::Error HierarchicalExchange::StartSegments() {
  for (std::size_t s = 0; s < buffers_.num_in_flight(); ++s) {
    JFOG_RETURN_IF_ERROR(SendInputs(s));
    // The receives of a segment wait for all headers: a rank that disagrees on
    // the lengths must not write past the end of a buffer. Without sources and
    // peers there are none to wait for.
    if (unchecked_ == 0) JFOG_RETURN_IF_ERROR(ReceiveSegment(s));
  }
  return ffi::Error::Success();
}

int HierarchicalExchange::RankOfHeader(std::size_t e) const {
  return e < peers_.size() ? peers_[e].rank : round_.sources[e - peers_.size()];
}

ffi::Error HierarchicalExchange::SendHeaders() {
  Header header = this->header();
  std::byte* to = buffers_.sent_headers();
  // Other machines cannot read this rank's channels: a header without one.
  std::memcpy(to, &header, sizeof(header));
  for (std::size_t d = 0; d < round_.destinations.size(); ++d) {
    JFOG_RETURN_IF_ERROR(Send(
        to, sizeof(header), round_.destinations[d], kEnvelopeTag,
        buffers_.SlotOfHeader(SegmentBuffers::kSentHeader, peers_.size() + d)));
  }
  to += sizeof(header);
  // The header of a peer names the channel of inputs. What follows is the input
  // of a short operation, or the channel of results.
  if (inputs_channel_) {
    header.channel = inputs_channel_->channel;
    header.stamp = inputs_channel_->stamp;
    header.check = CheckWithClaim(header.check, header);
  }
  ClaimMessage results;
  if (results_channel_) {
    results = {results_channel_->stamp, results_channel_->channel};
  }
  results = WithCheck(results);
  for (std::size_t p = 0; p < peers_.size(); ++p) {
    std::memcpy(to, &header, sizeof(header));
    std::size_t size = sizeof(header);
    if (segments_.is_short()) {
      const std::size_t part = peers_[p].part;
      leaves().CopyOut(segments_.Begin(0, part), segments_.End(0, part),
                       to + size);
      size += segments_.Size(0, part);
    } else {
      std::memcpy(to + size, &results, sizeof(results));
      size += sizeof(results);
    }
    JFOG_RETURN_IF_ERROR(
        Send(to, size, peers_[p].rank, kEnvelopeTag,
             buffers_.SlotOfHeader(SegmentBuffers::kSentHeader, p)));
    to += size;
  }
  return ffi::Error::Success();
}

ffi::Error HierarchicalExchange::Completed(std::size_t slot) {
  const SegmentBuffers::Message message = buffers_.Decode(slot);
  SegmentBuffers::InFlight& segment = buffers_.of(message.segment);
  switch (message.kind) {
    case SegmentBuffers::kHeader:
      return HeaderReceived(message.index);
    case SegmentBuffers::kSentHeader:
      break;
    case SegmentBuffers::kInput:
      --segment.inputs_left;
      break;
    case SegmentBuffers::kMeans:
      --segment.means_left;
      break;
    case SegmentBuffers::kResults:
      segment.has_result[message.index] = true;
      break;
    default:
      --segment.sends_left;
  }
  return ffi::Error::Success();
}

ffi::Error HierarchicalExchange::HeaderReceived(std::size_t e) {
  Header theirs;
  const int source = RankOfHeader(e);
  const std::byte* from = buffers_.header(e);
  std::size_t expected = sizeof(theirs);
  if (e < peers_.size()) {
    expected +=
        segments_.is_short() ? segments_.Size(0, me_) : sizeof(ClaimMessage);
  }
  JFOG_RETURN_IF_ERROR(ReadHeader(
      source, from, length(buffers_.SlotOfHeader(SegmentBuffers::kHeader, e)),
      expected, &theirs));
  if (e < peers_.size()) {
    Peer& peer = peers_[e];
    CountReceived(peer.rank,
                  segments_.LeafBytes(me_) + segments_.LeafBytes(peer.part));
    if (!segments_.is_short() && shares_channels_) {
      // A stamp of 0 stands for no channel.
      if (theirs.stamp != 0) {
        JFOG_RETURN_IF_ERROR(CheckMessage(
            source, CheckChannel(theirs.channel, Channels::kChannels)));
        peer.inputs = Channels::Claim{theirs.channel, theirs.stamp};
      }
      ClaimMessage results;
      JFOG_RETURN_IF_ERROR(
          CheckMessage(source, Read(from + sizeof(theirs), sizeof(results),
                                    Channels::kChannels, &results)));
      if (results.stamp != 0) {
        peer.results =
            Channels::Claim{static_cast<int>(results.channel), results.stamp};
      }
    }
  } else {
    CountReceived(source, segments_.LeafBytes(me_));
  }
  if (--unchecked_ > 0 || !tags_.is_ready()) return ffi::Error::Success();
  for (std::size_t s = 0; s < buffers_.num_in_flight(); ++s) {
    JFOG_RETURN_IF_ERROR(ReceiveSegment(s));
  }
  return ffi::Error::Success();
}

ffi::Error HierarchicalExchange::SendInputs(std::size_t segment) {
  if (segments_.is_short() || inputs_channel_) return ffi::Error::Success();
  SegmentBuffers::InFlight& buffers = buffers_.of(segment);
  std::byte* to = buffers.packed;
  for (std::size_t p = 0; p < peers_.size(); ++p, to += buffers_.stride()) {
    const std::size_t part = peers_[p].part;
    leaves().CopyOut(segments_.Begin(segment, part),
                     segments_.End(segment, part), to);
    ++buffers.sends_left;
    JFOG_RETURN_IF_ERROR(
        Send(to, segments_.Size(segment, part), peers_[p].rank,
             tag(SegmentBuffers::kPacked),
             buffers_.SlotOf(segment, SegmentBuffers::kPacked, p)));
  }
  return ffi::Error::Success();
}

// Posts the receives of all three steps: none of the senders waits for this
// rank to reach the step.
ffi::Error HierarchicalExchange::ReceiveSegment(std::size_t segment) {
  SegmentBuffers::InFlight& buffers = buffers_.of(segment);
  const std::size_t stride = buffers_.stride();
  const std::size_t own_size = segments_.Size(segment, me_);
  for (std::size_t p = 0; p < peers_.size(); ++p) {
    const Peer& peer = peers_[p];
    if (!segments_.is_short() && !peer.inputs) {
      ++buffers.inputs_left;
      JFOG_RETURN_IF_ERROR(
          Receive(buffers.inputs + p * stride, own_size, peer.rank,
                  tag(SegmentBuffers::kInput),
                  buffers_.SlotOf(segment, SegmentBuffers::kInput, p)));
    }
    buffers.has_result[p] = false;
    if (!peer.results) {
      JFOG_RETURN_IF_ERROR(Receive(
          buffers.results + p * stride, segments_.Size(segment, peer.part),
          peer.rank, tag(SegmentBuffers::kResults),
          buffers_.SlotOf(segment, SegmentBuffers::kResults, p)));
    }
  }
  for (std::size_t s = 0; s < round_.sources.size(); ++s) {
    ++buffers.means_left;
    JFOG_RETURN_IF_ERROR(
        Receive(buffers.means + s * stride, own_size, round_.sources[s],
                tag(SegmentBuffers::kMeans),
                buffers_.SlotOf(segment, SegmentBuffers::kMeans, s)));
  }
  return ffi::Error::Success();
}

// Progress.

bool HierarchicalExchange::is_waiting() const {
  if (gathered_ < segments_.size()) return true;
  // Chunks of inputs for others stay in flight after this rank has its result:
  // its own are published for peers, and those of its peers must be skipped, or
  // the peers could not reuse their channel.
  if (inputs_channel_ && published_inputs_ < InputChunks()) return true;
  return std::any_of(peers_.begin(), peers_.end(), [&](const Peer& peer) {
    return peer.inputs && peer.next_input < InputChunks();
  });
}

// Polls all steps until none of them moves. Each step works on the first
// segment that has not completed it, so segments pass a step in order.
ffi::Error HierarchicalExchange::Resume(bool* moved) {
  if (tags_.BecomesReady()) {
    JFOG_RETURN_IF_ERROR(StartSegments());
    *moved = true;
  }
  for (bool any = true; any;) {
    any = PublishInput();
    if (unchecked_ == 0 && tags_.is_ready()) {
      for (Peer& peer : peers_) any |= SkipInputs(peer);
      if (HasInputs()) {
        JFOG_RETURN_IF_ERROR(TakeMean());
        any = true;
      }
      if (mixed_ < averaged_ && buffers_.of(mixed_).means_left == 0) {
        JFOG_RETURN_IF_ERROR(Mix());
        any = true;
      }
      any |= PublishResult();
      for (std::size_t p = 0; p < peers_.size(); ++p) any |= TakeResult(p);
      if (IsGathered()) {
        JFOG_RETURN_IF_ERROR(EndSegment());
        any = true;
      }
    }
    if (any) *moved = true;
  }
  return ffi::Error::Success();
}

// Step 1: inputs.

// A channel of inputs has, for every segment, one chunk per part but the
// sender's own. Every peer reads one of them and skips the others.
std::size_t HierarchicalExchange::PartOfChunk(std::size_t chunk,
                                              std::size_t sender) const {
  const std::size_t k = chunk % peers_.size();
  return k < sender ? k : k + 1;
}

bool HierarchicalExchange::PublishInput() {
  if (!inputs_channel_ || published_inputs_ == InputChunks()) return false;
  // Null until all peers have read or skipped the chunk before in this slot.
  std::byte* to = channels().Place(*inputs_channel_, published_inputs_);
  if (to == nullptr) return false;
  const std::size_t segment = published_inputs_ / peers_.size();
  const std::size_t part = PartOfChunk(published_inputs_, me_);
  leaves().CopyOut(segments_.Begin(segment, part), segments_.End(segment, part),
                   to);
  channels().Publish(*inputs_channel_, published_inputs_);
  ++published_inputs_;
  return true;
}

// The next chunk of a peer's inputs; null until the peer has published it.
const std::byte* HierarchicalExchange::FindInput(const Peer& peer) const {
  return channels().Find(RankInRoot(peer), *peer.inputs, peer.next_input);
}

void HierarchicalExchange::InputDone(Peer& peer) {
  channels().Done(RankInRoot(peer), *peer.inputs, peer.next_input);
  ++peer.next_input;
}

// Skips the chunks that a peer publishes for other ranks. Only published chunks
// are skipped: the mark of an unpublished one would replace the mark of the
// chunk before it in the slot, which the peer waits for.
bool HierarchicalExchange::SkipInputs(Peer& peer) {
  bool any = false;
  while (peer.inputs && peer.next_input < InputChunks() &&
         PartOfChunk(peer.next_input, peer.part) != me_ &&
         FindInput(peer) != nullptr) {
    InputDone(peer);
    any = true;
  }
  return any;
}

// Whether this rank's part of segment `averaged_` has arrived from all peers;
// if so, points the terms of the mean at it.
bool HierarchicalExchange::HasInputs() {
  // The buffers of the segment may still be those of an earlier one.
  if (averaged_ ==
      std::min(segments_.size(), gathered_ + buffers_.num_in_flight())) {
    return false;
  }
  const SegmentBuffers::InFlight& buffers = buffers_.of(averaged_);
  if (buffers.inputs_left > 0) return false;
  for (std::size_t p = 0; p < peers_.size(); ++p) {
    const Peer& peer = peers_[p];
    const std::byte* bytes = buffers.inputs + p * buffers_.stride();
    if (segments_.is_short()) {
      bytes = buffers_.header(p) + sizeof(Header);
    } else if (peer.inputs) {
      if (peer.next_input / peers_.size() != averaged_ ||
          PartOfChunk(peer.next_input, peer.part) != me_) {
        return false;
      }
      bytes = FindInput(peer);
      if (bytes == nullptr) return false;
    }
    mean_terms_[p].values = bytes;
  }
  return true;
}

// m = x + sum_p (x_p - x) / parts, and sends m to the neighboring machines.
ffi::Error HierarchicalExchange::TakeMean() {
  Phase phase(trace(), "mean");
  SegmentBuffers::InFlight& buffers = buffers_.of(averaged_);
  std::vector<Term> terms = mean_terms_;
  leaves().ForEachRun(
      segments_.Begin(averaged_, me_), segments_.End(averaged_, me_),
      [&](const Leaf& leaf, std::size_t first, std::size_t count,
          std::size_t at) {
        for (std::size_t p = 0; p < terms.size(); ++p) {
          terms[p].values =
              static_cast<const std::byte*>(mean_terms_[p].values) + at;
        }
        WeightedSum(leaf.type, count, leaf.input + first * SizeOf(leaf.type),
                    1.0, terms, /*difference=*/true, buffers.mean + at);
      });
  for (Peer& peer : peers_) {
    if (peer.inputs) InputDone(peer);
  }
  for (std::size_t d = 0; d < round_.destinations.size(); ++d) {
    ++buffers.sends_left;
    JFOG_RETURN_IF_ERROR(
        Send(buffers.mean, segments_.Size(averaged_, me_),
             round_.destinations[d], tag(SegmentBuffers::kMean),
             buffers_.SlotOf(averaged_, SegmentBuffers::kMean, d)));
  }
  ++averaged_;
  return ffi::Error::Success();
}

// Step 2: the weighted sum of the machines' means.

// Writes this rank's part of the output. The input there is not needed any
// more: no other rank reads this rank's own part.
ffi::Error HierarchicalExchange::Mix() {
  Phase phase(trace(), "sum");
  SegmentBuffers::InFlight& buffers = buffers_.of(mixed_);
  const std::size_t begin = segments_.Begin(mixed_, me_);
  const std::size_t end = segments_.End(mixed_, me_);
  std::vector<Term> terms = mix_terms_;
  leaves().ForEachRun(
      begin, end,
      [&](const Leaf& leaf, std::size_t, std::size_t count, std::size_t at) {
        for (std::size_t s = 0; s < terms.size(); ++s) {
          terms[s].values = buffers.means + s * buffers_.stride() + at;
        }
        WeightedSum(leaf.type, count, buffers.mean + at, round_.self_weight,
                    terms, round_.difference, buffers.mixed + at);
      });
  leaves().CopyIn(begin, end, buffers.mixed);
  if (!results_channel_) {
    for (std::size_t p = 0; p < peers_.size(); ++p) {
      ++buffers.sends_left;
      JFOG_RETURN_IF_ERROR(
          Send(buffers.mixed, segments_.Size(mixed_, me_), peers_[p].rank,
               tag(SegmentBuffers::kMixed),
               buffers_.SlotOf(mixed_, SegmentBuffers::kMixed, p)));
    }
  }
  ++mixed_;
  return ffi::Error::Success();
}

// Step 3: results.

bool HierarchicalExchange::PublishResult() {
  if (!results_channel_ || published_results_ == mixed_) return false;
  // Null until all peers have read the chunk before in this slot.
  std::byte* to = channels().Place(*results_channel_, published_results_);
  if (to == nullptr) return false;
  std::memcpy(to, buffers_.of(published_results_).mixed,
              segments_.Size(published_results_, me_));
  channels().Publish(*results_channel_, published_results_);
  ++published_results_;
  return true;
}

const std::byte* HierarchicalExchange::FindResult(const Peer& peer) const {
  return channels().Find(RankInRoot(peer), *peer.results, gathered_);
}

// Copies the result of a peer to the output, if it has arrived. The peer
// computed it from this rank's input, so it has received that input, and the
// output may overwrite it.
bool HierarchicalExchange::TakeResult(std::size_t p) {
  Peer& peer = peers_[p];
  if (gathered_ == segments_.size() || peer.taken) return false;
  const SegmentBuffers::InFlight& buffers = buffers_.of(gathered_);
  const std::byte* bytes = buffers.results + p * buffers_.stride();
  if (peer.results) {
    bytes = FindResult(peer);
    if (bytes == nullptr) return false;
  } else if (!buffers.has_result[p]) {
    return false;
  }
  leaves().CopyIn(segments_.Begin(gathered_, peer.part),
                  segments_.End(gathered_, peer.part), bytes);
  if (peer.results) {
    channels().Done(RankInRoot(peer), *peer.results, gathered_);
  }
  peer.taken = true;
  return true;
}

// Whether segment `gathered_` is complete and its buffers can be reused: all
// results are taken, and MPI and `PublishResult` read none of its buffers.
bool HierarchicalExchange::IsGathered() const {
  if (gathered_ == mixed_ || buffers_.of(gathered_).sends_left > 0) {
    return false;
  }
  if (results_channel_ && published_results_ <= gathered_) return false;
  return std::all_of(peers_.begin(), peers_.end(),
                     [](const Peer& peer) { return peer.taken; });
}

// Starts the segment that uses the same buffers next.
ffi::Error HierarchicalExchange::EndSegment() {
  for (Peer& peer : peers_) peer.taken = false;
  const std::size_t next = gathered_++ + buffers_.num_in_flight();
  if (next >= segments_.size()) return ffi::Error::Success();
  // Receives first, so that messages find them posted.
  JFOG_RETURN_IF_ERROR(ReceiveSegment(next));
  return SendInputs(next);
}

// End and stalls.

// After an error the channels stay claimed: a peer may never read the chunks.
void HierarchicalExchange::Ended() {
  tags_.Leave();
  if (error().failure()) return;
  if (inputs_channel_) channels().Release(*inputs_channel_);
  if (results_channel_) channels().Release(*results_channel_);
}

std::vector<int> HierarchicalExchange::Missing() const {
  std::vector<int> missing;
  for (std::size_t slot = 0; slot < slots(); ++slot) {
    if (is_pending(slot)) missing.push_back(RankOfSlot(slot));
  }
  // Peers that have not read this rank's chunks.
  const auto add_behind = [&](const Channels::Claim& claim, std::size_t chunk) {
    const std::vector<int> behind = channels().Behind(claim, chunk);
    for (const Peer& peer : peers_) {
      if (std::count(behind.begin(), behind.end(), RankInRoot(peer)) > 0) {
        missing.push_back(peer.rank);
      }
    }
  };
  if (inputs_channel_ && published_inputs_ < InputChunks()) {
    add_behind(*inputs_channel_, published_inputs_);
  }
  if (results_channel_ && published_results_ < mixed_) {
    add_behind(*results_channel_, published_results_);
  }
  // Peers that have not published theirs.
  for (const Peer& peer : peers_) {
    if (unchecked_ > 0) break;
    const bool has_input = !peer.inputs || peer.next_input == InputChunks() ||
                           FindInput(peer) != nullptr;
    const bool has_result = !peer.results || gathered_ == segments_.size() ||
                            peer.taken || FindResult(peer) != nullptr;
    if (!has_input || !has_result) missing.push_back(peer.rank);
  }
  std::sort(missing.begin(), missing.end());
  missing.erase(std::unique(missing.begin(), missing.end()), missing.end());
  return missing;
}

int HierarchicalExchange::RankOfSlot(std::size_t slot) const {
  const SegmentBuffers::Message message = buffers_.Decode(slot);
  switch (message.kind) {
    case SegmentBuffers::kHeader:
      return RankOfHeader(message.index);
    case SegmentBuffers::kSentHeader:
      return message.index < peers_.size()
                 ? peers_[message.index].rank
                 : round_.destinations[message.index - peers_.size()];
    case SegmentBuffers::kMeans:
      return round_.sources[message.index];
    case SegmentBuffers::kMean:
      return round_.destinations[message.index];
    default:
      return peers_[message.index].rank;
  }
}

}  // namespace jfog::mpi
