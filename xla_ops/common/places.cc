// Places in the user's program from which operations are called.
#include "common/places.h"

#include <map>
#include <mutex>
#include <set>
#include <utility>

#include "common/process_wide.h"

namespace jfog {
namespace {

// More are not named in a text.
constexpr std::size_t kMostPlaces = 3;

struct Places {
  std::mutex mutex;
  // By operation, bytes and place.
  std::map<std::string, std::map<std::size_t, std::set<std::string>>> calls;
  // Texts of leaves, by operation and bytes.
  std::map<std::pair<std::string, std::size_t>,
           std::set<std::vector<std::string>>>
      leaves;
};

}  // namespace

void AddPlace(const std::string& operation, std::size_t bytes,
              const std::string& place,
              const std::vector<std::string>& leaves) {
  auto& places = ProcessWide<Places>();
  std::lock_guard<std::mutex> lock(places.mutex);
  places.calls[operation][bytes].insert(place);
  places.leaves[{operation, bytes}].insert(leaves);
}

std::string LeafOf(const std::string& operation, std::size_t bytes,
                   std::size_t leaves, std::size_t number) {
  auto& places = ProcessWide<Places>();
  std::lock_guard<std::mutex> lock(places.mutex);
  std::set<std::string> found;
  const auto calls = places.leaves.find({operation, bytes});
  if (calls != places.leaves.end()) {
    for (const std::vector<std::string>& texts : calls->second) {
      if (texts.size() == leaves) found.insert(texts[number]);
    }
  }
  return found.size() == 1 ? *found.begin() : "leaf " + std::to_string(number);
}

std::string PlaceOf(const std::string& operation, std::size_t bytes) {
  auto& places = ProcessWide<Places>();
  std::lock_guard<std::mutex> lock(places.mutex);
  const auto calls = places.calls.find(operation);
  if (calls == places.calls.end()) return "";
  std::set<std::string> found;
  for (const auto& [size, texts] : calls->second) {
    const bool exact = calls->second.count(bytes) > 0;
    if (!exact || size == bytes) found.insert(texts.begin(), texts.end());
  }
  std::string text;
  std::size_t named = 0;
  for (const std::string& place : found) {
    if (named == kMostPlaces) return text + " or elsewhere";
    text += (named++ == 0 ? "" : " or ") + place;
  }
  return text;
}

}  // namespace jfog
