// SPDX-License-Identifier: BSD-3-Clause
#include "testing/rank_report.h"

#include <unistd.h>

#include "reshard/core/bytes.h"

namespace reshard::testing_detail {

void write_record(int fd, const RankRecord& record) {
  ByteWriter body;
  body.u8(static_cast<uint8_t>(record.kind));
  body.i64(record.at.time_since_epoch().count());
  body.string(record.file);
  body.i64(record.line);
  body.string(record.message);
  ByteWriter whole;
  whole.u32(static_cast<uint32_t>(body.size()));
  whole.bytes(body.buffer());
  if (write(fd, whole.buffer().data(), whole.size()) < 0) return;
}

std::vector<RankRecord> read_records(std::string_view report) {
  std::vector<RankRecord> records;
  ByteReader reader(as_bytes(report), "rank report");
  try {
    while (!reader.at_end()) {
      ByteReader body(reader.bytes(reader.u32()), "rank report");
      RankRecord record;
      record.kind = static_cast<RankRecord::Kind>(body.u8());
      record.at = std::chrono::steady_clock::time_point(std::chrono::steady_clock::duration(body.i64()));
      record.file = body.string();
      record.line = static_cast<int>(body.i64());
      record.message = body.string();
      records.push_back(std::move(record));
    }
  } catch (const Error&) {  // cut short by the rank's death: what is whole counts
  }
  return records;
}

}  // namespace reshard::testing_detail
