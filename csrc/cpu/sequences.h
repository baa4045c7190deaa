// Which tokens make a sequence, for the CPU ops on returns: padded (B, T) with any strides, or packed (N,) with
// cu_seqlens (B+1,), and a mask. For the ops' own files (*.cpp).
#pragma once

#include <cstdlib>
#include <cstring>
#include <vector>

#include "cpu/offsets.h"
#include "cpu/tensor_args.h"

namespace rl4llm {

inline bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != b.size(d)) return false;
  }
  return true;
}

// Where a sequence lies: row and first position, its length, and its first token in a contiguous result.
struct Span {
  int64_t row, begin, length, out;
};

// Per-token data of any dtype.
struct Tokens {
  char* base_ptr = nullptr;
  int64_t stride_b = 0, stride_t = 0, element_size = 0;  // strides in elements
  ScalarType type = ScalarType::Float;

  // Whether neighbours in memory are tokens of different sequences: T is the outer dimension.
  bool columns() const { return base_ptr && stride_b != 0 && stride_t != 1 && std::abs(stride_b) < std::abs(stride_t); }
  // The sequence's first token; null where there is no data.
  char* at(const Span& span) const {
    return base_ptr ? base_ptr + (span.row * stride_b + span.begin * stride_t) * element_size : nullptr;
  }
};

// Columns as rows: `count` tokens from the t0-th on of `sequences` sequences from the b0-th on, side by side.
template <class Element>
void columns_to_rows(const Tokens& tokens, int64_t b0, int64_t sequences, int64_t t0, int64_t count, char* out_ptr) {
  constexpr int64_t kTile = 16;  // tokens: what a tile touches stays in the L1 cache
  const Element* in_ptr =
      reinterpret_cast<const Element*>(tokens.base_ptr) + b0 * tokens.stride_b + t0 * tokens.stride_t;
  Element* row_ptr = reinterpret_cast<Element*>(out_ptr);
  for (int64_t t = 0; t < count; t += kTile) {
    const int64_t end = t + kTile < count ? t + kTile : count;
    // No processor guesses that the next tile's tokens lie a row apart.
    for (int64_t i = end; i < end + kTile && i < count; ++i) __builtin_prefetch(in_ptr + i * tokens.stride_t);
    for (int64_t b = 0; b < sequences; ++b) {
      for (int64_t i = t; i < end; ++i) row_ptr[b * count + i] = in_ptr[b * tokens.stride_b + i * tokens.stride_t];
    }
  }
}

inline void columns_to_rows(const Tokens& tokens, int64_t b0, int64_t sequences, int64_t t0, int64_t count,
                            char* out_ptr) {
  switch (tokens.element_size) {
    case 1:
      return columns_to_rows<uint8_t>(tokens, b0, sequences, t0, count, out_ptr);
    case 2:
      return columns_to_rows<uint16_t>(tokens, b0, sequences, t0, count, out_ptr);
    case 4:
      return columns_to_rows<uint32_t>(tokens, b0, sequences, t0, count, out_ptr);
    default:
      return columns_to_rows<uint64_t>(tokens, b0, sequences, t0, count, out_ptr);
  }
}

class Sequences {
 public:
  int64_t B, T, N;  // T: positions of a row; packed tokens are one row
  bool skip;
  Tokens mask;

  Sequences(const Tensor& like, const std::optional<Tensor>& live, const std::optional<Tensor>& cu_seqlens,
            const std::string& mask_mode)
      : like_(like), cu_seqlens_(cu_seqlens) {
    if (mask_mode != "skip" && mask_mode != "zero") fail("mask_mode: wanted skip or zero, got ", mask_mode);
    skip = mask_mode == "skip";
    if (like.dim() != (cu_seqlens ? 1 : 2)) {
      fail("tokens: wanted (B, T), or packed (N,) with cu_seqlens; got ", shape_of(like));
    }
    N = like.numel();
    T = like.size(like.dim() - 1);
    if (cu_seqlens) {
      const int64_t offsets = cu_seqlens->numel();
      if (cu_seqlens->scalar_type() == ScalarType::Int && cu_seqlens->is_contiguous()) {
        const int32_t* narrow_ptr = static_cast<const int32_t*>(cu_seqlens->data_ptr());
        widened_.assign(narrow_ptr, narrow_ptr + offsets);
        offsets_ptr_ = widened_.data();
      } else {
        offsets_ptr_ = data_of<int64_t>(*cu_seqlens, "cu_seqlens", offsets);
      }
      check_offsets(offsets_ptr_, offsets, N);
      B = offsets - 1;
    } else {
      B = like.size(0);
    }
    if (live) {
      if (live->scalar_type() != ScalarType::Bool) fail("mask: wanted bool");
      mask = data(*live, "mask");
    }
  }

  Span span(int64_t b) const {
    if (!offsets_ptr_) return {b, 0, T, b * T};
    return {0, offsets_ptr_[b], offsets_ptr_[b + 1] - offsets_ptr_[b], offsets_ptr_[b]};
  }

  Sequences(const Sequences&) = delete;  // offsets_ptr_ may point into this object

  // Up to and including the last live token.
  int64_t live_length(const Span& span) const {
    const char* mask_ptr = mask.at(span);
    int64_t length = span.length;
    if (!mask_ptr) return length;
    if (mask.stride_t == 1) {
      for (uint64_t word; length >= 8; length -= 8) {
        std::memcpy(&word, mask_ptr + length - 8, sizeof word);
        if (word != 0) break;
      }
    }
    while (length > 0 && !mask_ptr[(length - 1) * mask.stride_t]) --length;
    return length;
  }

  // Per-token data in the shape and the dtype of the tokens.
  Tokens tokens(const Tensor& tensor, const char* name) const {
    if (tensor.scalar_type() != like_.scalar_type()) {
      fail(name, ": wanted ", torch::headeronly::toString(like_.scalar_type()), " like the other tokens, got ",
           torch::headeronly::toString(tensor.scalar_type()));
    }
    return data(tensor, name);
  }

  Tensor result(const Tensor& like, ScalarType type) const {
    return cu_seqlens_ ? empty_like_of(like, {N}, type) : empty_like_of(like, {B, T}, type);
  }

 private:
  Tokens data(const Tensor& tensor, const char* name) const {
    if (!same_shape(tensor, like_)) fail(name, ": wanted ", shape_of(like_), ", got ", shape_of(tensor));
    return {static_cast<char*>(tensor.data_ptr()), tensor.dim() == 2 ? tensor.stride(0) : 0,
            tensor.stride(tensor.dim() - 1), int64_t(tensor.element_size()), tensor.scalar_type()};
  }

  Tensor like_;
  std::optional<Tensor> cu_seqlens_;
  std::vector<int64_t> widened_;  // offsets that came as int32
  const int64_t* offsets_ptr_ = nullptr;
};

}  // namespace rl4llm
