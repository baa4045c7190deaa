// What every CUDA op's binding needs besides cpu/tensor_args.h: the stream, dtypes and hyperparameters of a launch.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "cpu/tensor_args.h"
#include "cuda/launch.h"

namespace rl4llm {

using torch::stable::accelerator::DeviceGuard;

// The stream that PyTorch works on. cudaStream_t comes from libtorch_cuda alone, which a CPU build of PyTorch lacks: it
// is looked up where it must exist already, so that this extension links and loads without it.
cudaStream_t current_stream(const Tensor& tensor);

Dtype dtype_of(const Tensor& tensor, const char* name);

// 0-d on the CPU: read here, without a synchronisation. On the device, () or (N,): read by the kernel.
Number number_of(const Tensor& tensor, const char* name, int64_t rows);

// One launch holds 2^31 − 1 blocks of threads.
void check_programs(const char* op, int64_t programs);

// A launch's own error, which no later synchronisation would report as its own.
void check_launch(const char* op, cudaError_t error);

}  // namespace rl4llm
