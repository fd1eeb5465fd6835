// SPDX-License-Identifier: BSD-3-Clause
#include "fuzz/fuzz.h"

#include <malloc.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <new>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "reshard/core/error.h"

#if defined(__SANITIZE_ADDRESS__)
#define RESHARD_FUZZ_ADDRESS_SANITIZER
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define RESHARD_FUZZ_ADDRESS_SANITIZER
#endif
#endif
#ifdef RESHARD_FUZZ_ADDRESS_SANITIZER
// As sanitizer/allocator_interface.h has them; GCC comes without that header.
extern "C" {
int __sanitizer_install_malloc_and_free_hooks(void (*malloc_hook)(const volatile void*, size_t),
                                              void (*free_hook)(const volatile void*));
size_t __sanitizer_get_allocated_size(const volatile void* p);
}
#endif

// Allocations are counted; one that passes the limit ends the program at once, so that its stack is the finding. Targets
// use one thread.
namespace {

constexpr size_t kNoLimit = static_cast<size_t>(-1);
size_t live = 0;  // bytes
size_t peak = 0;
size_t limit = kNoLimit;

void check(size_t size) {
  if (limit == kNoLimit || (size <= limit && live <= limit - size)) return;
  const size_t allowed = std::exchange(limit, kNoLimit);
  std::fprintf(stderr, "allocation out of proportion: %zu bytes beside %zu, and %zu are allowed\n", size, live,
               allowed);
  std::abort();
}
void add(size_t size) {
  live += size;
  peak = std::max(peak, live);
}

}  // namespace

#ifdef RESHARD_FUZZ_ADDRESS_SANITIZER
namespace {
[[maybe_unused]] const int hooked = __sanitizer_install_malloc_and_free_hooks(
    [](const volatile void*, size_t size) {
      check(size);
      add(size);
    },
    [](const volatile void* p) {
      // What was allocated before the hooks were there is freed, too.
      if (p != nullptr) live -= std::min(live, __sanitizer_get_allocated_size(p));
    });
}  // namespace
#else
void* operator new(size_t size) {
  check(size);
  void* p = std::malloc(std::max<size_t>(size, 1));
  if (p == nullptr) std::abort();
  add(::malloc_usable_size(p));
  return p;
}
void operator delete(void* p) noexcept {
  if (p != nullptr) live -= ::malloc_usable_size(p);
  std::free(p);
}
void operator delete(void* p, size_t) noexcept { operator delete(p); }
#endif

namespace reshard::fuzz {

void require(bool holds, const char* property) {
  if (holds) return;
  std::fprintf(stderr, "property does not hold: %s\n", property);
  std::abort();
}

void limit_memory(size_t bytes, const std::function<void()>& body) {
  const size_t before = live;
  peak = live;
  limit = live + bytes;
  struct Lift {
    ~Lift() { limit = kNoLimit; }
  } lift;
  body();
  if (std::getenv("FUZZ_SHOW_PEAK") != nullptr)
    std::fprintf(stderr, "%zu of %zu bytes allocated\n", peak - before, bytes);
}

namespace {

void run(ByteSpan input) {
  try {
    target(input);
  } catch (const Error& error) {
    if (error.code() == ErrorCode::kCorruptData || error.code() == ErrorCode::kUnsupported) return;
    std::fprintf(stderr, "refused with another code: %s\n", error.what());
    std::abort();
  }
}

}  // namespace
}  // namespace reshard::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  reshard::fuzz::run(std::as_bytes(std::span(data, size)));
  return 0;
}

#ifdef RESHARD_FUZZ_REPLAY
// Reads the named files and the files of the named folders. The one being read is named before, in case it is the last.
int main(int argc, char** argv) {
  namespace fs = std::filesystem;
  std::vector<fs::path> files;
  for (int i = 1; i < argc; ++i) {
    if (!fs::is_directory(argv[i])) {
      files.emplace_back(argv[i]);
      continue;
    }
    for (const auto& entry : fs::directory_iterator(argv[i])) files.push_back(entry.path());
  }
  std::sort(files.begin(), files.end());
  for (const fs::path& file : files) {
    std::ifstream in(file, std::ios::binary);
    if (!in) {
      std::fprintf(stderr, "cannot read %s\n", file.c_str());
      return 1;
    }
    // A copy of its own length: reading past its end is seen by AddressSanitizer.
    const std::string text((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
    const std::vector<char> bytes(text.begin(), text.end());
    std::printf("%s\n", file.c_str());
    std::fflush(stdout);
    reshard::fuzz::run(std::as_bytes(std::span(bytes)));
  }
  std::printf("%zu inputs read\n", files.size());
  return files.empty() ? 1 : 0;
}
#endif
