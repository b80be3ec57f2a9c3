// Communicators of this process: who is there, what failed, what was counted.
#include "mpi/communicator.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <utility>

#include "common/out_of_memory.h"
#include "common/process_wide.h"
#include "mpi/buffer_pool.h"
#include "mpi/collective_start.h"
#include "mpi/fault_tolerance.h"

namespace jfog::mpi {
namespace {

constexpr int kControlTag = 3;
// Interval of looks for failed ranks.
constexpr std::chrono::milliseconds kLookEvery{1};

}  // namespace

Registry<Communicator>& Communicators() {
  return ProcessWide<Registry<Communicator>>();
}

bool Pattern::Sends(int rank) const {
  return std::count(destinations.begin(), destinations.end(), rank) > 0;
}

bool Pattern::Receives(int rank) const {
  return std::count(sources.begin(), sources.end(), rank) > 0;
}

std::string Disagreement(int a, bool a_sends, bool a_receives, int b,
                         bool b_sends, bool b_receives) {
  const auto edge = [](int src, bool sends, int dst, bool receives) {
    std::string text;
    if (sends == receives) return text;
    const std::string from = "rank " + std::to_string(src);
    const std::string to = "rank " + std::to_string(dst);
    if (sends) return from + " sends to " + to + ", which does not expect it";
    return to + " expects to receive from " + from + ", which does not send";
  };
  const std::string there = edge(a, a_sends, b, b_receives);
  const std::string back = edge(b, b_sends, a, a_receives);
  return there.empty() || back.empty() ? there + back : there + "; " + back;
}

std::string ErrorText(int code) {
  char text[MPI_MAX_ERROR_STRING];
  int length = 0;
  if (MPI_Error_string(code, text, &length) != MPI_SUCCESS) {
    return "MPI error " + std::to_string(code);
  }
  return std::string(text, length);
}

ffi::Error FailByException(Communicator* comm, const char* name) {
  const Thrown thrown = Thrown::Current();
  if (comm == nullptr) {
    return MakeError(thrown.code, std::string(name) + " " + thrown.text);
  }
  comm->FailAll(comm->NextHeader(name), thrown.code,
                std::string(name) + " on rank " + std::to_string(comm->rank()) +
                    " " + thrown.text);
  return comm->Refusal();
}

Communicator::Communicator(MPI_Comm parent, double timeout,
                           std::shared_ptr<Channels> channels,
                           std::shared_ptr<Communicator> root)
    : duplicates_(Duplicates::Acquire(parent)),
      timeout_(timeout),
      channels_(std::move(channels)),
      root_(std::move(root)),
      is_fault_tolerant_(IsFaultTolerant()),
      gone_(SizeOfComm(parent)),
      missing_(gone_.size()),
      traffic_(SizeOfComm(parent)),
      hangs_(SizeOfComm(parent)) {
  MPI_Comm_rank(parent, &rank_);
  size_ = SizeOfComm(parent);
  last_messages_.resize(size_);
  left_.resize(size_);
  if (root_ != nullptr) {
    number_ = ++root_->parts_;
    root_ranks_ = RanksOf(comm(), root_->comm());
  }
  mailboxes_ = Mailboxes::Make(collective_comm(), RanksOnMachine());
  shares_memory_ = channels_ != nullptr;
  for (int peer = 0; peer < size_ && shares_memory_; ++peer) {
    shares_memory_ = channels_->Reaches(RankInRoot(peer));
  }
  if (root_ != nullptr) {
    chunks_in_flight_ = root_->chunks_in_flight_;
  } else if (!shares_memory_ && size_ > 1) {
    chunks_in_flight_ = MeasureChunksInFlight(collective_comm());
  }
}

Communicator::~Communicator() {
  Duplicates::Release(std::move(duplicates_), failed());
}

std::vector<int> Communicator::RanksOnMachine() const {
  std::vector<int> ranks;
  for (int rank = 0; rank < size_; ++rank) {
    const bool is_reached =
        channels_ != nullptr && channels_->Reaches(RankInRoot(rank));
    if (rank == rank_ || is_reached) ranks.push_back(rank);
  }
  return ranks;
}

std::optional<std::uint64_t> Communicator::IfNew(std::uint64_t graph) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!graphs_.insert(graph).second) return std::nullopt;
  return graphs_.size() - 1;
}

void Communicator::SendControlMessage(int peer, const ControlMessage& message) {
  // Open MPI keeps what is sent to a rank that has failed, see PostSends.
  if (IsGone(peer)) return;
  const ControlMessage checked = WithCheck(message);
  duplicates_->SendControl(peer, kControlTag, &checked, sizeof(checked));
}

std::string Communicator::Position() {
  const std::uint64_t next = sequence_.load();
  if (next == 0) return "";
  const auto last = log_.Find(next - 1);
  std::string text = "the last operation started is " +
                     (last ? NameOf(*last) + " " : std::string()) + "#" +
                     std::to_string(next - 1);
  if (failed()) text += ", and the communicator has failed";
  return text;
}

void Communicator::AnnounceArrival(const Header& header) {
  ControlMessage message;
  message.header = header;
  for (int peer = 0; peer < size_; ++peer) {
    if (peer != rank_) SendControlMessage(peer, message);
  }
}

void Communicator::AnnounceLeave() {
  ControlMessage message;
  message.kind = ControlMessage::kLeave;
  for (int peer = 0; peer < size_; ++peer) {
    if (peer != rank_) SendControlMessage(peer, message);
  }
}

void Communicator::AnnounceFailure(const Header& header, int rank,
                                   ControlMessage::Kind kind) {
  ControlMessage message;
  message.header = header;
  message.kind = kind;
  message.rank = rank;
  for (int peer = 0; peer < size_; ++peer) {
    if (peer != rank_) SendControlMessage(peer, message);
  }
}

Header Communicator::NextHeader(const char* name) const {
  return MakeHeader(name, sequence_.load(), 0, 0, 0);
}

void Communicator::FailAll(const Header& header, ffi::ErrorCode code,
                           const std::string& text) {
  if (failed()) return;
  Fail(code, text);
  try {
    AnnounceFailure(header, rank_, ControlMessage::kNoMemory);
  } catch (const std::bad_alloc&) {
    // The others end by their deadlines.
  }
}

void Communicator::FailMalformed(int source, const std::string& wrong) {
  if (failed()) return;
  const std::uint64_t sequence = sequence_.load();
  Fail(ffi::ErrorCode::kFailedPrecondition,
       "rank " + std::to_string(rank_) + " got a malformed message from rank " +
           std::to_string(source) + ", before operation #" +
           std::to_string(sequence) + ": " + wrong);
  AnnounceFailure(MakeHeader("communication", sequence, 0, 0, 0), source,
                  ControlMessage::kMalformed);
}

std::string Communicator::ReceiveControlMessage(MPI_Message matched,
                                                const MPI_Status& found,
                                                ControlMessage* message) {
  int bytes = 0;
  MPI_Get_count(&found, MPI_BYTE, &bytes);
  // Of the length that came: a longer message could overwrite what follows.
  Buffer received(static_cast<std::size_t>(std::max(bytes, 1)));
  const int code =
      MPI_Mrecv(received.get(), bytes, MPI_BYTE, &matched, MPI_STATUS_IGNORE);
  if (code != MPI_SUCCESS) return ErrorText(code);
  duplicates_->CountControlReceived(found.MPI_SOURCE);
  return Read(received.get(), static_cast<std::size_t>(bytes), size_, message);
}

void Communicator::ReadControlMessages() {
  std::string failure;
  std::optional<std::pair<int, std::string>> malformed;  // source, field
  const auto title = [this](const Header& header) {
    return Title(NameOf(header), header.sequence, rank_);
  };
  {
    // Held over probe and receive, so that no other thread receives the message
    // that this one has found.
    std::lock_guard<std::mutex> lock(mutex_);
    for (;;) {
      int found = 0;
      MPI_Status status;
      MPI_Message matched = MPI_MESSAGE_NULL;
      // Matched, since a plain receive refuses what a rank sent before its end.
      const int code = MPI_Improbe(MPI_ANY_SOURCE, kControlTag, control_comm(),
                                   &found, &matched, &status);
      // An unacknowledged failure is an error of each probe from any source.
      if (IsRankFailure(code)) AcknowledgeFailures(control_comm());
      if (code != MPI_SUCCESS || !found) break;
      ControlMessage message;
      const int source = status.MPI_SOURCE;
      const std::string wrong =
          ReceiveControlMessage(matched, status, &message);
      if (!wrong.empty()) {
        malformed.emplace(source, "control message with " + wrong);
        continue;
      }
      switch (message.kind) {
        case ControlMessage::kArrival:
          last_messages_[source] = message.header;
          break;
        case ControlMessage::kLeave:
          left_[source] = true;
          break;
        case ControlMessage::kQuery:
          queries_.emplace_back(source, message);
          break;
        case ControlMessage::kFailed:
        case ControlMessage::kMalformed:
          failure = title(message.header) + " has failed: rank " +
                    std::to_string(source) +
                    (message.kind == ControlMessage::kFailed
                         ? " does not match rank "
                         : " got a malformed message from rank ") +
                    std::to_string(message.rank);
          break;
        case ControlMessage::kNoMemory:
          failure = title(message.header) + " has failed: rank " +
                    std::to_string(source) +
                    " has no memory, or has failed otherwise";
          break;
        case ControlMessage::kAsk:
          if (const auto header = log_.Find(message.header.sequence)) {
            ControlMessage posted;
            posted.header = *header;
            posted.kind = ControlMessage::kPosted;
            SendControlMessage(source, posted);
          }
          break;
        case ControlMessage::kPosted:
          if (posted_.size() >= kPosted) posted_.erase(posted_.begin());
          posted_[{message.header.sequence, source}] = message.header;
          break;
        case ControlMessage::kDoYouWait:
          questions_.emplace(source, HangDetector::Ends());
          break;
        case ControlMessage::kWaits:
          hangs_.CountAnswer(source);
          break;
        case ControlMessage::kStuck:
          if (hangs_.is_on()) hangs_.Suspect(message.rank, true);
          break;
        default:
          answers_[{source, message.header.sequence}] = message;
      }
    }
    // A query waits here until this rank has come to the operation.
    for (auto query = queries_.begin(); query != queries_.end();) {
      const auto& [source, message] = *query;
      const std::optional<ControlMessage> answer = Answer(source, message);
      if (!answer) {
        ++query;
        continue;
      }
      SendControlMessage(source, *answer);
      if (answer->kind != ControlMessage::kYes) {
        failure = title(message.header) + " does not match rank " +
                  std::to_string(source) + ": ";
        failure += answer->kind == ControlMessage::kNoPeers
                       ? "this rank is in another operation"
                       : Disagreement(source, message.sends, message.receives,
                                      rank_, answer->sends, answer->receives);
      }
      query = queries_.erase(query);
    }
  }
  if (!failure.empty()) Fail(ffi::ErrorCode::kFailedPrecondition, failure);
  if (malformed) FailMalformed(malformed->first, malformed->second);
}

std::optional<ControlMessage> Communicator::Answer(
    int rank, const ControlMessage& query) {
  const std::uint64_t sequence = query.header.sequence;
  ControlMessage answer;
  answer.header.sequence = sequence;
  if (!past_.empty()) {
    const Past& past = past_[sequence % kPast];
    if (past.pattern != nullptr && past.sequence == sequence) {
      answer.sends = past.pattern->Sends(rank);
      answer.receives = past.pattern->Receives(rank);
      const bool match =
          answer.sends == query.receives && answer.receives == query.sends;
      answer.kind = match ? ControlMessage::kYes : ControlMessage::kNo;
      return answer;
    }
  }
  // An operation records its pattern before the next one takes its number, so
  // two numbers later a missing pattern means another operation.
  if (sequence_.load() < sequence + 2) return std::nullopt;
  answer.kind = ControlMessage::kNoPeers;
  return answer;
}

bool Communicator::RecordPattern(std::uint64_t sequence, const Pattern& pattern,
                                 bool check) {
  std::lock_guard<std::mutex> lock(mutex_);
  Known& known = patterns_[{pattern.sources, pattern.destinations}];
  if (known.pattern == nullptr) {
    known.pattern = std::make_shared<Pattern>(pattern);
  }
  if (past_.empty()) past_.resize(kPast);
  past_[sequence % kPast] = {sequence, known.pattern};
  const bool asks = check && !known.asked;
  if (asks) known.asked = true;
  return asks;
}

void Communicator::Ask(int rank, const Header& header, const Pattern& pattern) {
  ControlMessage message;
  message.header = header;
  message.kind = ControlMessage::kQuery;
  message.sends = pattern.Sends(rank);
  message.receives = pattern.Receives(rank);
  SendControlMessage(rank, message);
}

std::optional<ControlMessage> Communicator::TakeAnswer(int rank,
                                                       std::uint64_t sequence) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = answers_.find({rank, sequence});
  if (found == answers_.end()) return std::nullopt;
  const ControlMessage answer = found->second;
  answers_.erase(found);
  return answer;
}

void Communicator::AskPosted(int rank, const Header& header) {
  ControlMessage message;
  message.header = header;
  message.kind = ControlMessage::kAsk;
  SendControlMessage(rank, message);
}

std::optional<Header> Communicator::TakePosted(int rank,
                                               std::uint64_t sequence) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = posted_.find({sequence, rank});
  if (found == posted_.end()) return std::nullopt;
  const Header header = found->second;
  posted_.erase(found);
  return header;
}

void Communicator::AskWhetherWaiting(int rank) {
  ControlMessage message;
  message.kind = ControlMessage::kDoYouWait;
  hangs_.CountQuestion(rank);
  if (rank != rank_) return SendControlMessage(rank, message);
  std::lock_guard<std::mutex> lock(mutex_);
  questions_.emplace(rank, HangDetector::Ends());
}

bool Communicator::HasQuestions() {
  std::lock_guard<std::mutex> lock(mutex_);
  return !questions_.empty();
}

void Communicator::AnswerQuestions(bool is_waiting) {
  std::lock_guard<std::mutex> lock(mutex_);
  ControlMessage message;
  message.kind = ControlMessage::kWaits;
  const std::uint64_t ends = HangDetector::Ends();
  for (auto question = questions_.begin(); question != questions_.end();) {
    const auto [rank, ends_then] = *question;
    if (!is_waiting && ends == ends_then) {
      ++question;
      continue;
    }
    if (rank == rank_) {
      hangs_.CountAnswer(rank);
    } else {
      SendControlMessage(rank, message);
    }
    question = questions_.erase(question);
  }
}

void Communicator::EndStuck(int rank, const std::string& reason) {
  if (!hangs_.TakeVerdict(rank)) return;
  std::fprintf(stderr,
               "jfog: rank %d seems stuck, and is ended unless it "
               "answers: %s\n",
               rank, reason.c_str());
  std::fflush(stderr);
  ControlMessage message;
  message.kind = ControlMessage::kStuck;
  message.rank = rank;
  for (int peer = 0; peer < size_; ++peer) {
    if (peer != rank_) SendControlMessage(peer, message);
  }
  hangs_.EndProcess(rank);
}

// The rank that says so may be behind a link that was cut, with its questions,
// and each side of the cut takes the other one for stuck. So all that can end a
// suspect ask it again; also it itself.
void Communicator::CheckSuspects() {
  for (int rank : hangs_.Suspects()) {
    if (!hangs_.Reaches(rank) || IsGone(rank)) {
      hangs_.Suspect(rank, false);
    } else if (hangs_.Unanswered(rank) == 0) {
      AskWhetherWaiting(rank);
    } else if (hangs_.Unanswered(rank) > hangs_.ConfirmAfter()) {
      hangs_.EndProcess(rank);
      hangs_.Suspect(rank, false);
    }
  }
}

std::optional<Header> Communicator::LastControlMessage(int rank) {
  std::lock_guard<std::mutex> lock(mutex_);
  return last_messages_[rank];
}

void Communicator::FindGone() {
  if (!is_fault_tolerant_) return;
  if (root_ != nullptr) {
    root_->FindGone();
    for (int rank = 0; rank < size_; ++rank) {
      if (root_->IsGone(root_ranks_[rank])) MarkGone(rank);
    }
  } else {
    for (int rank : FailedRanks(comm())) MarkGone(rank);
  }
  if (!failed() && IsRevoked(root_ != nullptr ? root_->comm() : comm())) {
    const std::vector<int> gone = Gone();
    Fail(ffi::ErrorCode::kUnavailable,
         "another rank has called jfog.recover" +
             (gone.empty() ? "" : ", because of " + RankList(gone)) +
             "; call it on this rank, too");
  }
}

void Communicator::LookForGone() {
  if (!is_fault_tolerant_) return;
  const Clock::rep now = Clock::now().time_since_epoch().count();
  Clock::rep last = looked_at_.load(std::memory_order_relaxed);
  if (Clock::duration(now - last) < kLookEvery) return;
  if (!looked_at_.compare_exchange_strong(last, now)) return;
  ReadControlMessages();  // lets MPI take note of what has happened
  FindGone();
}

void Communicator::MarkGone(int rank) {
  if (gone_[rank].exchange(true, std::memory_order_acq_rel)) return;
  any_gone_.store(true, std::memory_order_release);
  hangs_.SkipTime();
  if (channels_ != nullptr) channels_->Forget(RankInRoot(rank));
}

std::vector<int> Communicator::Gone() const {
  std::vector<int> ranks;
  for (int rank = 0; rank < size_; ++rank) {
    if (IsGone(rank)) ranks.push_back(rank);
  }
  return ranks;
}

bool Communicator::HasLeft(int rank) {
  if (root_ != nullptr) {
    root_->ReadControlMessages();
    return root_->HasLeft(RankInRoot(rank));
  }
  std::lock_guard<std::mutex> lock(mutex_);
  return left_[rank];
}

}  // namespace jfog::mpi
