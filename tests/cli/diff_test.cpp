// SPDX-License-Identifier: BSD-3-Clause
// `reshard diff`.
#include <gmock/gmock.h>

#include <cmath>
#include <fstream>

#include "cli/run_cli.h"
#include "support/torch_files.h"

namespace reshard {
namespace {

using pickle::Tree;
using pickle::Value;
using testing::HasSubstr;

class DiffTest : public CliTest {
 protected:
  /// A file with these entries.
  std::string file(const std::string& name,
                   const std::function<std::vector<std::pair<std::string, Value>>(TorchFile&)>& make) {
    TorchFile torch_file;
    torch_file.write(out(name), torch_file.dict(make(torch_file)));
    return out(name);
  }
  std::string vector(const std::string& name, std::vector<float> values) {
    return file(name, [&](TorchFile& f) {
      return std::vector<std::pair<std::string, Value>>{
          {"w", f.tensor(DType::kFloat32, {static_cast<int64_t>(values.size())}, floats(values))}};
    });
  }
};

TEST_F(DiffTest, TheSameIsZeroAndSilent) {
  const CommandResult run = reshard_command({"diff", path(), path()});
  EXPECT_EQ(run.exit_code, 0);
  EXPECT_EQ(run.out + run.err, "");
  EXPECT_EQ(reshard_command({"diff", "--json", path(), path()}).out, "{}\n");
}

TEST_F(DiffTest, NamesEachDifferenceOnALine) {
  const auto a = file("a.pt", [](TorchFile& f) {
    return std::vector<std::pair<std::string, Value>>{
        {"gone", Tree::integer(1)},
        {"shape", f.tensor(DType::kFloat32, {2, 3}, counting(6))},
        {"dtype", f.tensor(DType::kFloat32, {1}, counting(1))},
        {"kind", f.tensor(DType::kFloat32, {1}, counting(1))},
        {"values", f.tensor(DType::kFloat32, {2, 2}, floats({1, 2, 3, 4}))},
        {"same", f.tensor(DType::kFloat32, {2}, counting(2))},
        {"step", Tree::integer(7)}};
  });
  const auto b = file("b.pt", [](TorchFile& f) {
    return std::vector<std::pair<std::string, Value>>{
        {"shape", f.tensor(DType::kFloat32, {3, 2}, counting(6))},
        {"dtype", f.tensor(DType::kInt32, {1}, counting(1))},
        {"kind", Tree::none()},
        {"values", f.tensor(DType::kFloat32, {2, 2}, floats({1, 2.5, 3, 2}))},
        {"same", f.tensor(DType::kFloat32, {2}, counting(2))},
        {"step", f.tree.str("eight")},
        {"new", f.tensor(DType::kBFloat16, {2}, Bytes(4))}};
  });
  const CommandResult run = reshard_command({"diff", a, b});
  EXPECT_EQ(run.exit_code, 1);
  EXPECT_EQ(run.out,
            "- gone: value\n"
            "~ shape: float32 [2, 3] -> float32 [3, 2]\n"
            "~ dtype: float32 [1] -> int32 [1]\n"
            "~ kind: float32 [1] -> value\n"
            "~ values: 2 of 4 elements differ, most at [1, 1]: by 2\n"
            "~ step: 7 -> \"eight\"\n"
            "+ new: bfloat16 [2]\n");
  const auto json = nlohmann::json::parse(reshard_command({"diff", "--json", a, b}).out);
  EXPECT_EQ(json.at("gone"), (nlohmann::json{{"only_in", "a"}}));
  EXPECT_EQ(json.at("values").at("values"),
            (nlohmann::json{{"elements", 4}, {"different", 2}, {"at", {1, 1}}, {"largest", 2.0}}));
  EXPECT_EQ(json.at("step").at("value"), (nlohmann::json{7, "eight"}));
  EXPECT_FALSE(json.contains("same"));
  const CommandResult quiet = reshard_command({"diff", "-q", a, b});
  EXPECT_EQ(quiet.exit_code, 1);
  EXPECT_EQ(quiet.out + quiet.err, "");
  // The place of a difference does not depend on the blocks.
  EXPECT_EQ(reshard_command({"diff", a, b, "--block-bytes", "4"}).out, run.out);
}

TEST_F(DiffTest, TolerancesAreThoseOfAllclose) {
  const auto a = vector("a.pt", {1, 100, NAN, INFINITY, 0.0f});
  const auto near = vector("near.pt", {1.05f, 101, NAN, INFINITY, -0.0f});
  EXPECT_THAT(reshard_command({"diff", a, near}).out, HasSubstr("3 of 5 elements differ, most at [1]: by 1\n"));
  EXPECT_EQ(reshard_command({"diff", a, near, "--atol", "1.0"}).exit_code, 0);
  EXPECT_EQ(reshard_command({"diff", a, near, "--atol", "0.06", "--rtol", "0.0099"}).exit_code, 0);
  EXPECT_THAT(reshard_command({"diff", a, near, "--rtol", "0.01"}).out,
              HasSubstr("1 of 5 elements differ, most at [0]"));
  EXPECT_THAT(reshard_command({"diff", a, vector("nan.pt", {1, NAN, NAN, INFINITY, 0}), "--atol", "1e30"}).out,
              HasSubstr("1 of 5 elements differ, most at [1]: by nan"));
  EXPECT_THAT(reshard_command({"diff", a, vector("inf.pt", {1, 100, NAN, -INFINITY, 0}), "--atol", "1e30"}).out,
              HasSubstr("1 of 5 elements differ, most at [3]: by inf"));
  EXPECT_EQ(reshard_command({"diff", a, near, "--atol", "-1"}).exit_code, 2);
}

TEST_F(DiffTest, ValuesAreComparedByContent) {
  const auto dict = [](TorchFile& f, bool turned, float element) {
    const Value t = f.tensor(DType::kFloat32, {2}, floats({1, element}));
    const pickle::Entry x{f.tree.str("x"), Tree::integer(1)};
    const pickle::Entry y{f.tree.str("y"), f.tree.tuple({t, f.tree.bytes(as_bytes("raw"))})};
    const Value inner = turned ? f.tree.dict({y, x}) : f.tree.dict({x, y});
    return std::vector<std::pair<std::string, Value>>{{"v", f.tree.tuple({inner, Tree::real(0.5)})}};
  };
  const auto a = file("a.pt", [&](TorchFile& f) { return dict(f, false, 2); });
  const auto turned = file("turned.pt", [&](TorchFile& f) {
    f.storage(counting(9));  // other numbers for the same storages
    return dict(f, true, 2);
  });
  EXPECT_EQ(reshard_command({"diff", a, turned}).exit_code, 0);
  const auto other = file("other.pt", [&](TorchFile& f) { return dict(f, false, 3); });
  EXPECT_EQ(reshard_command({"diff", a, other}).exit_code, 1);
}

TEST_F(DiffTest, TroubleIsExitCodeTwo) {
  for (const auto& arguments : std::vector<std::vector<std::string>>{
           {"diff", path(), out("nothing")}, {"diff", out("nothing"), path()}, {"diff", path()}, {"diff"}}) {
    const CommandResult run = reshard_command(arguments);
    EXPECT_EQ(run.exit_code, 2);
    EXPECT_NE(run.err, "");
  }
  std::filesystem::remove(directory_ / "__1_0.distcp");
  const CommandResult run = reshard_command({"diff", path(), path()});
  EXPECT_EQ(run.exit_code, 2);
  EXPECT_EQ(std::ranges::count(run.err, '\n'), 1) << run.err;
  EXPECT_THAT(run.err, HasSubstr("__1_0.distcp"));
}

TEST_F(DiffTest, KeysArePrintable) {
  const auto a = file("a.pt", [](TorchFile&) {
    return std::vector<std::pair<std::string, Value>>{{"k\x1b[2J\n", Tree::integer(1)}};
  });
  const auto b = file("b.pt", [](TorchFile& f) {
    return std::vector<std::pair<std::string, Value>>{{"k\x1b[2J\n", f.tree.str("\x1b[0m")}};
  });
  EXPECT_EQ(reshard_command({"diff", a, b}).out, "~ k\\x1b[2J\\x0a: 1 -> \"\\u001b[0m\"\n");
}

}  // namespace
}  // namespace reshard
