// A 64-bit hash of the values that ranks compare.
#ifndef JFOG_XLA_OPS_COMMON_HASH_H_
#define JFOG_XLA_OPS_COMMON_HASH_H_

#include <cstdint>
#include <string>

namespace jfog {

// Mixes a value into a running hash (the finalizer of SplitMix64).
inline std::uint64_t Mix(std::uint64_t hash, std::uint64_t value) {
  std::uint64_t z = hash + 0x9e3779b97f4a7c15u + value;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

inline std::uint64_t Mix(std::uint64_t hash, const std::string& text) {
  for (const char c : text) hash = Mix(hash, static_cast<unsigned char>(c));
  return hash;
}

}  // namespace jfog

#endif  // JFOG_XLA_OPS_COMMON_HASH_H_
