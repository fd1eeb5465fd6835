// SPDX-License-Identifier: BSD-3-Clause
// `reshard inspect --map`.
#include <gmock/gmock.h>

#include <fstream>
#include <regex>

#include "cli/run_cli.h"
#include "support/run_python.h"

namespace reshard {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::Not;

class InspectMapTest : public CliTest {
 protected:
  std::string map() {
    const CommandResult run = reshard_command({"inspect", path(), "--map", out("map.svg"), "-f"});
    EXPECT_EQ(run.exit_code, 0) << run.err;
    return text_of(out("map.svg"));
  }
};

struct Drawn {
  double x, y, width, height;
  std::string fill;
};
/// The rectangle whose title begins so.
Drawn rectangle(const std::string& svg, const std::string& title) {
  const size_t at = svg.find("<title>" + title);
  EXPECT_NE(at, std::string::npos) << title << "\n" << svg;
  const std::string head = svg.substr(0, at);
  const std::string rect = head.substr(head.rfind("<rect"));
  std::smatch m;
  EXPECT_TRUE(std::regex_search(
      rect, m,
      std::regex("x=\"([0-9.]+)\" y=\"([0-9.]+)\" width=\"([0-9.]+)\" height=\"([0-9.]+)\".*fill=\"([^\"]+)\"")));
  return {std::stod(m[1]), std::stod(m[2]), std::stod(m[3]), std::stod(m[4]), m[5]};
}

TEST_F(InspectMapTest, DrawsEachChunkInTheColourOfItsFile) {
  const std::string svg = map();
  const Drawn top = rectangle(svg, "model.weight [0, 0]+[3, 4] in __0_0.distcp");
  const Drawn bottom = rectangle(svg, "model.weight [3, 0]+[3, 4] in __1_0.distcp");
  EXPECT_EQ(top.x, bottom.x);
  EXPECT_EQ(top.width, bottom.width);
  EXPECT_DOUBLE_EQ(top.y + top.height, bottom.y);
  EXPECT_NE(top.fill, bottom.fill);
  EXPECT_THAT(svg, HasSubstr("model.bias"));
  EXPECT_THAT(svg, HasSubstr("float32 [6, 4]"));
}

TEST_F(InspectMapTest, TakesTheDimensionsThatAreCut) {
  std::vector<MemorySaveState> ranks;
  for (const auto& mine : split({2, 3, 8}, 2, 2))
    ranks.push_back(MemorySaveState({tensor_entry("cube", {2, 3, 8}, mine)}));
  save_checkpoint(path(), ranks);
  const std::string svg = map();
  const Drawn left = rectangle(svg, "cube [0, 0, 0]");
  const Drawn right = rectangle(svg, "cube [0, 0, 4]");
  EXPECT_DOUBLE_EQ(left.x + left.width, right.x);
  EXPECT_EQ(left.y, right.y);
}

TEST_F(InspectMapTest, IsXmlWhateverTheKeys) {
  save_checkpoint(path(),
                  states<MemorySaveState>({{replica_entry("<a & \"b\">\x1b\n", {2}), replica_entry("scalar", {}),
                                            replica_entry("empty", {0, 3}), replica_entry("1d", {7})}}));
  const std::string svg = map();
  EXPECT_THAT(svg, HasSubstr("&lt;a &amp; &quot;b&quot;&gt;\\x1b\\x0a"));
  EXPECT_THAT(svg, Not(HasSubstr("\x1b")));
  EXPECT_THAT(svg, Not(HasSubstr("nan")));
  if (!has_python()) GTEST_SKIP() << "no Python to parse it";
  const std::string command =
      "'" RESHARD_PYTHON "' -c \"import sys, xml.dom.minidom as m; m.parse(sys.argv[1])\" '" + out("map.svg") + "'";
  EXPECT_EQ(std::system(command.c_str()), 0);
}

TEST_F(InspectMapTest, GoldenCheckpointsAreDrawn) {
  for (const std::string& name : OracleCase::names()) {
    const CommandResult run =
        reshard_command({"inspect", OracleCase(name).directory().string(), "--map", out("map.svg"), "--force"});
    EXPECT_EQ(run.exit_code, 0) << name << run.err;
    EXPECT_TRUE(text_of(out("map.svg")).ends_with("</svg>\n"));
  }
}

TEST_F(InspectMapTest, IsNotWrittenOverWhatIsThere) {
  EXPECT_EQ(reshard_command({"inspect", path(), "--map", path() + "/map.svg"}).exit_code, 1);
  std::ofstream(out("map.svg")) << "old";
  EXPECT_EQ(reshard_command({"inspect", path(), "--map", out("map.svg")}).exit_code, 1);
  EXPECT_EQ(text_of(out("map.svg")), "old");
  EXPECT_THAT(names_out(), ElementsAre("map.svg"));
}

}  // namespace
}  // namespace reshard
