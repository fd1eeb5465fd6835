// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/launch/gpu.h"

#include <dlfcn.h>

#include <charconv>
#include <cstdlib>
#include <string>
#include <string_view>

#include "reshard/core/error.h"

namespace reshard {
namespace {

int ask_driver() {
  void* driver =
      dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);  // stays loaded: the driver does not like to be unloaded
  if (driver == nullptr) return 0;
  const auto init = reinterpret_cast<int (*)(unsigned)>(dlsym(driver, "cuInit"));
  const auto get_count = reinterpret_cast<int (*)(int*)>(dlsym(driver, "cuDeviceGetCount"));
  int count = 0;
  if (init == nullptr || get_count == nullptr || init(0) != 0 || get_count(&count) != 0) return 0;
  return count;
}

}  // namespace

int nvidia_gpu_count() {
  if (const char* made_up = std::getenv("RESHARD_TEST_GPU_COUNT")) {
    const std::string_view text = made_up;
    int count = -1;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), count);
    if (error != std::errc() || end != text.data() + text.size() || count < 0) {
      throw Error(ErrorCode::kInvalidArgument, "environment variable RESHARD_TEST_GPU_COUNT",
                  {.wanted = "a number of GPUs", .found = '"' + std::string(text) + '"'});
    }
    return count;
  }
  static const int count = ask_driver();
  return count;
}

}  // namespace reshard
