// Warp instructions of compute capability 8.0 against the layouts of the PTX ISA manual.
#include <array>
#include <cmath>
#include <random>
#ifdef __SSE__
#include <xmmintrin.h>
#endif

#include "host_sim/tests/test.h"
#include "sm80/ptx.cuh"

namespace ptx = sparse_attn::ptx;

namespace {

host_sim::Counters run(const std::function<void()>& kernel, std::size_t shared_bytes = 0,
                       unsigned threads = 32) {
  return host_sim::launch({}, {threads}, {.shared_bytes = shared_bytes}, {}, kernel);
}

int lane() { return static_cast<int>(threadIdx.x % 32); }

std::uint16_t half_of(std::uint32_t packed, int i) {
  return static_cast<std::uint16_t>(packed >> (16 * i));
}

// Random values that both types hold exactly.
std::vector<float> small_integers(std::size_t n, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<float> x(n);
  for (float& value : x) value = static_cast<float>(static_cast<int>(random() % 33) - 16);
  return x;
}

}  // namespace

TEST(shuffle_takes_the_value_of_a_lane) {
  run([] {
    CHECK(ptx::shuffle(10 * lane(), (lane() + 3) % 32) == 10 * ((lane() + 3) % 32));
    CHECK(ptx::shuffle(0.5f * static_cast<float>(lane()), 7) == 3.5f);
    for (int distance : {1, 2, 4, 8, 16})
      CHECK(ptx::shuffle_xor(lane(), distance) == (lane() ^ distance));
  });
}

TEST(ballot_has_a_bit_per_lane) {
  run([] { CHECK(ptx::ballot(lane() % 3 == 1) == 0b10010010010010010010010010010010u); });
}

TEST(warps_do_not_meet_each_other) {
  run(
      [] {
        CHECK(ptx::shuffle(static_cast<int>(threadIdx.x), 0) ==
              static_cast<int>(threadIdx.x) / 32 * 32);
      },
      0, 96);
}

// 2^-1 ulp ties go to the even neighbour; what is beyond the largest number is infinite.
TEST(rounding_to_bfloat16) {
  const auto round = [](float x) { return half_of(ptx::pack<ptx::BFloat16>(x, 0), 0); };
  CHECK(round(1.0f) == 0x3f80 && round(-2.0f) == 0xc000 && round(0.0f) == 0 &&
        round(-0.0f) == 0x8000);
  CHECK(round(1.0f + 0x1p-8f) == 0x3f80 && round(1.0f + 0x1p-7f + 0x1p-8f) == 0x3f82);
  CHECK(round(1.0f + 0x1p-8f + 0x1p-20f) == 0x3f81);
  CHECK(round(3.4e38f) == 0x7f80 && round(INFINITY) == 0x7f80);
  CHECK(std::isnan(ptx::to_float(ptx::BFloat16{round(NAN)})));
  CHECK(half_of(ptx::pack<ptx::BFloat16>(1.0f, -2.0f), 1) == 0xc000);
}

TEST(rounding_to_float16) {
  const auto round = [](float x) { return half_of(ptx::pack<ptx::Float16>(x, 0), 0); };
  CHECK(round(1.0f) == 0x3c00 && round(-2.0f) == 0xc000 && round(65504.0f) == 0x7bff);
  CHECK(round(1.0f + 0x1p-11f) == 0x3c00 && round(1.0f + 0x1p-10f + 0x1p-11f) == 0x3c02);
  CHECK(round(65520.0f) == 0x7c00 && round(0x1p-24f) == 1 && round(0x1p-26f) == 0);
  CHECK(half_of(ptx::pack<ptx::Float16>(0.0f, 1.0f), 1) == 0x3c00);
}

TEST(every_float16_where_the_processor_has_no_subnormal_numbers) {
#ifdef __SSE__
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before | _MM_FLUSH_ZERO_ON | 0x40);  // results and operands: as on XLA's threads
#endif
  int wrong = 0;
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
    const double magnitude =
        exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
    const float x = ptx::to_float(ptx::Float16{static_cast<std::uint16_t>(bits)});
    const bool is_right =
        exponent == 31 ? (fraction == 0 ? std::isinf(x) : std::isnan(x)) : std::abs(x) == magnitude;
    wrong += !is_right || std::signbit(x) != (bits >> 15 != 0);
    // And back.
    wrong += !std::isnan(x) && half_of(ptx::pack<ptx::Float16>(x, 0), 0) != bits;
  }
#ifdef __SSE__
  _mm_setcsr(before);
#endif
  CHECK(wrong == 0);
}

// "ldmatrix": threads 0-7 give the rows of the first matrix, 8-15 of the second, and so on; each
// thread receives a fragment of a row, r0 of the first: row 0 goes to threads 0-3, row 1 to 4-7.
static void check_matrix_loads(bool is_transposed) {
  // Matrix m at 256 m bytes, rows of 32 bytes (16 used): element (row, column) is 100 m + 10 row +
  // column.
  run(
      [=] {
        for (int i = lane(); i < 4 * 8 * 8; i += 32) {
          const int matrix = i / 64, row = i / 8 % 8, column = i % 8;
          ptx::store_shared<std::uint16_t>(
              256 * matrix + 32 * row + 2 * column,
              static_cast<std::uint16_t>(100 * matrix + 10 * row + column));
        }
        ptx::sync_warp();
        const auto address = static_cast<std::uint32_t>(256 * (lane() / 8) + 32 * (lane() % 8));
        const auto loaded =
            is_transposed ? ptx::load_matrix_transposed(address) : ptx::load_matrix(address);
        for (int matrix = 0; matrix < 4; ++matrix) {
          for (int i = 0; i < 2; ++i) {
            const int major = lane() / 4, minor = lane() % 4 * 2 + i;
            const int expected =
                100 * matrix + (is_transposed ? 10 * minor + major : 10 * major + minor);
            CHECK(half_of(loaded.x[matrix], i) == expected);
          }
        }
      },
      1024);
}

TEST(load_matrix_gives_rows) { check_matrix_loads(false); }
TEST(load_matrix_transposed_gives_columns) { check_matrix_loads(true); }

TEST(load_matrix_needs_aligned_rows) {
  check_error("not aligned", [] { run([] { ptx::load_matrix(8 + 16 * lane()); }, 1024); });
}

TEST(load_matrix_needs_a_barrier_even_for_the_own_rows) {
  for (int writer = 0; writer < 32; ++writer) {
    check_error("nothing orders", [=] {
      run(
          [=] {
            for (int i = 0; lane() == writer && i < 128; ++i)
              ptx::store_shared<std::uint32_t>(4 * i, 0);
            ptx::load_matrix(16 * lane());
          },
          1024);
    });
  }
}

// "Matrix fragments for mma.m16n8k16 with floating point type", in the manual's own terms: groupID
// = lane / 4, threadID_in_group = lane % 4, and element i of a fragment.
template <class T>
static void check_multiply() {
  const auto a = small_integers(16 * 16, 1), b = small_integers(16 * 8, 2),
             c = small_integers(16 * 8, 3);
  const auto counters = run([&] {
    const int group = lane() / 4, in_group = lane() % 4;
    float a_elements[8], b_elements[4], sums[4];
    for (int i = 0; i < 8; ++i) {
      const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
      const int column = in_group * 2 + (i & 1) + (i < 4 ? 0 : 8);
      a_elements[i] = a[row * 16 + column];
    }
    for (int i = 0; i < 4; ++i) {
      const int row = in_group * 2 + (i & 1) + (i < 2 ? 0 : 8);
      b_elements[i] = b[row * 8 + group];
    }
    const auto place = [&](int i) {
      return (i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1);
    };
    for (int i = 0; i < 4; ++i) sums[i] = c[place(i)];
    std::uint32_t a_packed[4], b_packed[2];
    for (int i = 0; i < 4; ++i)
      a_packed[i] = ptx::pack<T>(a_elements[2 * i], a_elements[2 * i + 1]);
    for (int i = 0; i < 2; ++i)
      b_packed[i] = ptx::pack<T>(b_elements[2 * i], b_elements[2 * i + 1]);
    ptx::multiply_add<T>(sums, a_packed, b_packed);
    for (int i = 0; i < 4; ++i) {
      const int row = place(i) / 8, column = place(i) % 8;
      double expected = c[place(i)];
      for (int k = 0; k < 16; ++k) expected += double{a[row * 16 + k]} * b[k * 8 + column];
      CHECK(sums[i] == expected);
    }
  });
  CHECK(counters.matrix_instructions == 1);
}

TEST(multiply_bfloat16) { check_multiply<ptx::BFloat16>(); }
TEST(multiply_float16) { check_multiply<ptx::Float16>(); }

int main(int argc, char** argv) { return run_tests(argc, argv); }
