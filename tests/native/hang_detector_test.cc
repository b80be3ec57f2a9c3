// The pace of a run, the limit of a hang, and the end of a process.
#include "mpi/hang_detector.h"

#include <doctest/doctest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <vector>

namespace jfog::mpi {
namespace {

using std::chrono::milliseconds;

// Ends of operations, at times that the test sets.
struct Run {
  HangDetector hangs{3};
  Clock::time_point now = Clock::now();

  explicit Run(double shortest) { hangs.Begin(shortest, {0, 0, 0}); }
  void Step(milliseconds time, int count = 1) {
    for (int i = 0; i < count; ++i) hangs.CountEnd(now += time);
  }
};

TEST_CASE("there is no limit before enough operations") {
  Run run(0.1);
  run.Step(milliseconds(10), 16);  // 15 times between them
  CHECK_FALSE(run.hangs.FindPace());
  run.Step(milliseconds(10));
  REQUIRE(run.hangs.FindPace());
  CHECK(run.hangs.FindPace()->median == doctest::Approx(0.01));
  CHECK(run.hangs.FindPace()->limit == doctest::Approx(0.1));
}

TEST_CASE("the limit is the median and 20 deviations") {
  Run run(0.001);
  run.Step(milliseconds(0));
  for (int i = 0; i < 50; ++i) {
    run.Step(milliseconds(10));
    run.Step(milliseconds(30));
  }
  const auto pace = run.hangs.FindPace();
  REQUIRE(pace);
  CHECK(pace->median == doctest::Approx(0.03));  // the upper one of two
  CHECK(pace->deviation == doctest::Approx(0.01));
  CHECK(pace->limit == doctest::Approx(0.23));
}

TEST_CASE("a pause is usual from then on, and is forgotten") {
  Run run(0.05);
  run.Step(milliseconds(10), 20);
  CHECK(run.hangs.FindPace()->limit == doctest::Approx(0.05));
  run.Step(milliseconds(4000));
  run.Step(milliseconds(10), 235);
  CHECK(run.hangs.FindPace()->limit > 4.0);
  run.Step(milliseconds(10), 256);
  CHECK(run.hangs.FindPace()->limit == doctest::Approx(0.05));
}

TEST_CASE("the time in which a rank has failed does not count") {
  Run run(0.05);
  run.Step(milliseconds(10), 20);
  run.hangs.SkipTime();
  run.Step(milliseconds(4000));
  run.Step(milliseconds(10), 20);
  CHECK(run.hangs.FindPace()->limit == doctest::Approx(0.05));
}

TEST_CASE("questions, answers and verdicts") {
  Run run(0.05);
  CHECK(run.hangs.Unanswered(1) == 0);
  run.hangs.CountQuestion(1);
  usleep(2000);
  run.hangs.CountQuestion(1);  // the first one counts
  CHECK(run.hangs.Unanswered(1) >= 0.002);
  CHECK(run.hangs.Unanswered(2) == 0);
  run.hangs.CountAnswer(1);
  CHECK(run.hangs.Unanswered(1) == 0);
  run.hangs.CountQuestion(2);
  run.hangs.ForgetQuestions();
  CHECK(run.hangs.Unanswered(2) == 0);
  CHECK(run.hangs.TakeVerdict(1));
  CHECK_FALSE(run.hangs.TakeVerdict(1));
  run.hangs.CountAnswer(1);
  CHECK(run.hangs.TakeVerdict(1));
  CHECK(run.hangs.TakeVerdict(2));
}

TEST_CASE("an answer ends a suspicion") {
  Run run(2.0);
  CHECK_FALSE(run.hangs.has_suspects());
  run.hangs.Suspect(2, true);
  run.hangs.Suspect(2, true);
  CHECK(run.hangs.has_suspects());
  CHECK(run.hangs.Suspects() == std::vector<int>{2});
  CHECK(run.hangs.ConfirmAfter() == doctest::Approx(0.5));
  CHECK_FALSE(run.hangs.Reaches(2));
  run.hangs.CountAnswer(2);
  CHECK_FALSE(run.hangs.has_suspects());
}

TEST_CASE("a process that is known is killed") {
  const pid_t child = fork();
  if (child == 0) {
    for (;;) pause();
  }
  HangDetector hangs(2);
  hangs.Begin(1.0, {0, static_cast<int>(child)});
  hangs.EndProcess(0);  // not known here
  CHECK(waitpid(child, nullptr, WNOHANG) == 0);
  hangs.EndProcess(1);
  int status = 0;
  REQUIRE(waitpid(child, &status, 0) == child);
  CHECK(WIFSIGNALED(status));
  CHECK(WTERMSIG(status) == SIGKILL);
}

}  // namespace
}  // namespace jfog::mpi
