// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// What a rank tells its parent through the launcher's report descriptor: one record for each failed or skipped
// assertion, when it happens, and one when the case has run to its end. Each record is written by one write(2) as u32
// length and content, so that a rank that is killed leaves whole records.

#include <chrono>
#include <string>
#include <string_view>
#include <vector>

namespace reshard::testing_detail {

struct RankRecord {
  enum class Kind : unsigned char { kFailure, kSkip, kComplete };
  Kind kind = Kind::kFailure;
  std::chrono::steady_clock::time_point at{};  // the same clock in all processes
  std::string file = {};                       // empty: unknown
  int line = 0;
  std::string message = {};
};

/// Appends a record to the file; silently drops what cannot be written.
void write_record(int fd, const RankRecord& record);

/// All whole records; what follows them is left out.
std::vector<RankRecord> read_records(std::string_view report);

}  // namespace reshard::testing_detail
