// SPDX-License-Identifier: BSD-3-Clause
// The signatures of the examples in Amazon's documentation ("Signature Calculations for the Authorization Header:
// Transferring Payload in a Single Chunk").
#include "s3/signature.h"

#include <gtest/gtest.h>

#include "reshard/format/sha256.h"

namespace reshard::s3 {
namespace {

const S3Credentials kExample{"AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"};

RequestToSign example(std::string method, std::string path) {
  return {std::move(method),
          std::move(path),
          {},
          {{"host", "examplebucket.s3.amazonaws.com"},
           {"x-amz-content-sha256", to_hex(Sha256::of({}))},
           {"x-amz-date", "20130524T000000Z"}}};
}

TEST(SignatureTest, GetOfARange) {
  RequestToSign request = example("GET", "/test.txt");
  request.headers["range"] = "bytes=0-9";
  EXPECT_EQ(authorization(request, kExample, "us-east-1"),
            "AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request,"
            "SignedHeaders=host;range;x-amz-content-sha256;x-amz-date,"
            "Signature=f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41");
}

TEST(SignatureTest, PutOfAKeyThatIsEncoded) {
  RequestToSign request = example("PUT", "/" + uri_encode("test$file.text", true));
  request.headers["date"] = "Fri, 24 May 2013 00:00:00 GMT";
  request.headers["x-amz-storage-class"] = "REDUCED_REDUNDANCY";
  request.headers["x-amz-content-sha256"] = to_hex(Sha256::of(as_bytes("Welcome to Amazon S3.")));
  EXPECT_TRUE(authorization(request, kExample, "us-east-1")
                  .ends_with("Signature=98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd"));
}

TEST(SignatureTest, QueryWithoutAValueAndSortedOne) {
  RequestToSign request = example("GET", "/");
  request.query["lifecycle"] = "";
  EXPECT_TRUE(authorization(request, kExample, "us-east-1")
                  .ends_with("Signature=fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543"));
  request.query = {{"prefix", "J"}, {"max-keys", "2"}};
  EXPECT_TRUE(authorization(request, kExample, "us-east-1")
                  .ends_with("Signature=34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7"));
}

TEST(SignatureTest, EncodingKeepsWhatIsUnreservedAndSlashesOfPathsOnly) {
  EXPECT_EQ(uri_encode("a/b c+d~e_f-g.h\xC3\xA9", true), "a/b%20c%2Bd~e_f-g.h%C3%A9");
  EXPECT_EQ(uri_encode("a/b", false), "a%2Fb");
  EXPECT_EQ(canonical_query({{"b", "x y"}, {"a", ""}}), "a=&b=x%20y");
}

}  // namespace
}  // namespace reshard::s3
