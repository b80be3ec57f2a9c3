// The timeline: what operations do and when, in a ring of events for each
// thread.
#ifndef JFOG_XLA_OPS_MPI_TIMELINE_H_
#define JFOG_XLA_OPS_MPI_TIMELINE_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "common/format.h"

namespace jfog::mpi {

// Whether operations that begin now are recorded. The only cost of the timeline
// while it is off: one relaxed load and a branch at the begin of an operation,
// and a branch on a member of the operation at each event.
inline std::atomic<bool> timeline_is_on{false};

// One event, as `ReadTimeline` returns it. jfog/_timeline/_operations.py reads
// the same layout.
struct TimelineEvent {
  enum Kind : std::uint8_t {
    kBegin,     // of the operation; `bytes` are those of its leaves
    kPosted,    // end of the post
    kSent,      // a message to `peer` is sent
    kReceived,  // the first part of a message of `peer` has arrived
    kStarted,   // the operation is a split one: no caller waits yet
    kAwaited,   // jfog.wait is called
    kPhase,     // `name` from `time` on
    kPut,       // a value was written to a window of `peer`, from `time` on
    kGot,       // a value was read from a window of `peer`, from `time` on
    kEnd,       // of the operation; `bytes` is 1 after an error
  };
  std::int64_t time = 0;        // of the steady clock, in ns
  std::int64_t duration = 0;    // ns
  std::uint64_t operation = 0;  // ordinal among the recorded ones of a process
  std::uint64_t sequence = 0;   // of the operation on its communicator
  std::uint64_t bytes = 0;
  std::uint64_t name = 0;  // a `const char*`; what is read: see TimelineNames
  std::uint32_t kind = 0;  // with the number of the communicator above 8 bits
  std::int32_t peer = -1;  // in the root communicator
  std::uint64_t thread = 0;
};
static_assert(sizeof(TimelineEvent) == 64, "one cache line");

// The record of one operation. Names are literals.
class Trace {
 public:
  // `communicator` is the number of the operation's.
  void Begin(const char* name, std::uint64_t sequence, std::size_t bytes,
             int communicator) {
    operation_ = 0;
    if (__builtin_expect(timeline_is_on.load(std::memory_order_relaxed), 0)) {
      BeginRecord(name, sequence, bytes, communicator);
    }
  }
  bool is_on() const { return __builtin_expect(operation_ != 0, 0); }

  void Record(TimelineEvent::Kind kind, int peer = -1, std::size_t bytes = 0) {
    if (is_on()) Write(kind, peer, bytes);
  }
  // A phase since a time of `Now`.
  void RecordSince(std::int64_t since, const char* name) {
    if (is_on()) WriteSince(TimelineEvent::kPhase, since, name, -1, 0);
  }
  void RecordSince(std::int64_t since, TimelineEvent::Kind kind, int peer,
                   std::size_t bytes) {
    if (is_on()) WriteSince(kind, since, nullptr, peer, bytes);
  }
  // The time of an event to come; 0 while nothing is recorded.
  std::int64_t Now() const { return is_on() ? Time() : 0; }

 private:
  static std::int64_t Time() {
    return std::chrono::nanoseconds(Clock::now().time_since_epoch()).count();
  }
  void BeginRecord(const char* name, std::uint64_t sequence, std::size_t bytes,
                   int communicator);
  void Write(TimelineEvent::Kind kind, int peer, std::size_t bytes);
  void WriteSince(TimelineEvent::Kind kind, std::int64_t since,
                  const char* name, int peer, std::size_t bytes);

  std::uint64_t operation_ = 0;  // 0: not recorded
};

// A phase of an operation: the scope of this object.
class Phase {
 public:
  Phase(Trace& trace, const char* name)
      : trace_(trace), name_(name), since_(trace.Now()) {}
  ~Phase() { trace_.RecordSince(since_, name_); }
  Phase(const Phase&) = delete;
  Phase& operator=(const Phase&) = delete;

 private:
  Trace& trace_;
  const char* name_;
  std::int64_t since_;
};

// Begins a timeline, with room for so many events in the ring of each thread
// between two reads.
void BeginTimeline(std::size_t events);
void EndTimeline();

struct TimelineEvents {
  std::string bytes;       // consecutive events
  std::uint64_t lost = 0;  // overwritten before they were read
};
// The events since the last call. One thread at a time calls it.
TimelineEvents ReadTimeline();
// The names of events, by the index in `name`.
std::vector<std::string> TimelineNames();

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_TIMELINE_H_
