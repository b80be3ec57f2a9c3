// Rings of events, written by several threads while another one reads.
#include "mpi/timeline.h"

#include <doctest/doctest.h>

#include <cstring>
#include <map>
#include <string>
#include <thread>
#include <vector>

namespace jfog::mpi {
namespace {

std::vector<TimelineEvent> Events(const std::string& bytes) {
  std::vector<TimelineEvent> events(bytes.size() / sizeof(TimelineEvent));
  if (!events.empty()) {
    std::memcpy(static_cast<void*>(events.data()), bytes.data(), bytes.size());
  }
  return events;
}

constexpr int kWriters = 3;
constexpr std::uint64_t kOperations = 20000;

// Each event of an operation has its sequence in two more places.
void WriteAll() {
  for (std::uint64_t k = 1; k <= kOperations; ++k) {
    Trace trace;
    trace.Begin("operation", k, 3 * k, static_cast<int>(k % 100));
    trace.Record(TimelineEvent::kSent, static_cast<int>(k), 3 * k);
    trace.RecordSince(trace.Now(), "sum");
  }
}

}  // namespace

TEST_CASE("while the timeline is off nothing is recorded") {
  Trace trace;
  trace.Begin("operation", 1, 2, 3);
  CHECK_FALSE(trace.is_on());
  CHECK(trace.Now() == 0);
  trace.Record(TimelineEvent::kEnd);
  CHECK(ReadTimeline().bytes.empty());
}

TEST_CASE("events are whole, in order, and either read or counted as lost") {
  BeginTimeline(64);
  std::vector<std::thread> writers;
  for (int i = 0; i < kWriters; ++i) writers.emplace_back(WriteAll);
  std::vector<TimelineEvent> events;
  std::uint64_t lost = 0;
  const auto read = [&] {
    const TimelineEvents found = ReadTimeline();
    lost += found.lost;
    for (const TimelineEvent& event : Events(found.bytes)) {
      events.push_back(event);
    }
  };
  for (int i = 0; i < 1000; ++i) read();
  for (std::thread& writer : writers) writer.join();
  EndTimeline();
  read();
  CHECK(events.size() + lost == 3 * kWriters * kOperations);
  // A full ring gives all but one, whose place the next event may be taking.
  CHECK(events.size() >= 63 * kWriters);
  const std::vector<std::string> names = TimelineNames();
  std::map<std::uint64_t, std::uint64_t> last;  // operations, by thread
  bool whole = true;
  for (const TimelineEvent& event : events) {
    switch (event.kind & 255) {
      case TimelineEvent::kBegin:
        whole &= event.bytes == 3 * event.sequence &&
                 event.kind >> 8 == event.sequence % 100 &&
                 names[event.name] == "operation";
        break;
      case TimelineEvent::kSent:
        whole &= event.bytes == 3 * static_cast<std::uint64_t>(event.peer);
        break;
      default:
        whole &= names[event.name] == "sum" && event.duration >= 0;
    }
    whole &= event.operation >= last[event.thread] && event.thread != 0;
    last[event.thread] = event.operation;
  }
  CHECK(whole);
  CHECK(last.size() == kWriters);
}

TEST_CASE("the next timeline has rings of its own") {
  BeginTimeline(8);
  Trace trace;
  trace.Begin("operation", 1, 0, 0);
  BeginTimeline(8);
  // An operation of the timeline before is not begun again.
  trace.Record(TimelineEvent::kEnd);
  EndTimeline();
  const std::vector<TimelineEvent> events = Events(ReadTimeline().bytes);
  REQUIRE(events.size() == 1);
  CHECK(events[0].kind == TimelineEvent::kEnd);
}

}  // namespace jfog::mpi
