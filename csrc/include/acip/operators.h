// The training kernels on tensors, as bindings.cpp makes them: checked, on torch's threads. For what is built of them.
#pragma once

#include <ATen/ATen.h>

#include <optional>

namespace acip {

// Whether products in bfloat16 are to be made in float32, as the processor has no instructions for them.
extern bool widens_bfloat16;

at::Tensor scale_ranks(const at::Tensor& z, const at::Tensor& s);
at::Tensor mask_gradient_(const at::Tensor& z, at::Tensor h, const at::Tensor& s);
at::Tensor dropout(const at::Tensor& x, int64_t seed, int64_t threshold, double scale);
void dropout_add_(at::Tensor out, const at::Tensor& x, int64_t seed, int64_t threshold, double scale);
at::Tensor causal_softmax_(at::Tensor scores, int64_t block, double scale, const std::optional<at::Tensor>& log_sums);
void softmax_gradient_(at::Tensor dp, const at::Tensor& p, int64_t block, double scale);

}  // namespace acip
