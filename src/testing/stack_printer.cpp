// SPDX-License-Identifier: BSD-3-Clause
#include "testing/stack_printer.h"

#include <execinfo.h>
#include <signal.h>
#include <unistd.h>

#include <array>

#include "reshard/testing/distributed_test.h"

namespace reshard::testing_detail {
namespace {

constexpr std::array kFatalSignals = {SIGABRT, SIGSEGV, SIGBUS, SIGILL, SIGFPE};

void print_stack(int signal) {
  std::array<void*, 64> frames;
  const int count = backtrace(frames.data(), static_cast<int>(frames.size()));
  backtrace_symbols_fd(frames.data(), count, STDERR_FILENO);
  raise(signal);  // the handler is gone (SA_RESETHAND): this one kills
}

bool is_ours(int signal) {
  struct sigaction now;
  return sigaction(signal, nullptr, &now) == 0 && now.sa_handler == print_stack;
}

}  // namespace

void install_stack_printer() {
  void* frame = nullptr;
  backtrace(&frame, 1);  // its first call loads a library, which a signal handler must not
  for (int signal : kFatalSignals) {
    struct sigaction now;
    if (sigaction(signal, nullptr, &now) != 0 || now.sa_handler != SIG_DFL) continue;
    struct sigaction action = {};
    action.sa_handler = print_stack;
    action.sa_flags = SA_RESETHAND;
    sigaction(signal, &action, nullptr);
  }
}

void remove_stack_printer() {
  for (int number : kFatalSignals) {
    if (is_ours(number)) signal(number, SIG_DFL);
  }
}

}  // namespace reshard::testing_detail
