// Element types: their sizes and names.
#include "common/dtype.h"

namespace jfog {

std::size_t SizeOf(DataType type) {
  switch (type) {
#define JFOG_SIZE(dtype, name, stored, accumulated, weight, ...) \
  case DataType::dtype:                                          \
    return sizeof(stored);
    JFOG_FOR_EACH_DTYPE(JFOG_SIZE)
#undef JFOG_SIZE
    default:
      return 0;
  }
}

const char* NameOf(DataType type) {
  switch (type) {
#define JFOG_NAME(dtype, name, stored, accumulated, weight, ...) \
  case DataType::dtype:                                          \
    return name;
    JFOG_FOR_EACH_DTYPE(JFOG_NAME)
#undef JFOG_NAME
    default:
      return "?";
  }
}

}  // namespace jfog
