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

template <typename T, typename Number = std::int64_t>
class Registry {
 public:
  // `first` is the number of the first object.
  explicit Registry(Number first = 0) : next_(first) {}

  // Adds an object under the next number, which is never reused.
  Number Add(std::shared_ptr<T> object) {
    std::lock_guard<std::mutex> lock(mutex_);
    objects_.emplace(next_, std::move(object));
    return next_++;
  }
  // Adds an object under a number of the caller.
  void Insert(Number number, std::shared_ptr<T> object) {
    std::lock_guard<std::mutex> lock(mutex_);
    objects_[number] = std::move(object);
  }
  // Gives an object another number, in place of what has that one.
  void Move(Number from, Number to) {
    std::shared_ptr<T> replaced;  // destroyed after the lock is dropped
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = objects_.find(from);
    if (from == to || found == objects_.end()) return;
    replaced = std::move(objects_[to]);
    objects_[to] = std::move(found->second);
    objects_.erase(found);
  }
  // Null if there is none.
  std::shared_ptr<T> Find(Number number) { return Find(&number); }
  // A number in a buffer of XLA is read and written under the lock: XLA passes
  // it from one thread to another by means that ThreadSanitizer does not see.
  std::shared_ptr<T> Find(const Number* number) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = objects_.find(*number);
    return found == objects_.end() ? nullptr : found->second;
  }
  void Write(Number number, Number* to) {
    std::lock_guard<std::mutex> lock(mutex_);
    *to = number;
  }
  // The first object of which `matches` is true, or null.
  template <typename Predicate>
  std::shared_ptr<T> FindIf(Predicate matches) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& [number, object] : objects_) {
      if (matches(*object)) return object;
    }
    return nullptr;
  }
  void Remove(Number number) {
    std::shared_ptr<T> removed;  // destroyed after the lock is dropped
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = objects_.find(number);
    if (found == objects_.end()) return;
    removed = std::move(found->second);
    objects_.erase(found);
  }
  // Removes the objects of which `matches` is true, and returns them.
  template <typename Predicate>
  std::vector<std::shared_ptr<T>> RemoveIf(Predicate matches) {
    std::vector<std::shared_ptr<T>> removed;
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto it = objects_.begin(); it != objects_.end();) {
      if (matches(*it->second)) {
        removed.push_back(std::move(it->second));
        it = objects_.erase(it);
      } else {
        ++it;
      }
    }
    return removed;
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
  std::map<Number, std::shared_ptr<T>> objects_;
  Number next_;
};

}  // namespace jfog

#endif  // JFOG_XLA_OPS_COMMON_REGISTRY_H_
