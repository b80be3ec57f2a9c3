// Element types: their sizes and names.
#include "common/dtype.h"

namespace jfog {

std::size_t SizeOf(DataType type) {
  switch (type) {
    case DataType::PRED:
    case DataType::S8:
    case DataType::U8:
      return 1;
    case DataType::S16:
    case DataType::U16:
    case DataType::F16:
    case DataType::BF16:
      return 2;
    case DataType::S32:
    case DataType::U32:
    case DataType::F32:
      return 4;
    case DataType::S64:
    case DataType::U64:
    case DataType::F64:
    case DataType::C64:
      return 8;
    case DataType::C128:
      return 16;
    default:
      return 0;
  }
}

const char* NameOf(DataType type) {
  switch (type) {
    case DataType::PRED:
      return "bool";
    case DataType::S8:
      return "int8";
    case DataType::U8:
      return "uint8";
    case DataType::S16:
      return "int16";
    case DataType::U16:
      return "uint16";
    case DataType::F16:
      return "float16";
    case DataType::BF16:
      return "bfloat16";
    case DataType::S32:
      return "int32";
    case DataType::U32:
      return "uint32";
    case DataType::F32:
      return "float32";
    case DataType::S64:
      return "int64";
    case DataType::U64:
      return "uint64";
    case DataType::F64:
      return "float64";
    case DataType::C64:
      return "complex64";
    case DataType::C128:
      return "complex128";
    default:
      return "?";
  }
}

}  // namespace jfog
