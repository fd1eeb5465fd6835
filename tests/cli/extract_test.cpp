// SPDX-License-Identifier: BSD-3-Clause
// `reshard extract`.
#include <gmock/gmock.h>

#include <filesystem>
#include <fstream>

#include "cli/run_cli.h"
#include "support/run_python.h"
#include "support/torch_files.h"

namespace reshard {
namespace {

using pickle::Tree;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

class ExtractTest : public CliTest {};

TEST_F(ExtractTest, ATensorBecomesAnNpyFile) {
  const CommandResult run = reshard_command({"extract", path(), "model.weight", "-o", out("w.npy")});
  EXPECT_EQ(run.exit_code, 0) << run.err;
  const std::string npy = text_of(out("w.npy"));
  const size_t length = static_cast<unsigned char>(npy[8]) + 256u * static_cast<unsigned char>(npy[9]);
  EXPECT_EQ(npy.substr(0, 8), std::string("\x93NUMPY\x01\x00", 8));
  EXPECT_EQ((10 + length) % 64, 0u);
  const Bytes wanted = pattern_of("model.weight", {6, 4}, whole_box({6, 4}), 4);
  EXPECT_EQ(npy.substr(10 + length), as_text(wanted));
  EXPECT_THAT(npy.substr(10, length), HasSubstr("'descr': '<f4'"));
  // In blocks, and to stdout.
  EXPECT_EQ(reshard_command({"extract", path(), "model.weight", "-o", "-", "--block-bytes", "8"}).out, npy);
  EXPECT_EQ(reshard_command({"extract", path(), "model.weight", "--raw", "-o", "-"}).out, as_text(wanted));
}

TEST_F(ExtractTest, AValueIsPrintedAsJson) {
  EXPECT_EQ(reshard_command({"extract", path(), "step"}).out, "\"seven\"\n");
  EXPECT_EQ(reshard_command({"extract", path(), "step", "-o", out("step.json")}).exit_code, 0);
  EXPECT_EQ(text_of(out("step.json")), "\"seven\"\n");
  EXPECT_EQ(reshard_command({"extract", path(), "step", "--raw", "-o", "-"}).out, value_archive("seven"));
  TorchFile file;
  const auto t = file.tensor(DType::kBFloat16, {2, 3}, Bytes(12));
  const auto call = file.call("datetime", "date", {Tree::integer(1)});
  file.write(out("v.pt"), file.dict({{"v", file.tree.tuple({Tree::none(), Tree::boolean(true), Tree::real(0.5),
                                                            Tree::real(NAN), file.tree.bytes(as_bytes("\xff")), t, call,
                                                            file.tree.dict({{Tree::integer(1), Tree::none()}})})}}));
  EXPECT_EQ(
      reshard_command({"extract", out("v.pt"), "v"}).out,
      "[null,true,0.5,{\"float\":\"nan\"},{\"bytes\":\"ff\"},{\"tensor\":{\"dtype\":\"bfloat16\",\"shape\":[2,3]}},"
      "{\"object\":\"datetime.date\",\"args\":[1]},[[1,null]]]\n");
}

// Against what PyTorch said when it saved them.
TEST_F(ExtractTest, GoldenTensorsAreTheirBytes) {
  for (const char* name : {"2.1.2/dtypes", "2.14.1/dtypes", "2.9.1/dtensor2d_4"}) {
    const OracleCase oracle(name);
    for (const auto& item : oracle.expected().at("tensors").items()) {
      EXPECT_EQ(reshard_command({"extract", oracle.directory().string(), item.key(), "--raw", "-o", "-"}).out,
                as_text(oracle.tensor(item.key())))
          << item.key();
    }
  }
}

TEST_F(ExtractTest, MistakesAreNamedAndLeaveNothing) {
  const auto refused = [&](std::vector<std::string> arguments, const std::string& text) {
    arguments.insert(arguments.begin(), "extract");
    const CommandResult run = reshard_command(arguments);
    EXPECT_EQ(run.exit_code, 1);
    EXPECT_EQ(run.out, "");
    EXPECT_THAT(run.err, HasSubstr(text));
    EXPECT_EQ(std::ranges::count(run.err, '\n'), 1) << run.err;
  };
  refused({path(), "nothing"}, "the checkpoint has no such key; key nothing");
  refused({path(), "model.weight"}, "bytes go to a file: give -o FILE, or -o - for stdout; key model.weight");
  refused({path(), "step", "--raw"}, "bytes go to a file");
  refused({path(), "model.weight", "-o", path() + "/w.npy"}, "the destination lies inside the source");
  refused({path(), "model.weight", "-o", out("no/w.npy")}, "No such file");
  const OracleCase golden("2.14.1/dtypes");
  for (const auto& item : golden.expected().at("tensors").items()) {
    if (item.value().at("dtype") != "bfloat16") continue;
    refused({golden.directory().string(), item.key(), "-o", out("b.npy")},
            "numpy has no such dtype; --raw gives the elements alone");
  }
  EXPECT_THAT(names_out(), IsEmpty());
  std::ofstream(out("w.npy")) << "old";
  refused({path(), "model.weight", "-o", out("w.npy")}, "the destination is there; --force replaces it");
  EXPECT_EQ(text_of(out("w.npy")), "old");
  std::filesystem::remove(directory_ / "__1_0.distcp");
  refused({path(), "model.weight", "-f", "-o", out("w.npy")}, "__1_0.distcp");
  EXPECT_EQ(text_of(out("w.npy")), "old");
  EXPECT_THAT(names_out(), ElementsAre("w.npy"));
}

TEST_F(ExtractTest, NumpyReadsTheFiles) {
  if (!has_python()) GTEST_SKIP() << "no Python with PyTorch at " << RESHARD_PYTHON;
  expect_python_succeeds("pytorch.py extract '" RESHARD_CLI "' '" + out_.path() + "'");
}

}  // namespace
}  // namespace reshard
