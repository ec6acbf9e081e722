// Blocks of products of bfloat16, which its kernels share: by Intel's AMX, or by AVX-512's dot products of pairs.
//
// Both add products in bfloat16 to sums in float32. AMX multiplies tiles of 16 rows by 32 terms and has 16 × 16 sums; an
// instruction of AVX-512 multiplies one pair of a row's terms with 16 columns. For both, the right side's tiles hold pairs
// of terms side by side.
#pragma once
#include "cpu.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__linux__)
#define HAS_BF16 1
#include <immintrin.h>

#include <cstring>
#include <vector>

namespace bf16 {

typedef uint16_t Bf16;

constexpr int kTile = 16, kBlock = 32, kTerms = 32;  // rows or columns of a tile and of a block; terms of a tile
constexpr int64_t kTileSize = kTile * kTerms;

inline int64_t divide(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide(a, b) * b; }

template <typename Buffer>
auto data(Buffer& buffer) {
  return reinterpret_cast<Bf16*>(buffer.untyped_data());
}

// A buffer that begins with a cache line. It keeps its size until more is needed.
template <typename T>
struct Aligned {
  std::vector<T> store;
  T* data = nullptr;
  Aligned() = default;
  explicit Aligned(int64_t size) { need(size); }
  void need(int64_t size) {
    size += 64 / sizeof(T);
    if (size > static_cast<int64_t>(store.size())) store.resize(size);
    data = store.data() + (64 - reinterpret_cast<uintptr_t>(store.data()) % 64) % 64 / sizeof(T);
  }
};

// Whether this process may use AMX's tiles: the system has to be asked.
inline bool has_tiles = false;

// The tiles' sizes, which every thread has of its own.
struct Tiles {
#ifdef __AMX_BF16__
  Tiles() {
    if (!has_tiles) return;
    struct __attribute__((packed, aligned(64))) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } sizes;
    for (int i = 0; i < 8; i++) sizes.bytes[i] = 64, sizes.rows[i] = kTile;
    _tile_loadconfig(&sizes);
  }
  ~Tiles() {
    if (has_tiles) _tile_release();
  }
#endif
};

// `block` by dot products of pairs.
inline void block_of_pairs(int64_t terms, const Bf16* left, int64_t stride, const Bf16* right, const float* from, float* to,
                           int64_t apart) {
  constexpr int kRows = 8;  // with two vectors of sums each: their sums, and what is multiplied, stay in registers
  typedef int __attribute__((may_alias)) Pair;
  for (int r = 0; r < kBlock; r += kRows, left += kRows * stride, to += kRows * apart) {
    __m512 sums[kRows][2];
    for (auto& row : sums) row[0] = row[1] = _mm512_setzero_ps();
    for (int64_t t = 0; t < terms; t += 2) {
      const Bf16* pairs = right + t / kTerms * 2 * kTileSize + t % kTerms * kTile;
      __m512bh columns[2];
      for (int j = 0; j < 2; j++) columns[j] = (__m512bh)_mm512_loadu_si512(pairs + j * kTileSize);
      for (int i = 0; i < kRows; i++) {
        __m512bh row = (__m512bh)_mm512_set1_epi32(*(const Pair*)(left + i * stride + t));
        for (int j = 0; j < 2; j++) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], row, columns[j]);
      }
    }
    for (int i = 0; i < kRows; i++)
      for (int j = 0; j < 2; j++) {
        // Last: thousands of terms one after the other would lose a digit.
        if (from) sums[i][j] = _mm512_add_ps(sums[i][j], _mm512_loadu_ps(from + (r + i) * apart + j * kTile));
        _mm512_storeu_ps(to + i * apart + j * kTile, sums[i][j]);
      }
  }
}

// Adds left [kBlock, terms], rows `stride` apart, times right (tiles of 16 pairs × 16 columns, two beside each other)
// to `from`, or to zero, and writes `to`; both [kBlock, kBlock], rows `apart` apart.
inline void block(int64_t terms, const Bf16* left, int64_t stride, const Bf16* right, const float* from, float* to,
                  int64_t apart) {
#ifdef __AMX_BF16__
  if (!has_tiles) return block_of_pairs(terms, left, stride, right, from, to, apart);
  int64_t bytes = stride * sizeof(Bf16), line = apart * sizeof(float);
  if (from) {
    _tile_loadd(0, from, line);
    _tile_loadd(1, from + kTile, line);
    _tile_loadd(2, from + kTile * apart, line);
    _tile_loadd(3, from + kTile * apart + kTile, line);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t i = 0; i < terms; i += kTerms, left += kTerms, right += 2 * kTileSize) {
    _tile_loadd(4, left, bytes);
    _tile_loadd(6, right, 64);
    _tile_loadd(7, right + kTileSize, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, left + kTile * stride, bytes);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, to, line);
  _tile_stored(1, to + kTile, line);
  _tile_stored(2, to + kTile * apart, line);
  _tile_stored(3, to + kTile * apart + kTile, line);
#else
  block_of_pairs(terms, left, stride, right, from, to, apart);
#endif
}

// 16 columns of two rows, pair by pair.
inline void interleave(const Bf16* a, const Bf16* b, Bf16* to) {
  __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)a));
  __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)b));
  _mm512_store_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

inline void interleave(const Bf16* a, const Bf16* b, int count, Bf16* to) {
  if (count >= kTile) return interleave(a, b, to);
  Bf16 parts[2][kTile] = {};
  if (count > 0) std::memcpy(parts[0], a, count * sizeof(Bf16)), std::memcpy(parts[1], b, count * sizeof(Bf16));
  interleave(parts[0], parts[1], to);
}

// Turns 16 × 16 numbers of 32 bits over.
inline void transpose(__m512i* x) {
  __m512i y[16];
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < 2; j++) {
      y[i + 8 * j] = _mm512_shuffle_i32x4(x[i + 8 * j], x[i + 8 * j + 4], 0x88);
      y[i + 8 * j + 4] = _mm512_shuffle_i32x4(x[i + 8 * j], x[i + 8 * j + 4], 0xdd);
    }
  for (int i = 0; i < 8; i++) {
    x[i] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0x88);
    x[i + 8] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0xdd);
  }
}

inline __mmask16 first_of_16(int64_t count) { return count >= 16 ? 0xffff : count > 0 ? (1u << count) - 1 : 0; }

inline void store(__m512 x, __mmask16 mask, float* to) { _mm512_mask_storeu_ps(to, mask, x); }

// Rounded to the nearest, ties to even; a NaN stays one.
inline void store(__m512 x, __mmask16 mask, Bf16* to) {
  _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(x));
}

}  // namespace bf16
#endif
