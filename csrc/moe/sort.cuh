// Pairs of a token and an expert sorted by expert, on the device: a stable radix sort in which no atomic decides about
// an order, so that everything after it is deterministic, and of which the host needs to know nothing.
//
//   sort_keys      the expert of each pair; where experts chose, its token too
//   sort_digits    for each digit of the keys: how often it stands in each part of the pairs,
//   sort_scan      where each part's begin,
//   sort_digits    and the pairs moved there
//   sort_bounds    where each key begins among the sorted, and the tiles of rows before an expert
//   sort_rows      the token of a row, and the row of a pair
#pragma once

#include "../common/launch.h"

namespace layerzoo {

// As Dispatch (kernels.h): rows are the pairs that are kept, sorted by expert. What lies behind the last row in `token`
// is never written.
struct CudaSort {
  Ids ids;      // (tokens, k); or (pairs), the tokens that experts chose
  Ids choices;  // (experts + 1): where those of each expert begin, or none
  int64_t tokens, experts, pairs, k;
  int64_t first;                                    // of our experts, or -1
  int64_t tile;                                     // rows of a tile
  int64_t parts;                                    // of the pairs, which are counted apart
  int32_t *expert, *pair, *row, *token;             // (pairs): `experts` and -1 for what is dropped
  int32_t *offsets, *tiles;                         // (experts + 1)
  int32_t *chooser, *pairs_of_token, *token_begin;  // (pairs), (pairs), (tokens + 1): where experts chose, else null
  int32_t *spare, *counts;                          // (pairs), sort_counts(parts, tokens, experts)
};

constexpr int kSortBits = 8, kSortBins = 1 << kSortBits, kSortWarps = 4;
constexpr int kScanThreads = 256, kScanEach = 8;

// How keys in [0, size] are taken apart.
struct SortDigits {
  int passes, bits;

  explicit SortDigits(int64_t size) {
    int all = 1;
    while (size >> all) ++all;
    passes = (all + kSortBits - 1) / kSortBits, bits = (all + passes - 1) / passes;
  }
};

inline int64_t sort_parts(int64_t pairs) {
  constexpr int64_t kPart = 1024, kMost = 1024;
  return pairs > kPart * kMost ? kMost : (pairs + kPart - 1) / kPart;
}

inline int64_t sort_counts(int64_t parts, int64_t tokens, int64_t experts) {
  const int bits = SortDigits(experts).bits, other = SortDigits(tokens).bits;
  return parts << (bits > other ? bits : other);
}

// How many of `size` ascending numbers are less than `than`.
template <class F>
LZ_DEVICE int64_t count_less(int64_t size, int64_t than, const F& number) {
  int64_t begin = 0;
  while (begin < size) {
    const int64_t middle = begin + (size - begin) / 2;
    if (number(middle) < than)
      begin = middle + 1;
    else
      size = middle;
  }
  return begin;
}

// Whatever the ids are, keys are in range.
LZ_KERNEL(256) sort_keys_kernel(const CudaSort s) {
  for (int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x; i < s.pairs; i += int64_t(gridDim.x) * 256) {
    int64_t expert, token = 0;
    if (s.choices.data) {
      expert = count_less(s.experts + 1, i + 1, [&](int64_t e) { return load_id(s.choices, e, 0); }) - 1;
      token = load_id(s.ids, i, 0);
    } else {
      expert = load_id(s.ids, i / s.k, i % s.k);
      if (s.first >= 0) expert = expert < s.first ? -1 : expert - s.first;
    }
    const bool kept = expert >= 0 && expert < s.experts && token >= 0 && token < s.tokens;
    s.expert[i] = static_cast<int32_t>(kept ? expert : s.experts);
    if (s.choices.data) s.chooser[i] = static_cast<int32_t>(kept ? token : s.tokens);
  }
}

// One digit of the keys of `from`, or of all pairs in their order where that is null.
struct SortPass {
  int64_t size, parts;
  const int32_t *key, *from;
  int32_t *to, *counts;  // counts: (bins, parts)
  int shift, bits;
};

// A warp takes a part. Within 32 pairs, those of one digit keep their order by their lanes.
template <bool kMove>
LZ_KERNEL(kSortWarps * 32)
sort_digits_kernel(const SortPass a) {
  LZ_SHARED(table, int32_t[kSortWarps][kSortBins]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, bins = 1 << a.bits;
  int32_t* next = table[warp];
  for (int64_t part = int64_t(blockIdx.x) * kSortWarps + warp; part < a.parts;
       part += int64_t(gridDim.x) * kSortWarps) {
    for (int d = lane; d < bins; d += 32) next[d] = kMove ? a.counts[d * a.parts + part] : 0;
    __syncwarp();  // the table is set up
    const int64_t end = (part + 1) * a.size / a.parts;
    for (int64_t i0 = part * a.size / a.parts; i0 < end; i0 += 32) {
      const int64_t i = i0 + lane;
      const int32_t pair = i >= end ? 0 : a.from ? a.from[i] : static_cast<int32_t>(i);
      const int digit = i < end ? a.key[pair] >> a.shift & (bins - 1) : -1;
      const unsigned same = __match_any_sync(0xffffffffu, digit), before = same & ((1u << lane) - 1);
      if (kMove && digit >= 0) a.to[next[digit] + __popc(before)] = pair;
      __syncwarp();  // the table is read
      if (digit >= 0 && before == 0) next[digit] += __popc(same);
      __syncwarp();  // the table is up to date
    }
    // A lane reads what it writes next, so that no barrier is needed between parts.
    for (int d = lane; !kMove && d < bins; d += 32) a.counts[d * a.parts + part] = next[d];
  }
}

// x[i] becomes the sum of all before it. One block.
LZ_KERNEL(kScanThreads) sort_scan_kernel(int32_t* x, int64_t size) {
  LZ_SHARED(warps, int32_t[kScanThreads / 32]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int32_t carry = 0;
  for (int64_t i0 = 0; i0 < size; i0 += kScanThreads * kScanEach) {
    const int64_t begin = i0 + threadIdx.x * kScanEach;
    int32_t own[kScanEach], mine = 0;
    for (int j = 0; j < kScanEach; ++j) mine += own[j] = begin + j < size ? x[begin + j] : 0;
    int32_t sum = mine;
    for (int d = 1; d < 32; d *= 2) {
      const int32_t below = __shfl_up_sync(0xffffffffu, sum, d);
      if (lane >= d) sum += below;
    }
    if (lane == 31) warps[warp] = sum;
    __syncthreads();  // every warp has its sum
    int32_t before = carry + sum - mine;
    for (int w = 0; w < kScanThreads / 32; ++w) {
      if (w < warp) before += warps[w];
      carry += warps[w];
    }
    for (int j = 0; j < kScanEach; before += own[j++])
      if (begin + j < size) x[begin + j] = before;
    __syncthreads();  // the sums are read
  }
}

// begin[key] for keys in [0, keys], among `sorted`; and the tiles of each key, if asked for.
LZ_KERNEL(256)
sort_bounds_kernel(const int32_t* key, const int32_t* sorted, int64_t size, int64_t keys, int32_t* begin,
                   int32_t* tiles, int64_t tile) {
  const auto less = [&](int64_t than) {
    return count_less(size, than, [&](int64_t i) { return static_cast<int64_t>(key[sorted[i]]); });
  };
  for (int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x; i <= keys; i += int64_t(gridDim.x) * 256) {
    const int64_t from = less(i);
    begin[i] = static_cast<int32_t>(from);
    if (tiles) tiles[i] = i < keys ? static_cast<int32_t>((less(i + 1) - from + tile - 1) / tile) : 0;
  }
}

LZ_KERNEL(256) sort_rows_kernel(const CudaSort s) {
  for (int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x; i < s.pairs; i += int64_t(gridDim.x) * 256) {
    const int32_t pair = s.pair[i];
    const bool kept = i < s.offsets[s.experts];
    s.row[pair] = kept ? static_cast<int32_t>(i) : -1;
    if (kept) s.token[i] = s.choices.data ? s.chooser[pair] : static_cast<int32_t>(pair / s.k);
  }
}

// Pairs in the order of their keys in [0, keys], which begin at begin[key].
inline void sort_by(const CudaSort& s, const int32_t* key, int64_t keys, int32_t* sorted, int32_t* begin,
                    int32_t* tiles, int64_t max_blocks, LZ_STREAM stream) {
  const SortDigits digits(keys);
  const int32_t* from = nullptr;
  for (int pass = 0; pass < digits.passes; ++pass) {
    int32_t* to = (digits.passes - pass) % 2 ? sorted : s.spare;
    const SortPass a{s.pairs, s.parts, key, from, to, s.counts, pass * digits.bits, digits.bits};
    const unsigned blocks = blocks_for((s.parts + kSortWarps - 1) / kSortWarps, max_blocks);
    LZ_LAUNCH(sort_digits_kernel<false>, blocks, kSortWarps * 32, 0, stream, a);
    LZ_LAUNCH(sort_scan_kernel, 1, kScanThreads, 0, stream, s.counts, s.parts << digits.bits);
    LZ_LAUNCH(sort_digits_kernel<true>, blocks, kSortWarps * 32, 0, stream, a);
    from = to;
  }
  LZ_LAUNCH(sort_bounds_kernel, blocks_for((keys + 256) / 256, max_blocks), 256, 0, stream, key, sorted, s.pairs, keys,
            begin, tiles, s.tile);
}

inline void sort_launch(const CudaSort& s, int64_t max_blocks, LZ_STREAM stream) {
  const unsigned blocks = blocks_for((s.pairs + 255) / 256, max_blocks);
  LZ_LAUNCH(sort_keys_kernel, blocks, 256, 0, stream, s);
  sort_by(s, s.expert, s.experts, s.pair, s.offsets, s.tiles, max_blocks, stream);
  LZ_LAUNCH(sort_scan_kernel, 1, kScanThreads, 0, stream, s.tiles, s.experts + 1);
  LZ_LAUNCH(sort_rows_kernel, blocks, 256, 0, stream, s);
  if (s.choices.data) sort_by(s, s.chooser, s.tokens, s.pairs_of_token, s.token_begin, nullptr, max_blocks, stream);
}

}  // namespace layerzoo
