// The words that operations describe themselves in, the same on every backend.
#include "common/text.h"

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

std::string Difference(const Identity& mine, const Identity& theirs) {
  if (theirs.sequence != mine.sequence || theirs.name != mine.name) {
    return "it is in " + theirs.name + " #" + std::to_string(theirs.sequence) +
           "; all ranks must run the same operations in one order";
  }
  if (theirs.signature != mine.signature) {
    return "it sent other dtypes or shapes (" + std::to_string(theirs.bytes) +
           " bytes)";
  }
  if (theirs.variant != mine.variant) {
    return "it uses another graph, step, reduction or root";
  }
  return "";
}

}  // namespace jfog
