// Averages inside machines and between them, every link carrying its share.
#include "mpi/hierarchical.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "common/weighted_sum.h"
#include "mpi/buffer_pool.h"
#include "mpi/call.h"
#include "mpi/operation.h"
#include "mpi/plan.h"
#include "mpi/shared_memory_channel.h"
#include "mpi/wire_format.h"

namespace jfog::mpi {
namespace {

using Ints = ffi::Span<const std::int32_t>;

constexpr const char* kName = "hierarchical_neighbor_allreduce";

// The payload is cut into segments, and every segment into one part for each
// rank of the machine. With m the mean of a part over the machine,
//
//   1. every rank gets its own part from the other ranks of its machine, and
//      computes m;
//   2. sends m to the same local rank of the neighboring machines, gets theirs,
//      and computes the weighted sum;
//   3. and gives that to the other ranks of its machine.
//
// Several segments are under way at a time, each in its own step, so the links
// inside a machine and between machines are busy together. What ranks of one
// machine give each other goes through lanes where they are free: in step 1 a
// chunk for each part but the sender's own, in step 3 one for each segment.
//
// Results may lie in the place of the input: a part is overwritten when all who
// need it have got it.
class Hierarchical : public Operation {
 public:
  // `members` are the ranks of this machine, `round` speaks of ranks.
  Hierarchical(std::shared_ptr<Communicator> comm, Payload leaves,
               std::uint64_t variant, const std::vector<int>& members,
               Round round)
      : Operation(std::move(comm), kName, std::move(leaves), variant),
        round_(std::move(round)),
        parts_(members.size()) {
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
    mean_terms_.assign(peers_.size(), {nullptr, 1.0 / parts_});
    for (double weight : round_.source_weights) {
      mix_terms_.push_back({nullptr, weight});
    }
    CutPayload();
    AllocateWindows();
    std::vector<int> sharing;
    if (!is_short_ && this->comm().lanes() != nullptr) {
      for (const Peer& peer : peers_) {
        const int rank = InRoot(peer);
        if (this->comm().lanes()->Reaches(rank)) sharing.push_back(rank);
      }
    }
    shares_ = !sharing.empty() && sharing.size() == peers_.size();
    readers_ = std::move(sharing);
  }

 private:
  static constexpr std::size_t kWindows = 4;

  // Another rank of this machine.
  struct Peer {
    int rank = 0;
    std::size_t part = 0;  // its place on the machine
    // Where its inputs, and its results, lie, if not in messages.
    std::optional<Lanes::Claim> inputs, results;
    std::size_t looked = 0;  // the first chunk of its inputs not dealt with
    bool taken = false;      // its result of the segment that is gathered now
  };

  // The buffers and open messages of a segment.
  struct Window {
    std::byte* inputs = nullptr;   // of this rank's part, from every peer
    std::byte* packed = nullptr;   // input for every peer
    std::byte* mean = nullptr;     // of this rank's part
    std::byte* means = nullptr;    // from every source
    std::byte* mixed = nullptr;    // this rank's part of the result
    std::byte* results = nullptr;  // from every peer
    std::size_t inputs_left = 0;
    std::size_t means_left = 0;
    std::size_t sends_left = 0;
    std::vector<bool> has_result;  // by peer
  };

  // What a request stands for; in a window those of one kind lie together.
  enum Kind { kInput, kPacked, kMeans, kMean, kResults, kMixed, kKinds };

  // Every edge is opened by a header. It carries the input of a short
  // operation, or the claim of the lane of results.
  static constexpr std::size_t kOpening = kEnvelope;

  // The cut of the payload.

  void CutPayload() {
    const Payload& whole = leaves();
    const std::size_t end =
        whole.size() == 0
            ? 0
            : whole[whole.size() - 1].offset + whole[whole.size() - 1].bytes();
    is_short_ = end <= kShort;
    const std::size_t length =
        is_short_ ? std::max<std::size_t>(end, 1) : parts_ * kChunk;
    segments_ = std::max<std::size_t>(1, (end + length - 1) / length);
    cuts_.reserve(segments_ * parts_ + 1);
    own_bytes_.assign(parts_, 0);
    for (std::size_t s = 0; s < segments_; ++s) {
      const std::size_t first = s * length;
      const std::size_t last = std::min(first + length, end);
      for (std::size_t k = 0; k < parts_; ++k) {
        std::size_t cut = whole.Cut(first, last, k, parts_);
        if (!is_short_) {
          // No part is longer than a chunk.
          const std::size_t behind = (parts_ - k) * kChunk;
          const std::size_t round = RoundUp(last);
          cut = std::min(cut, first + k * kChunk);
          if (round > first + behind) cut = std::max(cut, round - behind);
        }
        cuts_.push_back(cut);
      }
    }
    cuts_.push_back(end);
    for (std::size_t s = 0; s < segments_; ++s) {
      for (std::size_t k = 0; k < parts_; ++k) {
        own_bytes_[k] += whole.BytesIn(Begin(s, k), End(s, k));
        longest_ = std::max(longest_, End(s, k) - Begin(s, k));
      }
    }
  }

  std::size_t Begin(std::size_t segment, std::size_t part) const {
    return cuts_[segment * parts_ + part];
  }
  std::size_t End(std::size_t segment, std::size_t part) const {
    return cuts_[segment * parts_ + part + 1];
  }
  std::size_t Size(std::size_t segment, std::size_t part) const {
    return End(segment, part) - Begin(segment, part);
  }

  // Memory and requests.

  void AllocateWindows() {
    const std::size_t stride = RoundUp(std::max<std::size_t>(longest_, 1));
    stride_ = stride;
    const std::size_t peers = peers_.size();
    const std::size_t sources = round_.sources.size();
    const std::size_t openings = kOpening * (peers + sources);
    const std::size_t opened =
        RoundUp(peers * (sizeof(Header) +
                         (is_short_ ? longest_ : sizeof(Lanes::Claim))) +
                sizeof(Header));
    const std::size_t windows = std::min(kWindows, segments_);
    const std::size_t of_window = stride * (3 * peers + 2 + sources);
    buffer_ = Buffer(openings + opened + windows * of_window);
    openings_ = buffer_.get();
    opened_ = openings_ + openings;
    std::byte* next = opened_ + opened;
    const auto take = [&](std::size_t count) {
      return std::exchange(next, next + count * stride);
    };
    for (std::size_t w = 0; w < windows; ++w) {
      Window& window = windows_[w];
      window.inputs = take(peers);
      window.packed = take(peers);
      window.mean = take(1);
      window.means = take(sources);
      window.mixed = take(1);
      window.results = take(peers);
      window.has_result.assign(peers, false);
    }
    const std::size_t destinations = round_.destinations.size();
    const std::size_t counts[kKinds] = {peers,        peers, sources,
                                        destinations, peers, peers};
    per_window_ = 0;
    for (int kind = 0; kind < kKinds; ++kind) {
      kind_begin_[kind] = per_window_;
      per_window_ += counts[kind];
    }
    kind_begin_[kKinds] = per_window_;
    first_opened_ = peers + sources;
    first_window_ = first_opened_ + peers + destinations;
    Resize(first_window_ + windows * per_window_);
  }

  Window& WindowOf(std::size_t segment) { return windows_[segment % kWindows]; }
  MPI_Request* SlotOf(std::size_t segment, Kind kind, std::size_t index) {
    return Slot(first_window_ + segment % kWindows * per_window_ +
                kind_begin_[kind] + index);
  }
  // Inputs and means share a tag, for they come from different ranks.
  int tag(Kind kind) const {
    const int number = static_cast<int>(sequence() % kChunkTags);
    return kind == kResults || kind == kMixed ? kSecondTag + number
                                              : kChunkTag + number;
  }
  int InRoot(const Peer& peer) const { return comm().RankInRoot(peer.rank); }

  ffi::Error Send(const void* bytes, std::size_t count, int rank, int tag,
                  MPI_Request* request) {
    JFOG_MPI_RETURN_IF_ERROR(MPI_Isend(bytes, static_cast<int>(count), MPI_BYTE,
                                       rank, tag, comm().comm(), request));
    return ffi::Error::Success();
  }
  ffi::Error Receive(void* bytes, std::size_t count, int rank, int tag,
                     MPI_Request* request) {
    JFOG_MPI_RETURN_IF_ERROR(MPI_Irecv(bytes, static_cast<int>(count), MPI_BYTE,
                                       rank, tag, comm().comm(), request));
    return ffi::Error::Success();
  }

  // The start: a header to everybody.

  ffi::Error Post() override {
    for (const Peer& peer : peers_) {
      comm().CountSent(peer.rank, own_bytes_[peer.part] + own_bytes_[me_]);
    }
    for (int destination : round_.destinations) {
      comm().CountSent(destination, own_bytes_[me_]);
    }
    if (shares_) {
      inputs_lane_ = comm().lanes()->Acquire(readers_, InputChunks());
      results_lane_ = comm().lanes()->Acquire(readers_, segments_);
    }
    unchecked_ = peers_.size() + round_.sources.size();
    std::byte* to = openings_;
    for (std::size_t e = 0; e < unchecked_; ++e, to += kOpening) {
      JFOG_RETURN_IF_ERROR(
          Receive(to, kOpening, RankOfOpening(e), kEnvelopeTag, Slot(e)));
    }
    JFOG_RETURN_IF_ERROR(SendOpenings());
    for (std::size_t s = 0; s < std::min(kWindows, segments_); ++s) {
      JFOG_RETURN_IF_ERROR(SendInputs(s));
      // Nothing opens the segments of a rank that is alone.
      if (unchecked_ == 0) JFOG_RETURN_IF_ERROR(ReceiveSegment(s));
    }
    return ffi::Error::Success();
  }

  int RankOfOpening(std::size_t e) const {
    return e < peers_.size() ? peers_[e].rank
                             : round_.sources[e - peers_.size()];
  }

  ffi::Error SendOpenings() {
    Header header = MakeHeader(leaves().payload_bytes);
    std::byte* to = opened_;
    // Machines hear nothing of lanes.
    std::memcpy(to, &header, sizeof(header));
    for (std::size_t d = 0; d < round_.destinations.size(); ++d) {
      JFOG_RETURN_IF_ERROR(Send(to, sizeof(header), round_.destinations[d],
                                kEnvelopeTag,
                                Slot(first_opened_ + peers_.size() + d)));
    }
    to += sizeof(header);
    if (inputs_lane_) {
      header.lane = inputs_lane_->lane;
      header.stamp = inputs_lane_->stamp;
    }
    const Lanes::Claim results = results_lane_.value_or(Lanes::Claim{});
    for (std::size_t p = 0; p < peers_.size(); ++p) {
      std::memcpy(to, &header, sizeof(header));
      std::size_t size = sizeof(header);
      if (is_short_) {
        const std::size_t part = peers_[p].part;
        PackInput(Begin(0, part), End(0, part), to + size);
        size += Size(0, part);
      } else {
        std::memcpy(to + size, &results, sizeof(results));
        size += sizeof(results);
      }
      JFOG_RETURN_IF_ERROR(Send(to, size, peers_[p].rank, kEnvelopeTag,
                                Slot(first_opened_ + p)));
      to += size;
    }
    return ffi::Error::Success();
  }

  ffi::Error Completed(std::size_t slot) override {
    if (slot < first_opened_) return Opened(slot);
    if (slot < first_window_) return ffi::Error::Success();
    slot -= first_window_;
    Window& window = windows_[slot / per_window_];
    const std::size_t at = slot % per_window_;
    int kind = 0;
    while (at >= kind_begin_[kind + 1]) ++kind;
    switch (kind) {
      case kInput:
        --window.inputs_left;
        break;
      case kMeans:
        --window.means_left;
        break;
      case kResults:
        window.has_result[at - kind_begin_[kind]] = true;
        break;
      default:
        --window.sends_left;
    }
    return ffi::Error::Success();
  }

  ffi::Error Opened(std::size_t e) {
    Header theirs;
    const std::byte* from = openings_ + e * kOpening;
    std::memcpy(&theirs, from, sizeof(theirs));
    JFOG_RETURN_IF_ERROR(CheckHeader(RankOfOpening(e), theirs));
    if (e < peers_.size()) {
      Peer& peer = peers_[e];
      comm().CountReceived(peer.rank, own_bytes_[me_] + own_bytes_[peer.part]);
      if (!is_short_ && shares_) {
        if (theirs.stamp != 0) {
          peer.inputs = Lanes::Claim{theirs.lane, theirs.stamp};
        }
        Lanes::Claim results;
        std::memcpy(&results, from + sizeof(theirs), sizeof(results));
        if (results.stamp != 0) peer.results = results;
      }
    } else {
      comm().CountReceived(RankOfOpening(e), own_bytes_[me_]);
    }
    if (--unchecked_ > 0) return ffi::Error::Success();
    for (std::size_t s = 0; s < std::min(kWindows, segments_); ++s) {
      JFOG_RETURN_IF_ERROR(ReceiveSegment(s));
    }
    return ffi::Error::Success();
  }

  // The messages of a segment.

  ffi::Error SendInputs(std::size_t segment) {
    if (is_short_ || inputs_lane_) return ffi::Error::Success();
    Window& window = WindowOf(segment);
    std::byte* to = window.packed;
    for (std::size_t p = 0; p < peers_.size(); ++p, to += stride_) {
      const std::size_t part = peers_[p].part;
      PackInput(Begin(segment, part), End(segment, part), to);
      ++window.sends_left;
      JFOG_RETURN_IF_ERROR(Send(to, Size(segment, part), peers_[p].rank,
                                tag(kPacked), SlotOf(segment, kPacked, p)));
    }
    return ffi::Error::Success();
  }

  ffi::Error ReceiveSegment(std::size_t segment) {
    Window& window = WindowOf(segment);
    for (std::size_t p = 0; p < peers_.size(); ++p) {
      const Peer& peer = peers_[p];
      if (!is_short_ && !peer.inputs) {
        ++window.inputs_left;
        JFOG_RETURN_IF_ERROR(Receive(window.inputs + p * stride_,
                                     Size(segment, me_), peer.rank, tag(kInput),
                                     SlotOf(segment, kInput, p)));
      }
      window.has_result[p] = false;
      if (!peer.results) {
        JFOG_RETURN_IF_ERROR(
            Receive(window.results + p * stride_, Size(segment, peer.part),
                    peer.rank, tag(kResults), SlotOf(segment, kResults, p)));
      }
    }
    for (std::size_t s = 0; s < round_.sources.size(); ++s) {
      ++window.means_left;
      JFOG_RETURN_IF_ERROR(Receive(window.means + s * stride_,
                                   Size(segment, me_), round_.sources[s],
                                   tag(kMeans), SlotOf(segment, kMeans, s)));
    }
    return ffi::Error::Success();
  }

  // What moves without a message of its own.

  bool is_waiting() const override {
    if (gathered_ < segments_) return true;
    if (inputs_lane_ && published_ < InputChunks()) return true;
    return std::any_of(peers_.begin(), peers_.end(), [&](const Peer& peer) {
      return peer.inputs && peer.looked < InputChunks();
    });
  }

  ffi::Error Resume(bool* moved) override {
    for (bool any = true; any;) {
      any = PublishInput();
      if (unchecked_ == 0) {
        for (Peer& peer : peers_) any |= SkipInputs(peer);
        if (HasInputs()) {
          JFOG_RETURN_IF_ERROR(TakeMean());
          any = true;
        }
        if (mixed_ < averaged_ && WindowOf(mixed_).means_left == 0) {
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

  // Chunks of inputs: of every segment the parts but the sender's own.
  std::size_t InputChunks() const { return segments_ * peers_.size(); }
  std::size_t PartOfChunk(std::size_t chunk, std::size_t sender) const {
    const std::size_t k = chunk % peers_.size();
    return k < sender ? k : k + 1;
  }

  bool PublishInput() {
    if (!inputs_lane_ || published_ == InputChunks()) return false;
    std::byte* to = comm().lanes()->Place(*inputs_lane_, published_);
    if (to == nullptr) return false;
    const std::size_t segment = published_ / peers_.size();
    const std::size_t part = PartOfChunk(published_, me_);
    PackInput(Begin(segment, part), End(segment, part), to);
    comm().lanes()->Publish(*inputs_lane_, published_);
    ++published_;
    return true;
  }

  // The chunk of a peer that is looked for; null while it has not come.
  const std::byte* Input(const Peer& peer) const {
    return comm().lanes()->Find(InRoot(peer), *peer.inputs, peer.looked);
  }

  // What a peer publishes for others.
  bool SkipInputs(Peer& peer) {
    bool any = false;
    while (peer.inputs && peer.looked < InputChunks() &&
           PartOfChunk(peer.looked, peer.part) != me_ &&
           Input(peer) != nullptr) {
      comm().lanes()->Done(InRoot(peer), *peer.inputs, peer.looked);
      ++peer.looked;
      any = true;
    }
    return any;
  }

  // Whether this rank's part of the next segment has come from all peers.
  bool HasInputs() {
    if (averaged_ == std::min(segments_, gathered_ + kWindows)) return false;
    const Window& window = WindowOf(averaged_);
    if (window.inputs_left > 0) return false;
    for (std::size_t p = 0; p < peers_.size(); ++p) {
      const Peer& peer = peers_[p];
      const std::byte* bytes = window.inputs + p * stride_;
      if (is_short_) {
        bytes = openings_ + p * kOpening + sizeof(Header);
      } else if (peer.inputs) {
        if (peer.looked / peers_.size() != averaged_ ||
            PartOfChunk(peer.looked, peer.part) != me_) {
          return false;
        }
        bytes = Input(peer);
        if (bytes == nullptr) return false;
      }
      mean_terms_[p].values = bytes;
    }
    return true;
  }

  ffi::Error TakeMean() {
    Window& window = WindowOf(averaged_);
    std::vector<Term> terms = mean_terms_;
    leaves().ForEachRun(
        Begin(averaged_, me_), End(averaged_, me_),
        [&](const Leaf& leaf, std::size_t first, std::size_t count,
            std::size_t at) {
          for (std::size_t p = 0; p < terms.size(); ++p) {
            terms[p].values =
                static_cast<const std::byte*>(mean_terms_[p].values) + at;
          }
          WeightedSum(leaf.type, count, leaf.input + first * SizeOf(leaf.type),
                      1.0, terms, /*difference=*/true, window.mean + at);
        });
    for (Peer& peer : peers_) {
      if (!peer.inputs) continue;
      comm().lanes()->Done(InRoot(peer), *peer.inputs, peer.looked);
      ++peer.looked;
    }
    for (std::size_t d = 0; d < round_.destinations.size(); ++d) {
      ++window.sends_left;
      JFOG_RETURN_IF_ERROR(Send(window.mean, Size(averaged_, me_),
                                round_.destinations[d], tag(kMean),
                                SlotOf(averaged_, kMean, d)));
    }
    ++averaged_;
    return ffi::Error::Success();
  }

  ffi::Error Mix() {
    Window& window = WindowOf(mixed_);
    std::vector<Term> terms = mix_terms_;
    leaves().ForEachRun(
        Begin(mixed_, me_), End(mixed_, me_),
        [&](const Leaf& leaf, std::size_t first, std::size_t count,
            std::size_t at) {
          for (std::size_t s = 0; s < terms.size(); ++s) {
            terms[s].values = window.means + s * stride_ + at;
          }
          WeightedSum(leaf.type, count, window.mean + at, round_.self_weight,
                      terms, round_.difference, window.mixed + at);
          std::memcpy(leaf.output + first * SizeOf(leaf.type),
                      window.mixed + at, count * SizeOf(leaf.type));
        });
    if (!results_lane_) {
      for (std::size_t p = 0; p < peers_.size(); ++p) {
        ++window.sends_left;
        JFOG_RETURN_IF_ERROR(Send(window.mixed, Size(mixed_, me_),
                                  peers_[p].rank, tag(kMixed),
                                  SlotOf(mixed_, kMixed, p)));
      }
    }
    ++mixed_;
    return ffi::Error::Success();
  }

  bool PublishResult() {
    if (!results_lane_ || shown_ == mixed_) return false;
    std::byte* to = comm().lanes()->Place(*results_lane_, shown_);
    if (to == nullptr) return false;
    std::memcpy(to, WindowOf(shown_).mixed, Size(shown_, me_));
    comm().lanes()->Publish(*results_lane_, shown_);
    ++shown_;
    return true;
  }

  bool TakeResult(std::size_t p) {
    Peer& peer = peers_[p];
    if (gathered_ == segments_ || peer.taken) return false;
    const Window& window = WindowOf(gathered_);
    const std::byte* bytes = window.results + p * stride_;
    if (peer.results) {
      bytes = comm().lanes()->Find(InRoot(peer), *peer.results, gathered_);
      if (bytes == nullptr) return false;
    } else if (!window.has_result[p]) {
      return false;
    }
    leaves().ForEachRun(Begin(gathered_, peer.part), End(gathered_, peer.part),
                        [&](const Leaf& leaf, std::size_t first,
                            std::size_t count, std::size_t at) {
                          const std::size_t width = SizeOf(leaf.type);
                          std::memcpy(leaf.output + first * width, bytes + at,
                                      count * width);
                        });
    if (peer.results) {
      comm().lanes()->Done(InRoot(peer), *peer.results, gathered_);
    }
    peer.taken = true;
    return true;
  }

  bool IsGathered() {
    if (gathered_ == mixed_ || WindowOf(gathered_).sends_left > 0) return false;
    if (results_lane_ && shown_ <= gathered_) return false;
    return std::all_of(peers_.begin(), peers_.end(),
                       [](const Peer& peer) { return peer.taken; });
  }

  ffi::Error EndSegment() {
    for (Peer& peer : peers_) peer.taken = false;
    const std::size_t next = gathered_++ + kWindows;
    if (next >= segments_) return ffi::Error::Success();
    JFOG_RETURN_IF_ERROR(ReceiveSegment(next));
    return SendInputs(next);
  }

  void PackInput(std::size_t begin, std::size_t end, std::byte* to) const {
    leaves().ForEachRun(begin, end,
                        [&](const Leaf& leaf, std::size_t first,
                            std::size_t count, std::size_t at) {
                          const std::size_t width = SizeOf(leaf.type);
                          std::memcpy(to + at, leaf.input + first * width,
                                      count * width);
                        });
  }

  // The end.

  void Ended() override {
    if (error().failure()) return;
    if (inputs_lane_) comm().lanes()->Release(*inputs_lane_);
    if (results_lane_) comm().lanes()->Release(*results_lane_);
  }

  void Leak() override { buffer_.Leak(); }

  std::vector<int> Missing() const override {
    std::vector<int> missing;
    for (std::size_t slot = 0; slot < slots(); ++slot) {
      if (is_pending(slot)) missing.push_back(RankOfSlot(slot));
    }
    const auto add_behind = [&](const Lanes::Claim& claim, std::size_t chunk) {
      const std::vector<int> behind = comm().lanes()->Behind(claim, chunk);
      for (const Peer& peer : peers_) {
        if (std::count(behind.begin(), behind.end(), InRoot(peer)) > 0) {
          missing.push_back(peer.rank);
        }
      }
    };
    if (inputs_lane_ && published_ < InputChunks()) {
      add_behind(*inputs_lane_, published_);
    }
    if (results_lane_ && shown_ < mixed_) add_behind(*results_lane_, shown_);
    for (const Peer& peer : peers_) {
      if (unchecked_ > 0) break;
      const bool has_input = !peer.inputs || peer.looked == InputChunks() ||
                             Input(peer) != nullptr;
      const bool has_result = !peer.results || gathered_ == segments_ ||
                              peer.taken ||
                              comm().lanes()->Find(InRoot(peer), *peer.results,
                                                   gathered_) != nullptr;
      if (!has_input || !has_result) missing.push_back(peer.rank);
    }
    std::sort(missing.begin(), missing.end());
    missing.erase(std::unique(missing.begin(), missing.end()), missing.end());
    return missing;
  }

  int RankOfSlot(std::size_t slot) const {
    if (slot < first_opened_) return RankOfOpening(slot);
    slot -= first_opened_;
    if (slot < peers_.size()) return peers_[slot].rank;
    if (slot < first_window_ - first_opened_) {
      return round_.destinations[slot - peers_.size()];
    }
    slot = (slot + first_opened_ - first_window_) % per_window_;
    int kind = 0;
    while (slot >= kind_begin_[kind + 1]) ++kind;
    const std::size_t index = slot - kind_begin_[kind];
    if (kind == kMeans) return round_.sources[index];
    if (kind == kMean) return round_.destinations[index];
    return peers_[index].rank;
  }

  const Round round_;
  const std::size_t parts_;  // ranks of the machine
  std::size_t me_ = 0;       // this rank's place among them
  std::vector<Peer> peers_;
  std::vector<int> readers_;  // the peers, in the root
  bool shares_ = false;       // lanes reach all of them
  std::vector<Term> mean_terms_, mix_terms_;

  bool is_short_ = false;
  std::size_t segments_ = 1;
  std::vector<std::size_t> cuts_;       // [segment * parts_ + part]
  std::vector<std::size_t> own_bytes_;  // of each part, over all segments
  std::size_t longest_ = 0;             // part
  std::size_t stride_ = 0;

  // Segments that have got through a step.
  std::size_t averaged_ = 0;
  std::size_t mixed_ = 0;
  std::size_t gathered_ = 0;
  std::size_t unchecked_ = 0;  // ranks whose header has not come
  std::optional<Lanes::Claim> inputs_lane_, results_lane_;
  std::size_t published_ = 0;  // chunks of inputs
  std::size_t shown_ = 0;      // chunks of results

  Buffer buffer_;
  std::byte* openings_ = nullptr;
  std::byte* opened_ = nullptr;
  Window windows_[kWindows];
  std::size_t kind_begin_[kKinds + 1] = {};
  std::size_t per_window_ = 0;
  std::size_t first_opened_ = 0;  // request
  std::size_t first_window_ = 0;
};

struct HierarchicalPlan : Plan {
  std::vector<int> members;
};

ffi::ErrorOr<std::shared_ptr<Plan>> MakePlan(
    const ffi::Dictionary& attributes) {
  auto plan = std::make_shared<HierarchicalPlan>();
  ffi::Error error = ReadPlan(attributes, kName, plan.get());
  if (error.failure()) return ffi::Unexpected(std::move(error));
  const auto members = attributes.get<Ints>("members");
  if (!members) return ffi::Unexpected(members.error());
  plan->members.assign(members->begin(), members->end());
  return std::shared_ptr<Plan>(std::move(plan));
}

Completion HierarchicalImpl(ffi::Token, ffi::BufferR0<ffi::S32> step,
                            ffi::RemainingArgs args, ffi::Result<ffi::Token>,
                            ffi::RemainingRets results,
                            ffi::Dictionary attributes) {
  JFOG_ASSIGN_OR_RETURN(
      found, FindPlan(attributes, [&] { return MakePlan(attributes); }));
  const auto& plan = static_cast<const HierarchicalPlan&>(*found);
  JFOG_RETURN_IF_ERROR(CheckReady(plan.comm.get(), kName));
  const std::int64_t at = *step.typed_data();
  JFOG_ASSIGN_OR_RETURN(round, plan.At(at));
  found->Agree();
  JFOG_ASSIGN_OR_RETURN(leaves, ReadCall(args, 0, results, plan.mode));
  JFOG_RETURN_IF_ERROR(CheckWeighable(leaves, kName));
  if (plan.mode == kStart) leaves.Stage();
  return Launch(
      std::make_shared<Hierarchical>(plan.comm, std::move(leaves),
                                     Mix(plan.graph, at), plan.members, *round),
      results, plan.mode);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    HierarchicalNeighborAllreduce, HierarchicalImpl,
    ffi::Ffi::Bind()
        .Arg<ffi::Token>()               // order in
        .Arg<ffi::BufferR0<ffi::S32>>()  // step, already modulo the period
        .RemainingArgs()                 // leaves
        .Ret<ffi::Token>()               // order out
        .RemainingRets()                 // leaves like the operands, or handle
        .Attrs());                       // see MakePlan

}  // namespace jfog::mpi
