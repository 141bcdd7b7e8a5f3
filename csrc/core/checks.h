// Error reporting: PTK_CHECK(condition, parts...) throws std::runtime_error, which torch's boxed-kernel shim turns into
// a Python RuntimeError with the same text.
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>

namespace ptk {

inline void append_text(std::string& text, std::string_view part) {
  text += part;
}

template <typename Number>
  requires std::is_arithmetic_v<Number>
void append_text(std::string& text, Number part) {
  text += std::to_string(part);
}

template <typename... Parts>
[[noreturn, gnu::noinline, gnu::cold]] void fail(const Parts&... parts) {
  std::string text;
  (append_text(text, parts), ...);
  throw std::runtime_error(text);
}

// "[2, 3, 4]" of any range of integers.
template <typename Range>
std::string shape_text(const Range& sizes) {
  std::string text = "[";
  for (const auto size : sizes) {
    text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  }
  return text + "]";
}

}  // namespace ptk

#define PTK_CHECK(condition, ...)                                                                                      \
  do {                                                                                                                 \
    if (!(condition)) [[unlikely]]                                                                                     \
      ::ptk::fail(__VA_ARGS__);                                                                                        \
  } while (false)
