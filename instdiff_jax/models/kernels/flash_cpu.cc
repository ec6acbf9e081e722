// Flash attention for CPUs in float32, as an XLA custom call: softmax(q k^T / sqrt(d)) v, with region bits.
//
// A tile has kQueries queries, which lie in the lanes of vectors: every product multiplies a scalar of a key or value
// with vectors of queries, and maximum and sum over keys need no shuffle. Logits exist for one tile of queries and
// kKeys keys at a time, in the first cache (an online softmax, as in arXiv 2205.14135). flash_cpu.py calls it.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu.h"

namespace flash {

#if defined(__AVX512F__)
constexpr int kVectors = 3, kRows = 8;  // 24 sums, 3 queries and a scalar in 32 registers
#elif defined(__AVX2__)
constexpr int kVectors = 2, kRows = 6;  // 12, 2 and 1 in 16
#else
constexpr int kVectors = 3, kRows = 8;
#endif
constexpr int kQueries = kLanes * kVectors;
constexpr int kKeys = 120;  // a multiple of kRows

inline Ints splat_int(int32_t x) { return x - Ints{}; }

// out[rows][kQueries] = (or +=) sum over i < n of left[row, i] * right[i][kQueries].
template <bool kAdd>
inline void multiply(int64_t n, const float* left, int64_t row_stride, int64_t step, const float* right,
                            float* out) {
  Floats sum[kRows][kVectors];
  for (int r = 0; r < kRows; r++)
    for (int j = 0; j < kVectors; j++)
      sum[r][j] = kAdd ? *(const Floats*)(out + r * kQueries + j * kLanes) : Floats{};
  for (int64_t i = 0; i < n; i++) {
    Floats x[kVectors];
    for (int j = 0; j < kVectors; j++) x[j] = *(const Floats*)(right + i * kQueries + j * kLanes);
    for (int r = 0; r < kRows; r++) {
      Floats y = splat(left[r * row_stride + i * step]);
      for (int j = 0; j < kVectors; j++) sum[r][j] += y * x[j];
    }
  }
  for (int r = 0; r < kRows; r++)
    for (int j = 0; j < kVectors; j++) *(Floats*)(out + r * kQueries + j * kLanes) = sum[r][j];
}

struct Shape {
  int64_t b, n, m, h, d;  // batch, queries, keys, heads, head width
};

struct Buffers {
  std::vector<float> store;
  float *queries, *logits, *out, *keys, *values;
  int64_t padded_keys, padded_width;
  explicit Buffers(const Shape& s) {
    padded_keys = (s.m + kRows - 1) / kRows * kRows;
    padded_width = (s.d + kRows - 1) / kRows * kRows;
    int64_t sizes[] = {s.d * kQueries, kKeys * kQueries, padded_width * kQueries, padded_keys * s.d,
                       padded_keys * padded_width};
    int64_t total = 16;
    for (int64_t& size : sizes) total += size = (size + 15) / 16 * 16;
    store.assign(total, 0.0f);
    float* at = store.data();
    at += (64 - reinterpret_cast<uintptr_t>(at) % 64) % 64 / 4;
    float** parts[] = {&queries, &logits, &out, &keys, &values};
    for (int i = 0; i < 5; i++) *parts[i] = at, at += sizes[i];
  }
};

// Keys and values of one head, packed: read once for every tile of queries.
void load_keys(const Shape& s, const float* k, const float* v, int64_t b, int64_t h, Buffers& to) {
  for (int64_t j = 0; j < s.m; j++) {
    int64_t from = ((b * s.m + j) * s.h + h) * s.d;
    std::memcpy(to.keys + j * s.d, k + from, s.d * sizeof(float));
    std::memcpy(to.values + j * to.padded_width, v + from, s.d * sizeof(float));
  }
}

// Attention of one head's queries from `first` on, kQueries of them at most.
template <bool kMasked>
void attend(const Shape& s, const float* q, const uint32_t* query_bits, const uint32_t* key_bits, int64_t b,
                   int64_t h, int64_t first, Buffers& with, float* out) {
  int64_t count = std::min<int64_t>(kQueries, s.n - first);
  float scale = 1.44269504f / std::sqrt((float)s.d);  // powers of 2 instead of e
  for (int64_t i = 0; i < s.d * kQueries; i++) with.queries[i] = 0;
  for (int64_t i = 0; i < count; i++)
    for (int64_t c = 0; c < s.d; c++)
      with.queries[c * kQueries + i] = q[((b * s.n + first + i) * s.h + h) * s.d + c] * scale;
  std::memset(with.out, 0, with.padded_width * kQueries * sizeof(float));
  Floats highest[kVectors], total[kVectors];
  Ints bits[kVectors], index[kVectors];
  for (int j = 0; j < kVectors; j++) {
    highest[j] = splat(-INFINITY);
    total[j] = Floats{};
    if (kMasked)
      for (int l = 0; l < kLanes; l++) {
        int64_t i = first + j * kLanes + l;
        bits[j][l] = (i < s.n ? query_bits[b * s.n + i] : 0) | 0x80000000u;
        index[j][l] = (int32_t)i;
      }
  }
  for (int64_t start = 0; start < s.m; start += kKeys) {
    int64_t keys = std::min<int64_t>(kKeys, s.m - start);
    for (int64_t i = 0; i < keys; i += kRows)
      multiply<false>(s.d, with.keys + (start + i) * s.d, s.d, 1, with.queries, with.logits + i * kQueries);
    Floats high[kVectors];
    for (int j = 0; j < kVectors; j++) high[j] = highest[j];
    for (int64_t i = 0; i < keys; i++)
      for (int j = 0; j < kVectors; j++) {
        Floats& x = *(Floats*)(with.logits + i * kQueries + j * kLanes);
        if (kMasked) {
          int32_t key = key_bits[b * s.m + start + i];
          Ints seen = ((bits[j] & splat_int(key)) != 0) | (index[j] == splat_int((int32_t)(start + i)));
          x = seen ? x : splat(-FLT_MAX);  // not -inf: a query that sees nothing takes the mean
        }
        high[j] = x > high[j] ? x : high[j];
      }
    Floats keep[kVectors];
    for (int j = 0; j < kVectors; j++) {
      keep[j] = exp2_of_negative(highest[j] - high[j]);
      total[j] *= keep[j];
      highest[j] = high[j];
    }
    for (int64_t i = 0; i < keys; i++)
      for (int j = 0; j < kVectors; j++) {
        Floats& x = *(Floats*)(with.logits + i * kQueries + j * kLanes);
        x = exp2_of_negative(x - high[j]);
        total[j] += x;
      }
    for (int64_t c = 0; c < with.padded_width; c++)
      for (int j = 0; j < kVectors; j++) *(Floats*)(with.out + c * kQueries + j * kLanes) *= keep[j];
    for (int64_t c = 0; c < with.padded_width; c += kRows)
      multiply<true>(keys, with.values + start * with.padded_width + c, 1, with.padded_width, with.logits,
                     with.out + c * kQueries);
  }
  for (int j = 0; j < kVectors; j++) total[j] = splat(1.0f) / total[j];
  for (int64_t i = 0; i < count; i++)
    for (int64_t c = 0; c < s.d; c++)
      out[((b * s.n + first + i) * s.h + h) * s.d + c] =
          with.out[c * kQueries + i] * total[i / kLanes][i % kLanes];
}

ffi::Error Attention(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::Buffer<ffi::F32> k,
                            ffi::Buffer<ffi::F32> v, ffi::Buffer<ffi::U32> query_bits,
                            ffi::Buffer<ffi::U32> key_bits, ffi::ResultBuffer<ffi::F32> out) {
  auto dims = q.dimensions();
  Shape s{dims[0], dims[1], k.dimensions()[1], dims[2], dims[3]};
  bool masked = query_bits.element_count() > 0;
  int64_t tiles = (s.n + kQueries - 1) / kQueries, threads = std::max<int64_t>(1, pool.num_threads());
  // Parts of a head's queries, so that all threads have work to the end.
  int64_t parts = std::min(tiles, (4 * threads + s.b * s.h - 1) / (s.b * s.h));
  const float *qs = q.typed_data(), *ks = k.typed_data(), *vs = v.typed_data();
  const uint32_t *qb = query_bits.typed_data(), *kb = key_bits.typed_data();
  float* to = out->typed_data();
  auto buffers = [=] { return std::make_unique<Buffers>(s); };
  share(pool, s.b * s.h * parts, buffers, [=](int64_t item, Buffers& with) {
    int64_t head = item / parts, part = item % parts, b = head / s.h, h = head % s.h;
    load_keys(s, ks, vs, b, h, with);
    for (int64_t t = tiles * part / parts; t < tiles * (part + 1) / parts; t++)
      masked ? attend<true>(s, qs, qb, kb, b, h, t * kQueries, with, to)
             : attend<false>(s, qs, qb, kb, b, h, t * kQueries, with, to);
  });
  return ffi::Error::Success();
}

}  // namespace flash

XLA_FFI_DEFINE_HANDLER_SYMBOL(InstdiffAttention, flash::Attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U32>>()
                                  .Arg<ffi::Buffer<ffi::U32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
