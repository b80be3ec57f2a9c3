// Objects of this process by the number that operations name them by.
#ifndef JFOG_XLA_OPS_COMMON_REGISTRY_H_
#define JFOG_XLA_OPS_COMMON_REGISTRY_H_

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace jfog {

template <typename T>
class Registry {
 public:
  // Adds an object under the next number, which is never reused.
  std::int64_t Add(std::shared_ptr<T> object) {
    std::lock_guard<std::mutex> lock(mutex_);
    objects_.emplace(next_, std::move(object));
    return next_++;
  }
  // Adds an object under a number of the caller.
  void Insert(std::int64_t number, std::shared_ptr<T> object) {
    std::lock_guard<std::mutex> lock(mutex_);
    objects_[number] = std::move(object);
  }
  // Null if there is none.
  std::shared_ptr<T> Find(std::int64_t number) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = objects_.find(number);
    return found == objects_.end() ? nullptr : found->second;
  }
  void Remove(std::int64_t number) {
    std::shared_ptr<T> removed;  // destroyed after the lock is dropped
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = objects_.find(number);
    if (found == objects_.end()) return;
    removed = std::move(found->second);
    objects_.erase(found);
  }
  // In ascending order of their numbers.
  std::vector<std::shared_ptr<T>> All() {
    std::lock_guard<std::mutex> lock(mutex_);
    std::vector<std::shared_ptr<T>> all;
    for (const auto& [number, object] : objects_) all.push_back(object);
    return all;
  }

 private:
  std::mutex mutex_;
  std::map<std::int64_t, std::shared_ptr<T>> objects_;
  std::int64_t next_ = 0;
};

}  // namespace jfog

#endif  // JFOG_XLA_OPS_COMMON_REGISTRY_H_
