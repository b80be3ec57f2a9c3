// Durations, ranks and leaves as text, equal on every backend.
#include "common/format.h"

#include <cstdio>

namespace jfog {
namespace {

constexpr std::size_t kDescribed = 3;

}  // namespace

double Seconds(Clock::duration duration) {
  return std::chrono::duration<double>(duration).count();
}

std::string Format(Clock::duration duration) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.1f s", Seconds(duration));
  return text;
}

std::string RankList(const std::vector<int>& ranks) {
  if (ranks.empty()) return "the other ranks";
  std::string text = ranks.size() == 1 ? "rank " : "ranks ";
  for (std::size_t i = 0; i < ranks.size(); ++i) {
    if (i > 0) text += ", ";
    text += std::to_string(ranks[i]);
  }
  return text;
}

std::string Describe(const std::vector<Shape>& leaves) {
  if (leaves.empty()) return "no leaves";
  std::string text = std::to_string(leaves.size());
  text += leaves.size() == 1 ? " leaf" : " leaves";
  for (std::size_t i = 0; i < leaves.size() && i < kDescribed; ++i) {
    text += std::string(", ") + NameOf(leaves[i].type) + " x " +
            std::to_string(leaves[i].count);
  }
  if (leaves.size() > kDescribed) text += ", ...";
  return text;
}

}  // namespace jfog
