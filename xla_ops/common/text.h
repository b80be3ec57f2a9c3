// The words that operations describe themselves in, the same on every backend.
#ifndef JFOG_XLA_OPS_COMMON_TEXT_H_
#define JFOG_XLA_OPS_COMMON_TEXT_H_

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "common/dtype.h"

namespace jfog {

using Clock = std::chrono::steady_clock;

// Mixes a value into a running 64-bit hash (the finaliser of SplitMix64).
inline std::uint64_t Mix(std::uint64_t hash, std::uint64_t value) {
  std::uint64_t z = hash + 0x9e3779b97f4a7c15u + value;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

double Seconds(Clock::duration duration);

// "2.5 s".
std::string Format(Clock::duration duration);

// "rank 1", "ranks 1, 2"; "the other ranks" of none.
std::string RankList(const std::vector<int>& ranks);

struct Shape {
  DataType type;
  std::size_t count;  // of elements
};

// "3 leaves, float32 x 1200, ..."
std::string Describe(const std::vector<Shape>& leaves);

// What ranks in one operation must have in common.
struct Identity {
  std::string name;
  std::uint64_t sequence;   // the how-manieth operation of the communicator
  std::uint64_t signature;  // dtypes and element counts of all leaves
  std::uint64_t variant;    // the graph and its round, the reduction, the root
  std::uint64_t bytes;      // of the payload, for the text alone
};

// How another rank differs from this one; empty if it does not.
std::string Difference(const Identity& mine, const Identity& theirs);

}  // namespace jfog

#endif  // JFOG_XLA_OPS_COMMON_TEXT_H_
