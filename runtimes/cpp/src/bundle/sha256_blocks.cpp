#include "bundle/sha256_blocks.h"

#include <algorithm>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <arm_neon.h>
#include <sys/auxv.h>
#endif

namespace edgeprune::sha256 {
namespace {

__extension__ using Wide = unsigned __int128;

// The first 64 primes: their cube roots' fractions are the round constants, their square roots' the first state.
std::array<uint32_t, 64> primes() {
  std::array<uint32_t, 64> found{};
  size_t count = 0;
  for (uint32_t candidate = 2; count < found.size(); ++candidate) {
    const bool divisible = std::any_of(found.begin(), found.begin() + static_cast<std::ptrdiff_t>(count),
                                       [&](uint32_t prime) { return candidate % prime == 0; });
    if (!divisible) found[count++] = candidate;
  }
  return found;
}

// The first 32 bits of the fraction of the degree-th root, exact: by bisection over integers.
uint32_t fraction_of_root(uint32_t number, int degree) {
  // root = r / 2^32 with r the largest for which r^degree <= number * 2^(32 * degree)
  Wide low = 0, high = static_cast<Wide>(1) << 36;
  const auto fits = [&](Wide root) {
    // The root is below 2^36, its cube below 2^108: both sides fit.
    Wide power = root;
    for (int i = 1; i < degree; ++i) power *= root;
    return power <= (static_cast<Wide>(number) << (32 * degree));
  };
  while (high - low > 1) {
    const Wide middle = (low + high) / 2;
    (fits(middle) ? low : high) = middle;
  }
  return static_cast<uint32_t>(low);
}

const std::array<uint32_t, 64>& round_constants() {
  static const std::array<uint32_t, 64> constants = [] {
    std::array<uint32_t, 64> made = primes();
    for (uint32_t& value : made) value = fraction_of_root(value, 3);
    return made;
  }();
  return constants;
}

uint32_t rotated(uint32_t value, int bits) { return (value >> bits) | (value << (32 - bits)); }

void add_block(State& state, const uint8_t* bytes) {
  const std::array<uint32_t, 64>& constants = round_constants();
  std::array<uint32_t, 64> schedule;
  for (size_t i = 0; i < 16; ++i) {
    schedule[i] = static_cast<uint32_t>(bytes[4 * i]) << 24 | static_cast<uint32_t>(bytes[4 * i + 1]) << 16 |
                  static_cast<uint32_t>(bytes[4 * i + 2]) << 8 | static_cast<uint32_t>(bytes[4 * i + 3]);
  }
  for (size_t i = 16; i < 64; ++i) {
    const uint32_t before = schedule[i - 15], late = schedule[i - 2];
    const uint32_t s0 = rotated(before, 7) ^ rotated(before, 18) ^ (before >> 3);
    const uint32_t s1 = rotated(late, 17) ^ rotated(late, 19) ^ (late >> 10);
    schedule[i] = schedule[i - 16] + s0 + schedule[i - 7] + s1;
  }
  auto [a, b, c, d, e, f, g, h] = state;
  for (size_t i = 0; i < 64; ++i) {
    const uint32_t s1 = rotated(e, 6) ^ rotated(e, 11) ^ rotated(e, 25);
    const uint32_t first = h + s1 + ((e & f) ^ (~e & g)) + constants[i] + schedule[i];
    const uint32_t s0 = rotated(a, 2) ^ rotated(a, 13) ^ rotated(a, 22);
    const uint32_t second = s0 + ((a & b) ^ (a & c) ^ (b & c));
    h = g, g = f, f = e, e = d + first, d = c, c = b, b = a, a = first + second;
  }
  const std::array<uint32_t, 8> rounds{a, b, c, d, e, f, g, h};
  for (size_t i = 0; i < 8; ++i) state[i] += rounds[i];
}

#if defined(__x86_64__)

bool has_instructions() {
  constexpr unsigned kSsse3 = 1u << 9, kSse41 = 1u << 19, kSha = 1u << 29;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0 || (c & kSsse3) == 0 || (c & kSse41) == 0) return false;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (b & kSha) != 0;
}

__attribute__((target("sha,ssse3,sse4.1"))) void add_blocks_by_instructions(State& state, const uint8_t* bytes, size_t count) {
  const uint32_t* constants = round_constants().data();
  const __m128i big_endian = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
  auto* halves = reinterpret_cast<__m128i*>(state.data());
  // The instructions want the words as a, b, e, f and c, d, g, h, the first highest.
  const __m128i cdab = _mm_shuffle_epi32(_mm_loadu_si128(halves), 0xB1);
  const __m128i efgh = _mm_shuffle_epi32(_mm_loadu_si128(halves + 1), 0x1B);
  __m128i abef = _mm_alignr_epi8(cdab, efgh, 8), cdgh = _mm_blend_epi16(efgh, cdab, 0xF0);
  for (; count > 0; --count, bytes += 64) {
    const __m128i abef_before = abef, cdgh_before = cdgh;
    __m128i words[4];
    for (int i = 0; i < 4; ++i) {
      words[i] = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes) + i), big_endian);
    }
    for (int i = 0; i < 16; ++i) {
      __m128i& now = words[i % 4];
      const __m128i& next = words[(i + 1) % 4];
      const __m128i& later = words[(i + 2) % 4];
      const __m128i& last = words[(i + 3) % 4];
      const __m128i round = _mm_add_epi32(now, _mm_loadu_si128(reinterpret_cast<const __m128i*>(constants) + i));
      cdgh = _mm_sha256rnds2_epu32(cdgh, abef, round);
      abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(round, 0x0E));
      if (i < 12) now = _mm_sha256msg2_epu32(_mm_add_epi32(_mm_sha256msg1_epu32(now, next), _mm_alignr_epi8(last, later, 4)), last);
    }
    abef = _mm_add_epi32(abef, abef_before);
    cdgh = _mm_add_epi32(cdgh, cdgh_before);
  }
  const __m128i feba = _mm_shuffle_epi32(abef, 0x1B), dchg = _mm_shuffle_epi32(cdgh, 0xB1);
  _mm_storeu_si128(halves, _mm_blend_epi16(feba, dchg, 0xF0));
  _mm_storeu_si128(halves + 1, _mm_alignr_epi8(dchg, feba, 8));
}

#elif defined(__aarch64__) && defined(__linux__)

bool has_instructions() {
  constexpr unsigned long kSha2 = 1ul << 6;  // HWCAP_SHA2
  return (getauxval(AT_HWCAP) & kSha2) != 0;
}

__attribute__((target("+crypto"))) void add_blocks_by_instructions(State& state, const uint8_t* bytes, size_t count) {
  const uint32_t* constants = round_constants().data();
  uint32x4_t abcd = vld1q_u32(state.data()), efgh = vld1q_u32(state.data() + 4);
  for (; count > 0; --count, bytes += 64) {
    const uint32x4_t abcd_before = abcd, efgh_before = efgh;
    uint32x4_t words[4];
    for (int i = 0; i < 4; ++i) words[i] = vreinterpretq_u32_u8(vrev32q_u8(vld1q_u8(bytes + 16 * i)));
    for (int i = 0; i < 16; ++i) {
      uint32x4_t& now = words[i % 4];
      const uint32x4_t round = vaddq_u32(now, vld1q_u32(constants + 4 * i));
      if (i < 12) now = vsha256su1q_u32(vsha256su0q_u32(now, words[(i + 1) % 4]), words[(i + 2) % 4], words[(i + 3) % 4]);
      const uint32x4_t abcd_now = abcd;
      abcd = vsha256hq_u32(abcd, efgh, round);
      efgh = vsha256h2q_u32(efgh, abcd_now, round);
    }
    abcd = vaddq_u32(abcd, abcd_before);
    efgh = vaddq_u32(efgh, efgh_before);
  }
  vst1q_u32(state.data(), abcd);
  vst1q_u32(state.data() + 4, efgh);
}

#else

bool has_instructions() { return false; }

void add_blocks_by_instructions(State& state, const uint8_t* bytes, size_t count) { add_blocks_portably(state, bytes, count); }

#endif

}  // namespace

State first_state() {
  const std::array<uint32_t, 64> first = primes();
  State state;
  for (size_t i = 0; i < state.size(); ++i) state[i] = fraction_of_root(first[i], 2);
  return state;
}

void add_blocks(State& state, const uint8_t* bytes, size_t count) {
  static const bool by_instructions = has_instructions();
  (by_instructions ? add_blocks_by_instructions : add_blocks_portably)(state, bytes, count);
}

void add_blocks_portably(State& state, const uint8_t* bytes, size_t count) {
  for (; count > 0; --count, bytes += 64) add_block(state, bytes);
}

}  // namespace edgeprune::sha256
