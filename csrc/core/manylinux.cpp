// Keeps libptkernels.so loadable on manylinux_2_28 (glibc 2.28, GLIBCXX_3.4.25) when a newer GCC builds it, by defining
// here the few newer symbols that standard headers refer to. The export map keeps the definitions inside the library.
// Linking libstdc++ statically would not do: the copy that comes with a newer GCC needs a newer glibc itself.
#include <new>
#include <sstream>

#if defined(__GLIBC__) && defined(__GLIBCXX__)

// The default constructors (3.4.26) and the C++20 overloads of str() (3.4.29) that torch's headers use.
template class std::basic_stringbuf<char>;
template class std::basic_stringstream<char>;

// What containers raise for sizes beyond memory (3.4.29).
namespace std {
void __throw_bad_array_new_length() {
  throw bad_array_new_length();
}
}  // namespace std
template class std::basic_ostringstream<char>;

// std::shared_ptr reads this flag of glibc 2.32 to drop atomic operations in programs without threads: never here.
extern "C" char __libc_single_threaded;
char __libc_single_threaded = 0;

#if defined(__x86_64__)
// glibc 2.29 gave these functions versions that leave errno alone; the older ones return the same values.
#define PTK_USE_OLD(function)                                                                                          \
  __asm__(".symver ptk_old_" #function ", " #function "@GLIBC_2.2.5");                                                 \
  extern "C" double ptk_old_##function(double);                                                                        \
  extern "C" double function(double x) noexcept {                                                                      \
    return ptk_old_##function(x);                                                                                      \
  }

PTK_USE_OLD(exp)
PTK_USE_OLD(exp2)
PTK_USE_OLD(log)
PTK_USE_OLD(log2)
#endif

#endif
