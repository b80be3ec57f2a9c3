// Point-to-point exchange with neighbors, in chunks.
#include "mpi/exchange.h"

#include <algorithm>
#include <cstring>

#include "common/cache_line.h"
#include "mpi/wire_format.h"

namespace jfog::mpi {
namespace {

// The longest short payload where all ranks share memory and there are no
// mailboxes: longer ones are faster through a channel.
constexpr std::size_t kShortShared = 512;

}  // namespace

Exchange::Exchange(std::shared_ptr<Communicator> comm, const char* name,
                   Payload leaves, std::uint64_t variant, Edges edges)
    : Operation(std::move(comm), name, std::move(leaves), variant),
      edges_(std::move(edges)),
      payload_(this->leaves().payload_bytes),
      source_channels_(sources().size()),
      sent_mail_(destinations().size()),
      received_mail_(sources().size()),
      parts_(sources().size()) {
  if (edges_.source_bytes.empty()) {
    edges_.source_bytes.assign(sources().size(), payload_);
  }
  if (edges_.destination_bytes.empty()) {
    edges_.destination_bytes.assign(destinations().size(), payload_);
  }
  std::size_t longest = 0;
  for (std::size_t bytes : edges_.source_bytes) {
    longest = std::max(longest, bytes);
  }
  for (std::size_t bytes : edges_.destination_bytes) {
    longest = std::max(longest, bytes);
  }
  chunks_ = ChunksOf(longest);
  own_chunks_ = ChunksOf(payload_);
  stride_ = chunks_ == 1 ? AlignUp(sizeof(Header) + longest)
                         : std::max(kChunk, kEnvelope);
  buffer_pairs_.resize(PairsNeeded());
  Resize(buffer_pairs_.size() * (sources().size() + destinations().size()));
  if (own_chunks_ > 1 && edges_.same_payload &&
      this->comm().channels() != nullptr) {
    for (int destination : destinations()) {
      const int rank = this->comm().RankInRoot(destination);
      if (this->comm().channels()->Reaches(rank)) readers_.push_back(rank);
    }
  }
  waits_for_memory_ = chunks_ == 1;
  for (std::size_t s = 0; s < sources().size(); ++s) {
    received_mail_[s].is_used =
        UsesMailbox(sources()[s], edges_.source_bytes[s]);
    waits_for_memory_ = waits_for_memory_ && received_mail_[s].is_used;
  }
  for (std::size_t d = 0; d < destinations().size(); ++d) {
    sent_mail_[d].is_used =
        UsesMailbox(destinations()[d], edges_.destination_bytes[d]);
    waits_for_memory_ = waits_for_memory_ && sent_mail_[d].is_used;
  }
  ComputeOffsets();
  EnterTags();
}

void Exchange::EnterTags() {
  if (chunks_ > 1 || edges_.is_followup) {
    tags_.Enter(comm().tags(), sequence());
  }
}

std::size_t Exchange::PairsNeeded() const {
  const auto is_far = [this](int rank) {
    const Channels* channels = comm().channels();
    return channels == nullptr || !channels->Reaches(comm().RankInRoot(rank));
  };
  const bool has_far =
      std::any_of(sources().begin(), sources().end(), is_far) ||
      std::any_of(destinations().begin(), destinations().end(), is_far);
  return std::min(chunks_, has_far ? comm().chunks_in_flight() : kNearPairs);
}

// Both ends of an edge decide by the same values, machine and length. A later
// round starts out of program order, in which mail is numbered.
bool Exchange::UsesMailbox(int rank, std::size_t bytes) const {
  return comm().mailboxes() != nullptr && !edges_.is_followup &&
         mailboxes().Reaches(rank) && Begin(bytes, 1) <= Mailboxes::kPayload;
}

void Exchange::ComputeOffsets() {
  consumed_ = 0;
  lost_from_.clear();
  published_ = own_chunks_;
  unchecked_ = sources().size();
  if (buffer_ || waits_for_memory_) return;
  const std::size_t sends =
      edges_.same_payload ? std::min<std::size_t>(destinations().size(), 1)
                          : destinations().size();
  // The sent header and payload have their exact size, but a rank that
  // disagrees may send a whole envelope.
  const std::size_t pair =
      sends * stride_ + sources().size() * std::max(stride_, kEnvelope);
  buffer_ = Buffer(pair * buffer_pairs_.size());
  std::byte* next = buffer_.get();
  for (BufferPair& buffers : buffer_pairs_) {
    buffers.sent = next;
    buffers.received = next + sends * stride_;
    next += pair;
  }
}

void Exchange::Renew() {
  // Large buffers return to the pool between calls, for other operations.
  if (chunks_ > 1) buffer_ = Buffer();
  ComputeOffsets();
  Operation::Renew();
  EnterTags();
}

// Depends on the length of the edge alone, so both ends cut it equally.
std::size_t Exchange::ChunksOf(std::size_t bytes) const {
  const std::size_t limit = !comm().shares_memory() ? kShort
                            : !comm().mailboxes()   ? kShortShared
                                                    : Mailboxes::kPayload;
  return bytes <= limit ? 1 : 1 + (bytes + kChunk - 1) / kChunk;
}

std::size_t Exchange::Begin(std::size_t bytes, std::size_t chunk) const {
  if (chunk == 0) return 0;
  if (ChunksOf(bytes) == 1) return bytes;
  return std::min((chunk - 1) * kChunk, bytes);
}

int Exchange::tag(std::size_t chunk) const {
  const int number = comm().tags().NumberOf(sequence());
  if (chunk > 0) return kChunkTag + number;
  return edges_.is_followup ? kSecondTag + number : kEnvelopeTag;
}

Header Exchange::Envelope() const {
  Header header = this->header();
  if (channel_) {
    header.channel = channel_->channel;
    header.stamp = channel_->stamp;
    header.check = CheckWithClaim(header.check, header);
  }
  return header;
}

// Every edge has one request slot per buffer pair: sources, then destinations.
std::size_t Exchange::FirstSlot(std::size_t chunk) const {
  return chunk % buffer_pairs_.size() *
         (sources().size() + destinations().size());
}

ffi::Error Exchange::Post() {
  for (std::size_t d = 0; d < destinations().size(); ++d) {
    CountSent(destinations()[d], CountOfDestination(d));
  }
  // Without edges there are no messages to wait for.
  if (sources().empty() && destinations().empty()) {
    consumed_ = chunks_;
    Phase phase(trace(), this->phase());
    return Consume(0, payload_, parts_);
  }
  if (!readers_.empty()) {
    channel_ = comm().channels()->Acquire(readers_, own_chunks_);
    if (channel_) published_ = 1;
  }
  for (std::size_t s = 0; s < sources().size(); ++s) {
    Mail& mail = received_mail_[s];
    if (!mail.is_used) continue;
    mail = {true, true, mailboxes().NextReceived(sources()[s])};
    ++unread_;
  }
  for (std::size_t d = 0; d < destinations().size(); ++d) {
    Mail& mail = sent_mail_[d];
    if (!mail.is_used) continue;
    mail = {true, true, mailboxes().NextSent(destinations()[d])};
    ++unwritten_;
  }
  bool moved = false;
  WriteMail(&moved);
  if (waits_for_memory_) return ffi::Error::Success();
  if (!edges_.is_followup) {
    JFOG_RETURN_IF_ERROR(PostReceives(0));
    JFOG_RETURN_IF_ERROR(PostSends(0));
  }
  return tags_.BecomesReady() ? PostTagged() : ffi::Error::Success();
}

// The receives of further chunks are posted when all headers are checked: a
// rank that disagrees on the length must not write past the end of a buffer.
// The sends need not wait: MPI holds a chunk until the destination posts its
// receive.
ffi::Error Exchange::PostTagged() {
  if (edges_.is_followup) {
    JFOG_RETURN_IF_ERROR(PostReceives(0));
    JFOG_RETURN_IF_ERROR(PostSends(0));
  }
  if (unchecked_ == 0) JFOG_RETURN_IF_ERROR(PostFirstReceives());
  for (std::size_t chunk = 1; chunk < buffer_pairs_.size(); ++chunk) {
    JFOG_RETURN_IF_ERROR(PostSends(chunk));
  }
  return ffi::Error::Success();
}

ffi::Error Exchange::PostFirstReceives() {
  for (std::size_t chunk = 1; chunk < buffer_pairs_.size(); ++chunk) {
    JFOG_RETURN_IF_ERROR(PostReceives(chunk));
  }
  return ffi::Error::Success();
}

ffi::Error Exchange::PostSends(std::size_t chunk) {
  BufferPair& pair = BuffersOf(chunk);
  const std::size_t ahead = chunk == 0 ? sizeof(Header) : 0;
  bool packed = false;
  std::byte* to = pair.sent;
  for (std::size_t d = 0; d < destinations().size(); ++d) {
    const std::size_t bytes = edges_.destination_bytes[d];
    if (chunk >= ChunksOf(bytes)) continue;
    // Open MPI takes messages to a rank that has failed, and keeps them: after
    // some 200 of them no other message leaves this rank.
    if (LeavesOut(destinations()[d])) continue;
    if (chunk == 0 && sent_mail_[d].is_used) continue;
    if (chunk > 0 && channel_ &&
        comm().channels()->Reaches(comm().RankInRoot(destinations()[d]))) {
      continue;
    }
    const std::size_t begin = Begin(bytes, chunk);
    const std::size_t end = Begin(bytes, chunk + 1);
    // One packed chunk serves all destinations that receive the same bytes.
    if (!packed || !edges_.same_payload) {
      if (packed) to += stride_;
      packed = true;
      if (chunk == 0) {
        const Header header = Envelope();
        std::memcpy(to, &header, sizeof(header));
      }
      Pack(d, begin, end, to + ahead);
    }
    ++pair.outstanding;
    JFOG_RETURN_IF_ERROR(Send(to, ahead + end - begin, destinations()[d],
                              tag(chunk),
                              FirstSlot(chunk) + sources().size() + d));
  }
  return ffi::Error::Success();
}

ffi::Error Exchange::PostReceives(std::size_t chunk) {
  BufferPair& pair = BuffersOf(chunk);
  const std::size_t stride = std::max(stride_, kEnvelope);
  for (std::size_t s = 0; s < sources().size(); ++s) {
    const std::size_t whole = edges_.source_bytes[s];
    if (chunk >= ChunksOf(whole)) continue;
    if (chunk == 0 && received_mail_[s].is_used) continue;
    if (chunk > 0 && source_channels_[s]) continue;
    if (IsLost(s, chunk)) continue;
    const std::size_t bytes =
        chunk == 0 ? kEnvelope : Begin(whole, chunk + 1) - Begin(whole, chunk);
    ++pair.outstanding;
    JFOG_RETURN_IF_ERROR(Receive(pair.received + s * stride, bytes,
                                 sources()[s], tag(chunk), FirstSlot(chunk) + s,
                                 /*has_header=*/chunk == 0));
  }
  return ffi::Error::Success();
}

// Leaves what does not fit, because the reader is behind, to a later call.
void Exchange::WriteMail(bool* moved) {
  for (std::size_t d = 0; unwritten_ > 0 && d < destinations().size(); ++d) {
    Mail& mail = sent_mail_[d];
    if (!mail.is_open) continue;
    Mailboxes::Message* message =
        mailboxes().Place(destinations()[d], mail.number);
    if (message == nullptr) {
      if (!LeavesOut(destinations()[d])) continue;
      mail.is_open = false;
      --unwritten_;
      *moved = true;
      continue;
    }
    message->header = Envelope();
    Pack(d, 0, Begin(edges_.destination_bytes[d], 1), message->payload);
    mailboxes().Publish(*message, mail.number);
    mail.is_open = false;
    --unwritten_;
    *moved = true;
  }
}

ffi::Error Exchange::ReadMail(bool* moved) {
  for (std::size_t s = 0; unread_ > 0 && s < sources().size(); ++s) {
    Mail& mail = received_mail_[s];
    if (!mail.is_open) continue;
    mail.message = mailboxes().Find(sources()[s], mail.number);
    // Looks again: it may have been sent before the end of the source was seen.
    const bool is_lost =
        mail.message == nullptr && LeavesOut(sources()[s]) &&
        (mail.message = mailboxes().Find(sources()[s], mail.number)) == nullptr;
    if (mail.message == nullptr && !is_lost) continue;
    mail.is_open = false;
    --unread_;
    *moved = true;
    if (is_lost) {
      JFOG_RETURN_IF_ERROR(Lose(s, 0));
      continue;
    }
    JFOG_RETURN_IF_ERROR(CheckHeader(sources()[s], mail.message->header));
    JFOG_RETURN_IF_ERROR(HeaderArrived(s, mail.message->header));
  }
  return ffi::Error::Success();
}

ffi::Error Exchange::Completed(std::size_t slot) {
  const std::size_t edges = sources().size() + destinations().size();
  BufferPair& pair = buffer_pairs_[slot / edges];
  --pair.outstanding;
  const std::size_t edge = slot % edges;
  if (unchecked_ == 0 || slot >= sources().size()) return ffi::Error::Success();
  // Until all headers have arrived, only receives of chunk 0 are posted.
  Header theirs;
  JFOG_RETURN_IF_ERROR(ReadHeader(
      sources()[edge], pair.received + edge * std::max(stride_, kEnvelope),
      length(slot), sizeof(theirs) + Begin(edges_.source_bytes[edge], 1),
      &theirs));
  return HeaderArrived(edge, theirs);
}

ffi::Error Exchange::HeaderArrived(std::size_t source, const Header& theirs) {
  CountReceived(sources()[source], CountOfSource(source));
  source_channels_[source].reset();
  if (theirs.stamp != 0 && comm().channels() != nullptr &&
      comm().channels()->Reaches(comm().RankInRoot(sources()[source]))) {
    JFOG_RETURN_IF_ERROR(CheckMessage(
        sources()[source], CheckChannel(theirs.channel, Channels::kChannels)));
    source_channels_[source] = Channels::Claim{theirs.channel, theirs.stamp};
  }
  --unchecked_;
  return HeaderSettled();
}

ffi::Error Exchange::HeaderSettled() {
  if (unchecked_ > 0 || !tags_.is_ready()) return ffi::Error::Success();
  return PostFirstReceives();
}

bool Exchange::LeavesOut(int rank) const {
  return comm().IsGone(rank) && allows_missing_ && comm().reweights();
}

ffi::Error Exchange::Lose(std::size_t source, std::size_t chunk) {
  if (lost_from_.empty()) lost_from_.assign(sources().size(), chunks_);
  if (IsLost(source, chunk)) return ffi::Error::Success();
  if (lost_from_[source] == chunks_) comm().CountMissing(sources()[source]);
  lost_from_[source] = chunk;
  if (chunk > 0) return ffi::Error::Success();
  source_channels_[source].reset();
  --unchecked_;
  return HeaderSettled();
}

// Nothing to do: what is missing is left out by the next poll.
ffi::Error Exchange::GoOnWithout(const std::vector<int>& gone) {
  if (LeavesOut(gone[0])) return ffi::Error::Success();
  return Operation::GoOnWithout(gone);
}

ffi::Error Exchange::RequestFailed(std::size_t slot) {
  const std::size_t edges = sources().size() + destinations().size();
  if (!allows_missing_ || !comm().reweights() || edges == 0) {
    return Operation::RequestFailed(slot);
  }
  comm().FindGone();  // fails if it is a recovery that has ended the message
  JFOG_RETURN_IF_ERROR(comm().Refusal());
  --buffer_pairs_[slot / edges].outstanding;
  const std::size_t edge = slot % edges;
  if (edge >= sources().size()) {
    comm().MarkGone(destinations()[edge - sources().size()]);
    return ffi::Error::Success();
  }
  comm().MarkGone(sources()[edge]);
  if (unchecked_ > 0) return Lose(edge, 0);
  // The chunk in flight that has this pair of buffers.
  const std::size_t pairs = buffer_pairs_.size();
  const std::size_t after = (slot / edges + pairs - consumed_ % pairs) % pairs;
  return Lose(edge, consumed_ + after);
}

ffi::Error Exchange::Resume(bool* moved) {
  if (tags_.BecomesReady()) {
    JFOG_RETURN_IF_ERROR(PostTagged());
    *moved = true;
  }
  WriteMail(moved);
  JFOG_RETURN_IF_ERROR(ReadMail(moved));
  for (bool any = true; any;) {
    any = false;
    if (published_ < own_chunks_) {
      // Null until all readers are done with the chunk before in this slot.
      if (std::byte* to = comm().channels()->Place(*channel_, published_)) {
        Pack(0, Begin(payload_, published_), Begin(payload_, published_ + 1),
             to);
        comm().channels()->Publish(*channel_, published_);
        ++published_;
        any = true;
      }
    }
    if (consumed_ < chunks_ && HasArrived(consumed_)) {
      JFOG_RETURN_IF_ERROR(ConsumeChunk(consumed_));
      any = true;
    }
    if (any) *moved = true;
  }
  return ffi::Error::Success();
}

bool Exchange::HasArrived(std::size_t chunk) {
  const BufferPair& pair = BuffersOf(chunk);
  // Counts sends, too: a later chunk overwrites their buffer.
  if (pair.outstanding > 0 || !tags_.is_ready()) return false;
  if (unwritten_ > 0 || unread_ > 0) return false;
  if (chunk > 0 && unchecked_ > 0) return false;
  // An output may alias the input that is still to be published.
  if (published_ < own_chunks_ && published_ <= chunk) return false;
  const std::size_t ahead = chunk == 0 ? sizeof(Header) : 0;
  for (std::size_t s = 0; s < sources().size(); ++s) {
    const std::size_t bytes = edges_.source_bytes[s];
    Part& part = parts_[s];
    part.begin = Begin(bytes, chunk);
    part.end = Begin(bytes, chunk + 1);
    if (chunk >= ChunksOf(bytes) || IsLost(s, chunk)) {
      part.bytes = nullptr;
    } else if (chunk == 0 && received_mail_[s].is_used) {
      part.bytes = received_mail_[s].message->payload;
    } else if (chunk > 0 && source_channels_[s]) {
      part.bytes = comm().channels()->Find(comm().RankInRoot(sources()[s]),
                                           *source_channels_[s], chunk);
      if (part.bytes != nullptr) continue;
      if (!LeavesOut(sources()[s])) return false;
      part.bytes = comm().channels()->Find(comm().RankInRoot(sources()[s]),
                                           *source_channels_[s], chunk);
      if (part.bytes == nullptr && Lose(s, chunk).failure()) return false;
    } else {
      part.bytes = pair.received + s * std::max(stride_, kEnvelope) + ahead;
    }
  }
  return true;
}

ffi::Error Exchange::ConsumeChunk(std::size_t chunk) {
  {
    Phase phase(trace(), this->phase());
    JFOG_RETURN_IF_ERROR(
        Consume(Begin(payload_, chunk), Begin(payload_, chunk + 1), parts_));
  }
  // The senders on this machine may reuse the slots that this rank has read.
  for (std::size_t s = 0; chunk == 0 && s < sources().size(); ++s) {
    const Mail& mail = received_mail_[s];
    if (mail.is_used && mail.message != nullptr)
      mailboxes().Done(sources()[s], mail.number);
  }
  for (std::size_t s = 0; chunk > 0 && s < sources().size(); ++s) {
    if (!source_channels_[s] || parts_[s].bytes == nullptr) continue;
    comm().channels()->Done(comm().RankInRoot(sources()[s]),
                            *source_channels_[s], chunk);
  }
  consumed_ = chunk + 1;
  const std::size_t next = chunk + buffer_pairs_.size();  // in these buffers
  if (next >= chunks_) return ffi::Error::Success();
  // Receives first, so that messages find them posted.
  JFOG_RETURN_IF_ERROR(PostReceives(next));
  return PostSends(next);
}

ffi::Error Exchange::AgreeOnPeers(bool check) {
  Pattern pattern{sources(), destinations()};
  if (check) check_.emplace(pattern);
  return mpi::AgreeOnPeers(shared_comm(), *this, std::move(pattern), check);
}

ffi::Error Exchange::Stalled() {
  if (!check_) return ffi::Error::Success();
  check_->Ask(comm(), header());
  const auto text = check_->ReadAnswers(comm(), header());
  if (!text) return ffi::Error::Success();
  return Fail(ffi::ErrorCode::kFailedPrecondition, *text);
}

// After an error the channel stays claimed: a reader may never read its chunks.
void Exchange::Ended() {
  tags_.Leave();
  if (channel_ && error().success()) {
    comm().channels()->Release(*channel_);
    channel_.reset();
  }
}

std::vector<int> Exchange::Missing() const {
  const std::size_t edges = sources().size() + destinations().size();
  std::vector<int> missing;
  for (std::size_t slot = 0; slot < slots(); ++slot) {
    const std::size_t edge = slot % edges;
    if (!is_pending(slot)) continue;
    missing.push_back(edge < sources().size()
                          ? sources()[edge]
                          : destinations()[edge - sources().size()]);
  }
  for (std::size_t s = 0; s < sources().size(); ++s) {
    if (received_mail_[s].is_open) missing.push_back(sources()[s]);
  }
  for (std::size_t d = 0; d < destinations().size(); ++d) {
    if (sent_mail_[d].is_open) missing.push_back(destinations()[d]);
  }
  if (consumed_ > 0 && consumed_ < chunks_ && unchecked_ == 0) {
    for (std::size_t s = 0; s < sources().size(); ++s) {
      if (source_channels_[s] && consumed_ < ChunksOf(edges_.source_bytes[s]) &&
          !IsLost(s, consumed_) &&
          comm().channels()->Find(comm().RankInRoot(sources()[s]),
                                  *source_channels_[s], consumed_) == nullptr) {
        missing.push_back(sources()[s]);
      }
    }
  }
  if (published_ < own_chunks_) {
    const std::vector<int> behind =
        comm().channels()->Behind(*channel_, published_);
    for (int destination : destinations()) {
      const int rank = comm().RankInRoot(destination);
      if (std::count(behind.begin(), behind.end(), rank) > 0) {
        missing.push_back(destination);
      }
    }
  }
  std::sort(missing.begin(), missing.end());
  missing.erase(std::unique(missing.begin(), missing.end()), missing.end());
  return missing;
}

}  // namespace jfog::mpi
