// kalmanet's executor on PyTorch's own thread pool, so that two pools never fight over the cores.
#pragma once

#include "kalmanet/executor.hpp"

namespace kalmanet::torch_ops {

// Runs tasks through PyTorch's parallel_for, with torch.get_num_threads() threads.
Executor& torch_executor();

}  // namespace kalmanet::torch_ops
