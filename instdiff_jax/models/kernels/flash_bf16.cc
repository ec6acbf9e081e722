// Attention of bfloat16 as XLA custom calls: softmax(q k^T / sqrt(d)) v with region bits, and its
// gradients.
//
// The logits of some queries and all keys stay in the second cache; the softmax is float32. The gradient computes them
// again (arXiv 2205.14135, algorithm 4). flash_bf16.py calls it.
#include <cmath>

#include "bf16.h"

typedef ffi::Buffer<ffi::BF16> Bf16Buffer;
typedef ffi::Buffer<ffi::U32> BitsBuffer;

#if HAS_BF16
namespace bf16_flash {

using namespace bf16;

struct Shape {
  int64_t b, n, m, h, d;  // batch, queries, keys, heads, head width
  int64_t keys() const { return round_up(m, kBlock); }
  int64_t width() const { return round_up(d, kBlock); }
  float scale() const { return 1 / std::sqrt(static_cast<float>(d)); }
  int64_t row(int64_t count, int64_t b, int64_t h, int64_t i) const { return ((b * count + i) * this->h + h) * d; }
};

// How the softmax of a query was scaled: the highest logit (of powers of two), and 1 / the sum.
struct Scaled {
  float highest, share;
};

struct Given {
  const Bf16 *q, *k, *v;
  const uint32_t *query_bits, *key_bits;  // nullptr without regions
};

struct Buffers {
  Aligned<Bf16> queries, keys, values, gradient;                              // rows, zeros around
  Aligned<Bf16> keys_across, values_across, keys_down, values_down;           // as right sides
  Aligned<Bf16> queries_down, gradient_down, weights, turned;                 // of some queries
  Aligned<Bf16> of_logits[2];  // rounded, and what rounding took: they are multiplied with keys, which may be large
  Aligned<float> logits, others, out, of_keys, of_values;
};

Buffers* buffers() {
  static thread_local Buffers own;
  return &own;
}

// left [rows, terms] times right, added to out [rows, columns] or written there; whole blocks.
void multiply(int64_t rows, int64_t terms, int64_t columns, const Bf16* left, const Bf16* right, bool add, float* out) {
  for (int64_t n = 0; n < columns; n += kBlock)
    for (int64_t m = 0; m < rows; m += kBlock) {
      float* sums = out + m * columns + n;
      block(terms, left + m * terms, terms, right + n * terms, add ? sums : nullptr, sums, columns);
    }
}

// `count` rows of one head to [rows, width], zeros after them.
void load_rows(const Shape& s, const Bf16* from, int64_t count, int64_t rows, Aligned<Bf16>& to) {
  to.need(rows * s.width());
  for (int64_t i = 0; i < rows; i++) {
    Bf16* row = to.data + i * s.width();
    int64_t wide = i < count ? s.d : 0;
    if (wide) std::memcpy(row, from + i * s.h * s.d, wide * sizeof(Bf16));
    std::memset(row + wide, 0, (s.width() - wide) * sizeof(Bf16));
  }
}

// x [rows, width] as the right side of a product over its rows.
void pack_down(int64_t rows, int64_t width, const Bf16* x, Aligned<Bf16>& to) {
  to.need(rows * width);
  for (int64_t c = 0; c < width; c += kTile)
    for (int64_t r = 0; r < rows; r += 2) {
      Bf16* tile = to.data + c / kBlock * rows * kBlock + (r / kTerms * 2 + c / kTile % 2) * kTileSize;
      interleave(x + r * width + c, x + (r + 1) * width + c, tile + r % kTerms / 2 * kTerms);
    }
}

// x [rows, width] as the right side of a product over its width.
void pack_across(int64_t rows, int64_t width, const Bf16* x, Aligned<Bf16>& to) {
  to.need(rows * width);
  for (int64_t r = 0; r < rows; r += kTile)
    for (int64_t c = 0; c < width; c += kTerms) {
      __m512i part[kTile];
      for (int i = 0; i < kTile; i++) part[i] = _mm512_load_si512(x + (r + i) * width + c);
      transpose(part);
      Bf16* tile = to.data + r / kBlock * width * kBlock + (c / kTerms * 2 + r / kTile % 2) * kTileSize;
      for (int i = 0; i < kTile; i++) _mm512_store_si512(tile + i * kTerms, part[i]);
    }
}

// x [rows, columns] turned over.
void turn(int64_t rows, int64_t columns, const Bf16* x, Bf16* to) {
  for (int64_t c = 0; c < columns; c += kTile)
    for (int64_t r = 0; r < rows; r += kTerms) {
      alignas(64) Bf16 pairs[kTileSize];
      __m512i part[kTile];
      for (int i = 0; i < kTile; i++) {
        const Bf16* row = x + (r + 2 * i) * columns + c;
        interleave(row, row + columns, pairs + i * kTerms);
        part[i] = _mm512_load_si512(pairs + i * kTerms);
      }
      transpose(part);
      for (int i = 0; i < kTile; i++) _mm512_store_si512(to + (c + i) * rows + r, part[i]);
    }
}

// 2^x for x <= 0: the polynomial of degree 4 with the least relative error on [-0.5, 0.5], 2.6e-6.
inline __m512 exp2(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);  // in this order: NaN stays NaN
  __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), f = _mm512_sub_ps(x, whole);
  __m512 y = _mm512_set1_ps(9.57007448e-3f);
  for (float c : {5.59178233e-2f, 2.40247451e-1f, 6.93121819e-1f, 9.99999262e-1f})
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(c));
  return _mm512_scalef_ps(y, whole);
}

// The keys from `j` on that query i of batch b sees, a bit each.
inline __mmask16 seen(const Shape& s, const Given& from, int64_t b, int64_t i, int64_t j) {
  __mmask16 mask = first_of_16(s.m - j);
  __m512i keys = _mm512_maskz_loadu_epi32(mask, from.key_bits + b * s.m + j);
  __mmask16 shared = _mm512_test_epi32_mask(keys, _mm512_set1_epi32(from.query_bits[b * s.n + i] | 0x80000000u));
  if (i >= j && i < j + kTile) shared |= 1u << (i - j);
  return shared & mask;
}

constexpr float kHidden = -0x1p126f;  // scaled it is finite, and not rounded

// Hides logits of query i: a very low number where it may not look, -inf after the last key.
inline void hide(const Shape& s, const Given& from, int64_t b, int64_t i, float* logits) {
  if (from.key_bits)
    for (int64_t j = 0; j < s.m; j += kTile)
      _mm512_mask_store_ps(logits + j, ~seen(s, from, b, i, j), _mm512_set1_ps(kHidden));
  for (int64_t j = s.m; j < s.keys(); j++) logits[j] = -INFINITY;
}

// What logits are multiplied with: powers of two instead of e.
inline float scale(const Shape& s) { return 1.44269504f * s.scale(); }

// Attention of one head's queries from `first` on, kBlock of them at most.
void attend(const Shape& s, const Given& from, int64_t b, int64_t h, int64_t first, Buffers& with, Bf16* out, Scaled* scaled) {
  int64_t count = std::min<int64_t>(kBlock, s.n - first), keys = s.keys(), width = s.width();
  with.logits.need(kBlock * keys), with.weights.need(kBlock * keys), with.out.need(kBlock * width);
  load_rows(s, from.q + s.row(s.n, b, h, first), count, kBlock, with.queries);
  multiply(kBlock, width, keys, with.queries.data, with.keys_across.data, false, with.logits.data);
  __m512 by = _mm512_set1_ps(scale(s));
  for (int64_t r = 0; r < kBlock; r++) {
    float* logits = with.logits.data + r * keys;
    Bf16* weights = with.weights.data + r * keys;
    int64_t i = std::min(first + r, s.n - 1);
    hide(s, from, b, i, logits);
    __m512 high = _mm512_set1_ps(-INFINITY), sums = _mm512_setzero_ps();
    for (int64_t j = 0; j < keys; j += kTile) high = _mm512_max_ps(high, _mm512_load_ps(logits + j));
    float highest = _mm512_reduce_max_ps(high) * scale(s);
    for (int64_t j = 0; j < keys; j += kTile) {
      __m512 x = exp2(_mm512_fmsub_ps(_mm512_load_ps(logits + j), by, _mm512_set1_ps(highest)));
      sums = _mm512_add_ps(sums, x);
      store(x, 0xffff, weights + j);
    }
    if (r < count) scaled[r] = {highest, 1 / _mm512_reduce_add_ps(sums)};
  }
  multiply(kBlock, keys, width, with.weights.data, with.values_down.data, false, with.out.data);
  for (int64_t r = 0; r < count; r++)
    for (int64_t c = 0; c < s.d; c += kTile) {
      Floats x = *(const Floats*)(with.out.data + r * width + c) * splat(scaled[r].share);
      store(x, first_of_16(s.d - c), out + s.row(s.n, b, h, first + r) + c);
    }
}

struct Result {
  const Bf16* gradient;
  const Scaled* scaled;
};

// The weights of `rows` queries from `first` on, and the gradients of their logits.
void load_weights(const Shape& s, const Given& from, const Result& result, int64_t b, int64_t h, int64_t first, int64_t rows,
                  Buffers& with) {
  for (int64_t r = 0; r < rows; r++) {
    int64_t i = first + r, keys = s.keys();
    Bf16 *weights = with.weights.data + r * keys, *parts[2];
    for (int part = 0; part < 2; part++) parts[part] = with.of_logits[part].data + r * keys;
    if (i >= s.n) {
      for (Bf16* row : {weights, parts[0], parts[1]}) std::memset(row, 0, keys * sizeof(Bf16));
      continue;
    }
    Scaled scaled = result.scaled[(b * s.h + h) * s.n + i];
    float* logits = with.logits.data + r * keys;
    const float* of_weights = with.others.data + r * keys;
    hide(s, from, b, i, logits);
    __m512 by = _mm512_set1_ps(scale(s)), highest = _mm512_set1_ps(scaled.highest);
    __m512 share = _mm512_set1_ps(scaled.share), mean = _mm512_setzero_ps(), down = _mm512_set1_ps(s.scale());
    for (int64_t j = 0; j < keys; j += kTile) {
      __m512 weight = _mm512_mul_ps(exp2(_mm512_fmsub_ps(_mm512_load_ps(logits + j), by, highest)), share);
      mean = _mm512_fmadd_ps(weight, _mm512_load_ps(of_weights + j), mean);
      _mm512_store_ps(logits + j, weight);
    }
    // Not from the rounded result: large keys would multiply what the changes then lack to a sum of 0.
    mean = _mm512_set1_ps(_mm512_reduce_add_ps(mean));
    for (int64_t j = 0; j < keys; j += kTile) {
      __m512 weight = _mm512_load_ps(logits + j), change = _mm512_sub_ps(_mm512_load_ps(of_weights + j), mean);
      store(weight, 0xffff, weights + j);
      change = _mm512_mul_ps(_mm512_mul_ps(weight, change), down);
      store(change, 0xffff, parts[0] + j);
      __m512i rounded = _mm512_cvtepu16_epi32(_mm256_load_si256((const __m256i*)(parts[0] + j)));
      change = _mm512_sub_ps(change, _mm512_castsi512_ps(_mm512_slli_epi32(rounded, 16)));
      store(change, 0xffff, parts[1] + j);
    }
    // A query that sees nothing has weights, and nothing that its logits could change.
    if (scaled.highest < kHidden / 2 * scale(s))
      for (Bf16* row : parts) std::memset(row, 0, keys * sizeof(Bf16));
  }
}

void store_rows(const Shape& s, const float* x, int64_t count, Bf16* to) {
  for (int64_t i = 0; i < count; i++)
    for (int64_t c = 0; c < s.d; c += kTile)
      store(_mm512_loadu_ps(x + i * s.width() + c), first_of_16(s.d - c), to + i * s.h * s.d + c);
}

// The gradients of one head's queries, keys and values.
void pull(const Shape& s, const Given& from, const Result& result, int64_t b, int64_t h, Buffers& with, Bf16* of_q, Bf16* of_k,
          Bf16* of_v) {
  int64_t keys = s.keys(), width = s.width();
  // As many queries at a time as leave their logits in the second cache.
  int64_t rows = std::min(round_up(s.n, kBlock), std::max<int64_t>(kBlock, (1 << 16) / keys / kBlock * kBlock));
  for (auto* buffer : {&with.logits, &with.others}) buffer->need(rows * keys);
  for (auto* buffer : {&with.weights, with.of_logits, with.of_logits + 1, &with.turned}) buffer->need(rows * keys);
  for (auto* buffer : {&with.of_keys, &with.of_values}) buffer->need(keys * width);
  with.out.need(rows * width);
  for (int64_t first = 0; first < s.n; first += rows) {
    int64_t count = std::min(rows, s.n - first), row = s.row(s.n, b, h, first);
    load_rows(s, from.q + row, count, rows, with.queries);
    load_rows(s, result.gradient + row, count, rows, with.gradient);
    pack_down(rows, width, with.queries.data, with.queries_down);
    pack_down(rows, width, with.gradient.data, with.gradient_down);
    multiply(rows, width, keys, with.queries.data, with.keys_across.data, false, with.logits.data);
    multiply(rows, width, keys, with.gradient.data, with.values_across.data, false, with.others.data);
    load_weights(s, from, result, b, h, first, rows, with);
    for (int part = 0; part < 2; part++) {
      multiply(rows, keys, width, with.of_logits[part].data, with.keys_down.data, part > 0, with.out.data);
      turn(rows, keys, with.of_logits[part].data, with.turned.data);
      multiply(keys, rows, width, with.turned.data, with.queries_down.data, first + part > 0, with.of_keys.data);
    }
    store_rows(s, with.out.data, count, of_q + row);
    turn(rows, keys, with.weights.data, with.turned.data);
    multiply(keys, rows, width, with.turned.data, with.gradient_down.data, first > 0, with.of_values.data);
  }
  store_rows(s, with.of_keys.data, s.m, of_k + s.row(s.m, b, h, 0));
  store_rows(s, with.of_values.data, s.m, of_v + s.row(s.m, b, h, 0));
}

// Keys and values of one head.
void load_head(const Shape& s, const Given& from, int64_t b, int64_t h, bool for_gradient, Buffers& with) {
  load_rows(s, from.k + s.row(s.m, b, h, 0), s.m, s.keys(), with.keys);
  load_rows(s, from.v + s.row(s.m, b, h, 0), s.m, s.keys(), with.values);
  pack_across(s.keys(), s.width(), with.keys.data, with.keys_across);
  if (for_gradient) {
    pack_across(s.keys(), s.width(), with.values.data, with.values_across);
    pack_down(s.keys(), s.width(), with.keys.data, with.keys_down);
  } else {
    pack_down(s.keys(), s.width(), with.values.data, with.values_down);
  }
}

Shape shape_of(Bf16Buffer& q, Bf16Buffer& k) {
  auto dims = q.dimensions();
  return {dims[0], dims[1], k.dimensions()[1], dims[2], dims[3]};
}

Given given(Bf16Buffer& q, Bf16Buffer& k, Bf16Buffer& v, BitsBuffer& query_bits, BitsBuffer& key_bits) {
  bool bits = key_bits.element_count() > 0;
  return {data(q), data(k), data(v), bits ? query_bits.typed_data() : nullptr, bits ? key_bits.typed_data() : nullptr};
}

void run(ffi::ThreadPool& pool, const Shape& s, const Given& from, Bf16* out, Scaled* scaled) {
  int64_t tiles = divide(s.n, kBlock), threads = std::max<int64_t>(1, pool.num_threads());
  // Parts of a head's queries, so that all threads have work to the end.
  int64_t parts = threads == 1 ? 1 : std::min(tiles, divide(4 * threads, s.b * s.h));
  share(pool, s.b * s.h * parts, buffers, [=](int64_t item, Buffers& with) {
    Tiles tile_sizes;
    int64_t head = item / parts, part = item % parts, b = head / s.h, h = head % s.h;
    load_head(s, from, b, h, false, with);
    for (int64_t t = tiles * part / parts; t < tiles * (part + 1) / parts; t++)
      attend(s, from, b, h, t * kBlock, with, out, scaled + head * s.n + t * kBlock);
  });
}

void run_gradient(ffi::ThreadPool& pool, const Shape& s, const Given& from, const Result& result, Bf16* of_q, Bf16* of_k,
                  Bf16* of_v) {
  share(pool, s.b * s.h, buffers, [=](int64_t head, Buffers& with) {
    Tiles tile_sizes;
    load_head(s, from, head / s.h, head % s.h, true, with);
    pull(s, from, result, head / s.h, head % s.h, with, of_q, of_k, of_v);
  });
}

}  // namespace bf16_flash
#endif

static ffi::Error Bf16Attention(ffi::ThreadPool pool, Bf16Buffer q, Bf16Buffer k, Bf16Buffer v, BitsBuffer query_bits,
                               BitsBuffer key_bits, ffi::Result<Bf16Buffer> out, ffi::ResultBuffer<ffi::F32> scaled) {
#if HAS_BF16
  auto to = reinterpret_cast<bf16_flash::Scaled*>(scaled->typed_data());
  bf16_flash::run(pool, bf16_flash::shape_of(q, k), bf16_flash::given(q, k, v, query_bits, key_bits), bf16::data(*out), to);
  return ffi::Error::Success();
#else
  return ffi::Error(ffi::ErrorCode::kUnimplemented, "this processor has no products of bfloat16");
#endif
}

static ffi::Error Bf16AttentionGradient(ffi::ThreadPool pool, Bf16Buffer q, Bf16Buffer k, Bf16Buffer v, BitsBuffer query_bits,
                                       BitsBuffer key_bits, ffi::Buffer<ffi::F32> scaled, Bf16Buffer gradient,
                                       ffi::Result<Bf16Buffer> of_q, ffi::Result<Bf16Buffer> of_k,
                                       ffi::Result<Bf16Buffer> of_v) {
#if HAS_BF16
  auto from = reinterpret_cast<const bf16_flash::Scaled*>(scaled.typed_data());
  bf16_flash::run_gradient(pool, bf16_flash::shape_of(q, k), bf16_flash::given(q, k, v, query_bits, key_bits),
                          {bf16::data(gradient), from}, bf16::data(*of_q), bf16::data(*of_k), bf16::data(*of_v));
  return ffi::Error::Success();
#else
  return ffi::Error(ffi::ErrorCode::kUnimplemented, "this processor has no products of bfloat16");
#endif
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(InstdiffBf16Attention, Bf16Attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Bf16Buffer>()
                                  .Arg<Bf16Buffer>()
                                  .Arg<Bf16Buffer>()
                                  .Arg<BitsBuffer>()
                                  .Arg<BitsBuffer>()
                                  .Ret<Bf16Buffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(InstdiffBf16AttentionGradient, Bf16AttentionGradient,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Bf16Buffer>()
                                  .Arg<Bf16Buffer>()
                                  .Arg<Bf16Buffer>()
                                  .Arg<BitsBuffer>()
                                  .Arg<BitsBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<Bf16Buffer>()
                                  .Ret<Bf16Buffer>()
                                  .Ret<Bf16Buffer>()
                                  .Ret<Bf16Buffer>());
