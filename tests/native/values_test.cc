// The values that both backends share: headers, rounds, handles, registries.
#include <doctest/doctest.h>

#include <string>
#include <vector>

#include "common/call_plan.h"
#include "common/handle_table.h"
#include "common/operation_header.h"
#include "common/registry.h"

namespace jfog {

TEST_CASE("headers of one operation match, and others say how they differ") {
  const auto mine = MakeHeader("neighbor_allreduce", 41, 7, 9, 1200);
  CHECK(IsValid(mine));
  CHECK(NameOf(mine) == "neighbor_allreduce");
  CHECK(Difference(mine, mine).empty());
  const auto differs = [&](const OperationHeader& theirs, const char* text) {
    return Difference(mine, theirs).find(text) != std::string::npos;
  };
  CHECK(differs(MakeHeader("allreduce", 41, 7, 9, 1200), "allreduce #41"));
  CHECK(differs(MakeHeader("neighbor_allreduce", 42, 7, 9, 1200), "#42"));
  Summary one, mixed;
  one.Add(DataType::F32, 16);
  mixed.Add(DataType::F32, 16);
  mixed.Add(DataType::S8, 3);
  CHECK(differs(MakeHeader("neighbor_allreduce", 41, 8, 9, one.word()),
                "1 leaf, float32 x 4"));
  CHECK(differs(MakeHeader("neighbor_allreduce", 41, 8, 9, mixed.word()),
                "2 leaves, 19 bytes"));
  one.Add(DataType::F32, 4);
  CHECK(differs(MakeHeader("neighbor_allreduce", 41, 8, 9, one.word()),
                "2 leaves of float32, 20 bytes"));
  CHECK(differs(MakeHeader("neighbor_allreduce", 41, 7, 8, 1200), "graph"));
  CHECK(differs(OperationHeader{}, "not a message of jfog"));
}

TEST_CASE("a long or unterminated name stays within the header") {
  const std::string name(100, 'x');
  auto header = MakeHeader(name, 0, 0, 0, 0);
  CHECK(NameOf(header) == name.substr(0, sizeof(header.operation) - 1));
  for (char& c : header.operation) c = 'y';
  CHECK(NameOf(header) == std::string(sizeof(header.operation), 'y'));
}

TEST_CASE("a step selects its round, and one out of range is an error") {
  const std::vector<Round> rounds(3);
  for (int step = 0; step < 3; ++step) {
    const auto round = FindRound(rounds, step);
    REQUIRE(round.has_value());
    CHECK(*round == &rounds[step]);
  }
  CHECK_FALSE(FindRound(rounds, 3).has_value());
  CHECK_FALSE(FindRound(rounds, -1).has_value());
}

struct FakeCommunicator {
  bool is_closed = false;
  FirstFailure failure;

  bool closed() const { return is_closed; }
  ffi::Error Refusal() { return failure.Refusal(); }
};

TEST_CASE("a communicator that is gone, closed or failed is not ready") {
  Registry<FakeCommunicator> comms;
  const auto number = comms.Add(std::make_shared<FakeCommunicator>());
  const auto comm = comms.Find(number);
  const auto refusal = [&](std::int64_t context) {
    return Ready(comms, context, "allreduce").error().message();
  };
  CHECK(*Ready(comms, number, "allreduce") == comm);
  const char* const gone =
      "jfog: allreduce on a communicator that was shut down "
      "[FAILED_PRECONDITION]";
  CHECK(refusal(number + 1) == gone);
  comm->failure.Set(ffi::ErrorCode::kAborted, "it has failed");
  CHECK(refusal(number) == "jfog: it has failed [ABORTED]");
  comm->is_closed = true;
  CHECK(refusal(number) == gone);
}

TEST_CASE("a plan is found again as the type that it was made as") {
  struct Plan : CallPlan<FakeCommunicator> {
    int value = 41;
  };
  Plan plan;
  CallPlan<FakeCommunicator>* const state = &plan;
  CHECK(&As<Plan>(state) == &plan);
  CHECK(As<Plan>(state).value == 41);
}

TEST_CASE("a handle is taken once") {
  HandleTable<int> handles;
  std::uint32_t first[2], second[2];
  handles.Insert(std::make_shared<int>(1), first);
  handles.Insert(std::make_shared<int>(2), second);
  CHECK(first[0] != second[0]);
  CHECK(**handles.Find(second, false, "poll") == 2);
  CHECK(**handles.Find(second, true, "wait") == 2);
  CHECK_FALSE(handles.Find(second, true, "wait").has_value());
  CHECK(handles.Forget([](int value) { return value == 1; }) == 1);
  CHECK_FALSE(handles.Find(first, false, "poll").has_value());
}

TEST_CASE("a handle's number does not repeat after 32 bits") {
  constexpr std::uint64_t kEnd = std::uint64_t{1} << 32;
  HandleTable<int> handles(kEnd - 2);
  std::uint32_t words[4][2];
  for (int i = 0; i < 4; ++i) {
    handles.Insert(std::make_shared<int>(i), words[i]);
  }
  CHECK(words[1][0] == 0xffffffffu);
  CHECK(words[1][1] == 0);
  CHECK(words[2][0] == 0);
  CHECK(words[2][1] == 1);
  for (int i : {3, 0, 2, 1}) CHECK(**handles.Find(words[i], true, "wait") == i);
}

TEST_CASE("a registry never reuses a number") {
  Registry<int> registry;
  const auto first = registry.Add(std::make_shared<int>(1));
  registry.Remove(first);
  const auto second = registry.Add(std::make_shared<int>(2));
  CHECK(first != second);
  CHECK(registry.Find(first) == nullptr);
  CHECK(*registry.Find(second) == 2);
  CHECK(registry.All().size() == 1);
}

TEST_CASE("a registry counts from any number, and wraps around") {
  Registry<int, std::uint32_t> registry(0xffffffffu);
  std::uint32_t handle = 0;
  registry.Write(registry.Add(std::make_shared<int>(1)), &handle);
  CHECK(handle == 0xffffffffu);
  CHECK(*registry.Find(&handle) == 1);
  CHECK(registry.Add(std::make_shared<int>(2)) == 0);
}

TEST_CASE("objects of a registry are found and removed by a predicate") {
  Registry<int> registry;
  for (int value : {1, 2, 3, 4}) registry.Add(std::make_shared<int>(value));
  const auto is_even = [](int value) { return value % 2 == 0; };
  CHECK(*registry.FindIf(is_even) == 2);
  CHECK(registry.RemoveIf(is_even).size() == 2);
  CHECK(registry.FindIf(is_even) == nullptr);
  CHECK(registry.All().size() == 2);
}

}  // namespace jfog
