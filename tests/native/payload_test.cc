// Payloads: offsets, cuts between machines' ranks, and copies of parts.
#include "mpi/payload.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "mpi/segments.h"
#include "mpi/wire_format.h"

namespace jfog::mpi {
namespace {

struct Shape {
  DataType type;
  std::size_t count;
};

// A payload with its inputs and outputs.
struct Filled {
  explicit Filled(const std::vector<Shape>& shapes) {
    for (const Shape& shape : shapes) {
      std::vector<std::byte> input(shape.count * SizeOf(shape.type));
      for (std::size_t i = 0; i < input.size(); ++i) {
        input[i] = static_cast<std::byte>((i * 37 + inputs.size()) % 251);
      }
      outputs.emplace_back(input.size());
      inputs.push_back(std::move(input));
    }
    for (std::size_t i = 0; i < shapes.size(); ++i) {
      payload.leaves.push_back({shapes[i].type, shapes[i].count,
                                shapes[i].count, inputs[i].data(),
                                outputs[i].data(), 0});
    }
    payload.ComputeOffsets();
  }

  std::vector<std::vector<std::byte>> inputs, outputs;
  Payload payload;
};

const std::vector<std::vector<Shape>> kTrees = {
    {},
    {{DataType::F32, 0}},
    {{DataType::F64, 1}},
    {{DataType::BF16, 7}, {DataType::F32, 0}, {DataType::C128, 3}},
    {{DataType::PRED, 5}, {DataType::F32, 70001}, {DataType::S64, 13}},
    {{DataType::F32, 400000}, {DataType::BF16, 333333}, {DataType::U8, 1}},
};

std::size_t EndOf(const Payload& payload) {
  if (payload.size() == 0) return 0;
  const Leaf& last = payload[payload.size() - 1];
  return last.offset + last.bytes();
}

}  // namespace

TEST_CASE("leaves start at cache lines and do not overlap") {
  for (const auto& shapes : kTrees) {
    const Filled filled(shapes);
    std::size_t end = 0, bytes = 0;
    for (const Leaf& leaf : filled.payload) {
      CHECK(leaf.offset % 64 == 0);
      CHECK(leaf.offset >= end);
      end = leaf.offset + leaf.bytes();
      bytes += leaf.bytes();
    }
    CHECK(filled.payload.bytes == bytes);
    CHECK(filled.payload.BytesIn(0, EndOf(filled.payload)) == bytes);
  }
}

TEST_CASE("segments cover the payload once, in parts of at most a chunk") {
  for (const auto& shapes : kTrees) {
    for (const std::size_t parts : {1, 2, 3, 5, 8}) {
      const Filled filled(shapes);
      const Segments segments(filled.payload, parts);
      std::size_t at = 0, bytes = 0;
      for (std::size_t s = 0; s < segments.size(); ++s) {
        for (std::size_t k = 0; k < parts; ++k) {
          REQUIRE(segments.Begin(s, k) == at);
          REQUIRE(segments.End(s, k) >= at);
          at = segments.End(s, k);
          if (!segments.is_short()) CHECK(segments.Size(s, k) <= kChunk);
          CHECK(segments.Size(s, k) <= segments.longest());
        }
      }
      CHECK(at == EndOf(filled.payload));
      for (std::size_t k = 0; k < parts; ++k) bytes += segments.LeafBytes(k);
      CHECK(bytes == filled.payload.bytes);
    }
  }
}

TEST_CASE("parts are copied out and in again") {
  for (const auto& shapes : kTrees) {
    for (const std::size_t parts : {1, 3, 4}) {
      Filled filled(shapes);
      const Segments segments(filled.payload, parts);
      for (std::size_t s = 0; s < segments.size(); ++s) {
        for (std::size_t k = 0; k < parts; ++k) {
          const std::size_t begin = segments.Begin(s, k);
          const std::size_t end = segments.End(s, k);
          std::vector<std::byte> message(end - begin + 1);
          filled.payload.CopyOut(begin, end, message.data());
          filled.payload.CopyIn(begin, end, message.data());
        }
      }
      CHECK(filled.outputs == filled.inputs);
    }
  }
}

TEST_CASE("signatures depend on dtypes and element counts, in order") {
  const auto signature = [](const std::vector<Shape>& shapes) {
    return Filled(shapes).payload.Signature();
  };
  const auto one = signature({{DataType::F32, 3}, {DataType::F32, 5}});
  CHECK(one == signature({{DataType::F32, 3}, {DataType::F32, 5}}));
  CHECK(one != signature({{DataType::F32, 5}, {DataType::F32, 3}}));
  CHECK(one != signature({{DataType::S32, 3}, {DataType::F32, 5}}));
  CHECK(one != signature({{DataType::F32, 3}}));
}

}  // namespace jfog::mpi
