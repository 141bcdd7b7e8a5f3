// What torch.set_float32_matmul_precision says.
#pragma once

#include <cstdint>

namespace ptk {

enum class Float32Precision : int64_t { highest, high, medium };

// "highest" where there is no Python to ask. A call through the dispatcher into Python: for kernels that can do less.
Float32Precision float32_precision();

}  // namespace ptk
