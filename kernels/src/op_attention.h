// Attention(qkv [B, S, (H + 2 G) D], past_key, past_value [B, G, C, W], past_length [B], cos?, sin? [B, S, D / 2],
//           temperature? [B, S]; num_heads H, kv_num_heads G, qk_norm_epsilon) -> y [B, S, H D], present_key, present_value
//
// A Llama 4 attention layer between its projections (corral::RopeAttention and corral::NopeAttention), on the joined
// product of q, k and v. A cache row is D floats; of AttentionInt8 and AttentionInt4 it is the W bytes of cache_rows.h. The new
// rows are written at past_length; where present is not past's memory, past is copied first. A value that is not a number
// stays in its sequence.
#pragma once

#include <cstring>
#include <string>

#include "attention.h"
#include "dispatch.h"
#include "operator.h"
#include "weights.h"

namespace corral {

struct FloatRows {
  static constexpr const char* kName = "Attention";
  static constexpr ort::ElementType kType = ort::kFloat;
  static const RowCodec* codec(const AttentionKernels&) { return nullptr; }
};

struct Int8Rows {
  static constexpr const char* kName = "AttentionInt8";
  static constexpr ort::ElementType kType = ort::kUint8;
  static const RowCodec* codec(const AttentionKernels& kernels) { return &kernels.int8_rows; }
};

struct Int4Rows {
  static constexpr const char* kName = "AttentionInt4";
  static constexpr ort::ElementType kType = ort::kUint8;
  static const RowCodec* codec(const AttentionKernels& kernels) { return &kernels.int4_rows; }
};

template <class Rows>
class Attention {
 public:
  static constexpr const char* kName = Rows::kName;
  static constexpr Port kInputs[] = {ort::kFloat,         Rows::kType,         Rows::kType,        ort::kInt64,
                                     {ort::kFloat, true}, {ort::kFloat, true}, {ort::kFloat, true}};
  static constexpr Port kOutputs[] = {ort::kFloat, Rows::kType, Rows::kType};

  Attention(const ort::Api& api, const ort::KernelInfo* info)
      : kernels_(choose_instruction_set().kernels->attention),
        codec_(Rows::codec(kernels_)),
        heads_(api.attribute(info, "num_heads")),
        kv_heads_(api.attribute(info, "kv_num_heads")),
        epsilon_(api.float_attribute(info, "qk_norm_epsilon")) {
    if (kv_heads_ < 1 || heads_ < kv_heads_ || heads_ > kMostHeads || heads_ % kv_heads_) {
      throw ort::Failure(ort::kInvalidArgument, std::to_string(heads_) + " heads on " + std::to_string(kv_heads_) +
                                                    " key and value heads; expected a multiple of them");
    }
    if (!(epsilon_ >= 0)) throw ort::Failure(ort::kInvalidArgument, "qk_norm_epsilon is below zero");
  }

  void compute(const ort::Api& api, ort::KernelContext* context) const {
    const ort::Tensor qkv = api.input(context, kQkv), past_key = api.input(context, kPastKey),
                      past_value = api.input(context, kPastValue);
    const AttentionShape shape = shape_of(qkv, past_key, past_value);
    AttentionInputs inputs{};
    inputs.qkv = static_cast<const float*>(qkv.data);
    inputs.past_length = lengths(api.input(context, kPastLength), shape);
    inputs.cos = optional(api, context, kCos, {shape.batch, shape.tokens, shape.dim / 2}, "cos");
    inputs.sin = optional(api, context, kSin, {shape.batch, shape.tokens, shape.dim / 2}, "sin");
    inputs.temperature = optional(api, context, kTemperature, {shape.batch, shape.tokens}, "temperature");
    inputs.epsilon = epsilon_;
    if (!inputs.cos != !inputs.sin) throw ort::Failure(ort::kInvalidArgument, "cos and sin must come together");
    float* y = api.output(context, {shape.batch, shape.tokens, shape.heads * shape.dim});
    const AttentionCaches caches{present(api, context, past_key, 1, shape), present(api, context, past_value, 2, shape),
                                 codec_, row_bytes(shape.dim)};
    attention(kernels_, ort::Workers(api, context), shape, inputs, caches, y);
  }

 private:
  enum Input : size_t { kQkv, kPastKey, kPastValue, kPastLength, kCos, kSin, kTemperature };
  static constexpr int64_t kMostHeads = 1 << 16;
  static constexpr int64_t kItemBytes = Rows::kType == ort::kFloat ? sizeof(float) : 1;

  AttentionShape shape_of(const ort::Tensor& qkv, const ort::Tensor& past_key, const ort::Tensor& past_value) const {
    const std::vector<int64_t>&tokens = qkv.shape, &cache = past_key.shape;
    const int64_t parts = heads_ + 2 * kv_heads_, dim = tokens.size() == 3 ? tokens[2] / parts : 0;
    const bool fits = has_kernels(dim) && tokens[2] == parts * dim && cache.size() == 4 && past_value.shape == cache &&
                      cache[0] == tokens[0] && cache[1] == kv_heads_ && cache[3] == row_bytes(dim) / kItemBytes;
    if (!fits) {
      throw ort::Failure(ort::kInvalidArgument,
                         "qkv has shape " + shape_in_words(tokens) + ", past_key " + shape_in_words(cache) + ", past_value " +
                             shape_in_words(past_value.shape) + "; expected [B, S, " + std::to_string(parts) +
                             " D] and twice [B, " + std::to_string(kv_heads_) + ", C, " + (codec_ ? "bytes of a row" : "D") +
                             "], D a multiple of 16 and at most " + std::to_string(kLargestHead) +
                             (codec_ ? ", in whole groups of " + std::to_string(codec_->group) : ""));
    }
    return {tokens[0], tokens[1], heads_, kv_heads_, dim, cache[2]};
  }

  bool has_kernels(int64_t dim) const {
    const bool whole = !codec_ || dim < codec_->group || dim % codec_->group == 0;
    return dim >= kLanes && dim <= kLargestHead && dim % kLanes == 0 && whole;
  }

  int64_t row_bytes(int64_t dim) const { return codec_ ? codec_->bytes(dim) : dim * int64_t(sizeof(float)); }

  static const int64_t* lengths(const ort::Tensor& tensor, const AttentionShape& shape) {
    if (tensor.shape != std::vector<int64_t>{shape.batch}) {
      throw ort::Failure(ort::kInvalidArgument, "past_length has shape " + shape_in_words(tensor.shape) +
                                                    ", expected one for each of " + std::to_string(shape.batch) + " sequences");
    }
    const int64_t* lengths = static_cast<const int64_t*>(tensor.data);
    for (int64_t b = 0; b < shape.batch; b++) {
      if (lengths[b] < 0 || lengths[b] > shape.capacity - shape.tokens) {
        throw ort::Failure(ort::kInvalidArgument, "past_length is " + std::to_string(lengths[b]) + " for sequence " +
                                                      std::to_string(b) + ", and " + std::to_string(shape.tokens) +
                                                      " tokens are new; the cache has " +
                                                      std::to_string(shape.capacity) + " rows");
      }
    }
    return lengths;
  }

  static const float* optional(const ort::Api& api, ort::KernelContext* context, size_t index,
                               const std::vector<int64_t>& expected, const char* name) {
    if (!api.has_input(context, index)) return nullptr;
    const ort::Tensor tensor = api.input(context, index);
    if (tensor.shape != expected) {
      throw ort::Failure(ort::kInvalidArgument, std::string(name) + " has shape " + shape_in_words(tensor.shape) +
                                                    ", expected " + shape_in_words(expected));
    }
    return static_cast<const float*>(tensor.data);
  }

  uint8_t* present(const ort::Api& api, ort::KernelContext* context, const ort::Tensor& past, size_t index,
                   const AttentionShape& shape) const {
    uint8_t* data = api.output<uint8_t>(context, past.shape, index);
    const int64_t bytes = shape.batch * shape.kv_heads * shape.capacity * row_bytes(shape.dim);
    if (data != past.data && bytes) std::memcpy(data, past.data, size_t(bytes));
    return data;
  }

  const AttentionKernels& kernels_;
  const RowCodec* codec_;  // null: rows of floats
  int64_t heads_, kv_heads_;
  float epsilon_;
};

}  // namespace corral
