// SPDX-License-Identifier: BSD-3-Clause
#include "s3/config.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>

#include "s3/client.h"
#include "support/expect_error.h"
#include "support/temporary_directory.h"

namespace reshard {
namespace {

class S3ConfigTest : public testing::Test {
 protected:
  S3ConfigTest() {
    for (const char* name : {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE",
                             "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"}) {
      ::unsetenv(name);
    }
    set("AWS_SHARED_CREDENTIALS_FILE", dir_ / "credentials");
    set("AWS_CONFIG_FILE", dir_ / "config");
  }
  static void set(const char* name, const std::string& value) { ::setenv(name, value.c_str(), 1); }
  void put(const std::string& name, const std::string& text) { std::ofstream(dir_ / name) << text; }

  TemporaryDirectory dir_;
};

TEST_F(S3ConfigTest, EnvironmentComesBeforeFilesAndOptionsBeforeBoth) {
  put("credentials", "[default]\naws_access_key_id = file-id\naws_secret_access_key = file-secret\n");
  set("AWS_ACCESS_KEY_ID", "env-id");
  set("AWS_SECRET_ACCESS_KEY", "env-secret");
  set("AWS_SESSION_TOKEN", "env-token");
  set("AWS_DEFAULT_REGION", "eu-west-1");
  set("AWS_ENDPOINT_URL", "http://all:1");
  S3Options options = s3::resolve({});
  EXPECT_EQ(options.credentials->access_key_id, "env-id");
  EXPECT_EQ(options.credentials->secret_access_key, "env-secret");
  EXPECT_EQ(options.credentials->session_token, "env-token");
  EXPECT_EQ(options.region, "eu-west-1");
  EXPECT_EQ(options.endpoint, "http://all:1");
  set("AWS_REGION", "eu-west-2");
  set("AWS_ENDPOINT_URL_S3", "http://s3:1");
  options = s3::resolve({.profile = "default"});
  EXPECT_EQ(options.credentials->access_key_id, "file-id") << "a profile that is asked for";
  EXPECT_EQ(options.region, "eu-west-2");
  EXPECT_EQ(options.endpoint, "http://s3:1");
  options = s3::resolve({.credentials = S3Credentials{"a", "b"}, .region = "r", .endpoint = "http://e"});
  EXPECT_EQ(options.credentials->access_key_id, "a");
  EXPECT_EQ(options.region, "r");
  EXPECT_EQ(options.endpoint, "http://e");
}

TEST_F(S3ConfigTest, ProfilesOfBothFiles) {
  put("credentials",
      "# comment\n[default]\naws_access_key_id=x\naws_secret_access_key=y\n\n[team]\r\naws_access_key_id = team-id\r\n"
      "aws_secret_access_key = team=secret/+\r\naws_session_token = t\r\n");
  put("config",
      "[default]\nregion = us-west-1\n[profile team]\nregion = us-west-2\nendpoint_url = http://store:9000\ns3 =\n"
      "  region = nested\n[profile other]\naws_access_key_id = o\naws_secret_access_key = p\n");
  set("AWS_PROFILE", "team");
  S3Options options = s3::resolve({});
  EXPECT_EQ(options.credentials->access_key_id, "team-id");
  EXPECT_EQ(options.credentials->secret_access_key, "team=secret/+");
  EXPECT_EQ(options.credentials->session_token, "t");
  EXPECT_EQ(options.region, "us-west-2");
  EXPECT_EQ(options.endpoint, "http://store:9000");
  options = s3::resolve({.profile = "other"});
  EXPECT_EQ(options.credentials->access_key_id, "o");
  EXPECT_EQ(options.region, "us-east-1");
}

TEST_F(S3ConfigTest, MissingCredentialsNameWhereTheyWereLookedFor) {
  put("credentials", "[default]\naws_access_key_id = half\n");
  EXPECT_ERROR(ErrorCode::kFailedPrecondition, "profile \"default\" in " + (dir_ / "credentials"), s3::resolve({}));
  put("credentials", std::string((1 << 20) + 1, ' '));
  EXPECT_ERROR(ErrorCode::kCorruptData, "too long", s3::resolve({}));
}

TEST_F(S3ConfigTest, OptionsOutOfRangeAreRefused) {
  const S3Credentials credentials{"a", "b"};
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "part_bytes of S3Options; wanted 5 MiB to 5 GiB, found 1",
               S3FileSystem({.credentials = credentials, .part_bytes = 1}));
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "range_bytes",
               S3FileSystem({.credentials = credentials, .range_bytes = 0}));
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "parallel", S3FileSystem({.credentials = credentials, .parallel = 0}));
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "max_attempts",
               S3FileSystem({.credentials = credentials, .max_attempts = 0}));
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "a time",
               S3FileSystem({.credentials = credentials, .deadline = std::chrono::milliseconds(0)}));
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "max_backoff",
               S3FileSystem({.credentials = credentials, .max_backoff = std::chrono::milliseconds(1)}));
}

TEST_F(S3ConfigTest, AnEndpointIsAHostAndItsPasswordIsNotShown) {
  for (const std::string endpoint : {"http://user:hunter2@host", "ftp://host", "host", "http://", "https://host/path",
                                     "http://host?x", "http://host\r\nx"}) {
    try {
      S3FileSystem({.credentials = S3Credentials{"a", "b"}, .endpoint = endpoint});
      ADD_FAILURE() << endpoint;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
      EXPECT_EQ(std::string(error.what()).find("hunter2"), std::string::npos);
    }
  }
}

TEST_F(S3ConfigTest, UrlsAreABucketAndAKey) {
  EXPECT_EQ(parse_s3_url("s3://bucket/a/b//").key, "a/b");
  EXPECT_EQ(parse_s3_url("s3://bucket").bucket, "bucket");
  EXPECT_EQ(parse_s3_url("s3://bucket/").key, "");
  using namespace std::string_literals;
  for (const std::string& url :
       {"bucket/key"s, "s3://"s, "s3://b"s, "s3:///key"s, "s3://bu cket/key"s, "s3://user:pw@host/key"s,
        "s3://..x/key"s, "s3://bucket//key"s, "s3://bucket/a\0b"s, "s3://" + std::string(64, 'a')}) {
    EXPECT_ERROR(ErrorCode::kInvalidArgument, "this is no ", parse_s3_url(url));
  }
}

TEST_F(S3ConfigTest, XmlElementsAreFoundAndDecoded) {
  const std::string text = "<A><Key>a&amp;b&#x41;&#66;&lt;&unknown;&#0;</Key><Key>2</Key><Open>";
  size_t at = 0;
  EXPECT_EQ(xml_element(text, "Key", &at), "a&bAB<&unknown;&#0;");
  EXPECT_EQ(xml_element(text, "Key", &at), "2");
  EXPECT_EQ(xml_element(text, "Key", &at), std::nullopt);
  EXPECT_EQ(xml_element(text, "Open"), std::nullopt);
  EXPECT_EQ(xml_element("", "Key"), std::nullopt);
}

}  // namespace
}  // namespace reshard
