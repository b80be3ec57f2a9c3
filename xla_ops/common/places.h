// Places in the user's program from which operations are called.
#ifndef JFOG_XLA_OPS_COMMON_PLACES_H_
#define JFOG_XLA_OPS_COMMON_PLACES_H_

#include <cstddef>
#include <string>
#include <vector>

namespace jfog {

// Records that a place such as "train.py:12" calls an operation on leaves of so
// many bytes, with texts such as "x['w'] of shape (3, 4)" for the leaves. A
// running operation has no mark of its place, for an attribute would change its
// program, and so the keys of JAX's persistent cache.
void AddPlace(const std::string& operation, std::size_t bytes,
              const std::string& place, const std::vector<std::string>& leaves);

// The text of a leaf of an operation on so many bytes and leaves; "leaf 2" if
// there is none, or calls differ in it.
std::string LeafOf(const std::string& operation, std::size_t bytes,
                   std::size_t leaves, std::size_t number);

// The places that call an operation on so many bytes, or else at all:
// "train.py:12 or eval.py:7". Empty if there are none.
std::string PlaceOf(const std::string& operation, std::size_t bytes);

}  // namespace jfog

#endif  // JFOG_XLA_OPS_COMMON_PLACES_H_
