// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Prints the stack of the thread that gets a fatal signal, then lets the signal kill. For ranks: a launcher past its
// deadline sends SIGABRT and shows what the rank says.

namespace reshard::testing_detail {

/// Installs the printer on the fatal signals that nobody handles yet (a sanitizer's own report is better).
void install_stack_printer();

}  // namespace reshard::testing_detail
